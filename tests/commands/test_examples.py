"""Every example of the help, the README and the docs runs as it is printed, against a tiny model."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
from commandline import run_lrc
from tiny import tiny_text

from lrc.calibrate import available, data, sources
from lrc.cli import app
from lrc.commands import row_process
from lrc.commands.common.help import EXAMPLES
from lrc.errors import SweepError
from lrc.plan import load_recipe
from lrc.plan.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ("FILE", "MINE.txt", "wiki.valid.txt", "wiki.test.raw")
SIZES = {"--length": "48", "--samples": "4", "--max-windows": "2", "--prefill": "16", "--decode": "1", "--rounds": "1"}


def printed() -> dict[str, list[str]]:
    """Page -> the commands that it prints."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "methods").glob("*.md"))]
    found = {"help": [line for lines in EXAMPLES.values() for line in lines]}
    for page in pages:
        lines = re.findall(r"^    (lrc .*?)(?: {2,}#.*)?$", page.read_text(), re.MULTILINE)
        if page.name != "LOG.md" and lines:
            found[str(page.relative_to(ROOT))] = list(dict.fromkeys(lines))
    return found


def commands(group: Any, path: tuple[str, ...] = ()) -> list[str]:
    found = [" ".join(path)]
    for name, command in getattr(group, "commands", {}).items():
        found += commands(command, (*path, name))
    return found


@pytest.fixture(scope="module")
def models(tiny_checkpoints, tmp_path_factory, tiny_text_file) -> dict[str, Path]:
    """A tiny model with as many positions as examples ask for, a result of it, and its dense export."""
    folder = tmp_path_factory.mktemp("examples")
    model = tiny_checkpoints("llama", num_hidden_layers=4, max_position_embeddings=4096)
    sizes = ["--calibration", f"text:{tiny_text_file}", "--samples", 4, "--length", 48]
    assert run_lrc("compress", model, "--recipe", "svd-llm", "--ratio", 0.3, "--out", folder / "OUT", *sizes).code == 0
    assert run_lrc("export", folder / "OUT", "--to", "dense", "--out", folder / "OUT-dense", "--dtype", "bfloat16").code == 0
    return {"MODEL": model, "OUT": folder / "OUT", "OUT-dense": folder / "OUT-dense"}


@pytest.fixture
def here(models, tmp_path, monkeypatch) -> Path:
    """A working directory as the examples suppose it; the hub answers with a tiny text, and calibration sets are small."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MODEL").symlink_to(models["MODEL"])
    for number, name in enumerate(TEXTS):
        (tmp_path / name).write_text(tiny_text(4000, seed=number))
    monkeypatch.setattr(available, "_require_reachable", lambda hub: None)
    monkeypatch.setattr(sources, "hub_documents", lambda hub, seed: iter([tiny_text(4000, seed=len(hub.split))]))
    real = load_recipe.load_recipe

    def small(*arguments: Any, **more: Any) -> Recipe:
        recipe = real(*arguments, **more)
        changes = {"samples": 8, "length": 48, "held_out": min(recipe.calibration.held_out, 2)}
        return recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update=changes)})

    monkeypatch.setattr(load_recipe, "load_recipe", small)
    monkeypatch.setattr(row_process, "run", in_this_process)
    assert data.evaluation_text("wikitext2").text
    return tmp_path


def in_this_process(words: list[str], log: Path, module: str = "lrc.cli") -> tuple[float, int]:
    """A row of a sweep, without a process of its own."""
    result = run_lrc(*words)
    if result.code:
        raise SweepError({log.stem: result.err})
    return 0.0, 1


def failure(line: str, models: dict[str, Path], here: Path) -> str:
    """What is wrong with a command that was run as it is printed; empty where all went well."""
    words = shlex.split(line)[1:]
    target = Path(words[words.index(">") + 1]) if ">" in words else None
    words = words[: words.index(">")] if target else words
    out = words[words.index("--out") + 1] if "--out" in words else None
    for name in ("OUT", "OUT-dense"):
        if out != name and not any(word == f"{name}-dense" for word in (out,)):
            shutil.copytree(models[name], here / name)
    if words[0] == "export" and out is None:
        shutil.rmtree(here / "OUT-dense")
    small = [SIZES.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    given = {"eval": ["--length", "64", "--max-windows", "1"], "bench": ["--prefill", "8", "--decode", "1", "--rounds", "1"]}
    given |= {"sweep": ["--eval-length", "64", "--max-windows", "1"], "advise": ["--length", "48", "--layers", "1"]}
    result = run_lrc(*small, *given.get(words[0], []))
    if target:
        target.write_text(result.out)
    return "" if result.code == 0 and result.out else f"{line}\n{result.printed}"


def test_every_command_has_two_examples_in_its_help_which_wraps_and_cuts_nothing(monkeypatch):
    group = typer.main.get_command(app)
    assert set(EXAMPLES) == set(commands(group))
    for width in (40, 80, 160):
        monkeypatch.setenv("COLUMNS", str(width))
        for words, examples in EXAMPLES.items():
            helped = run_lrc(*words.split(), "-h")
            assert helped.code == 0 and helped.out == run_lrc(*words.split(), "--help").out
            assert len(examples) == 2 and all(f"  {line}\n" in helped.out for line in examples)
            assert "..." not in helped.out.replace("[ARGS]...", "").replace("{MODEL}...", ""), "nothing is cut"
            prose, _, _ = helped.out.partition("Examples:")
            assert all(len(line) <= max(width, 60) for line in prose.splitlines()), (words, width)


@pytest.mark.parametrize("line", sorted({line for lines in EXAMPLES.values() for line in lines}))
def test_an_example_of_the_help_runs(line, models, here):
    assert not failure(line, models, here)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in printed() if page != "help"])
def test_the_examples_of_a_page_run(page, models, here):
    for number, line in enumerate(printed()[page]):
        place = here / str(number)
        place.mkdir()
        for path in here.iterdir():
            if path.name in ("MODEL", *TEXTS):
                (place / path.name).symlink_to(path)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(place)
            assert not failure(line, models, place)


def test_results_are_plain_where_no_color_is_wanted(monkeypatch, here, models):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[3" not in run_lrc("plan", "MODEL", "--ratio", 0.3).out


def test_the_shell_completes_commands_and_recipes(monkeypatch):
    monkeypatch.setenv("_LRC_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "lrc comp")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert run_lrc().out.split() == ["compress", "compare"]
    monkeypatch.setenv("COMP_WORDS", "lrc compress MODEL --recipe svd-llm-s")
    monkeypatch.setenv("COMP_CWORD", "4")
    assert run_lrc().out.split() == ["svd-llm-sequential"]
