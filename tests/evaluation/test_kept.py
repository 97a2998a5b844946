"""Nothing is lost or passed off as something else: models, rows of a sweep, and what an evaluation has measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from commandline import contents, lrc_ok, run_lrc
from tiny import tiny_text

import lrc.evaluation.evaluate
from lrc.checkpoint.hf_quantizer import open_model
from lrc.plan.load_recipe import load_recipe


@pytest.fixture(scope="module")
def model(tiny_checkpoints) -> Path:
    return tiny_checkpoints("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> list[Path]:
    """Three texts of chance: one to calibrate on, two to evaluate on."""
    files = [tmp_path_factory.mktemp("texts") / f"{name}.txt" for name in ("seen", "one", "two")]
    for seed, file in enumerate(files):
        file.write_text(tiny_text(3000, seed=seed + 20))
    return files


def swept(model: Path, out: Path, texts: list[Path], *recipes: object, ratios: str = "0.4") -> list[object]:
    return [
        "sweep", model, "--out", out, "--recipes", ",".join(map(str, recipes)), "--ratios", ratios,
        "--calibration", f"text:{texts[0]}", "--samples", 4, "--length", 32,
        "--tasks", f"text:{texts[1]}", "--eval-length", 64, "--max-windows", 2,
    ]  # fmt: skip


def rows_of(out: Path) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads((out / "sweep.json").read_text())["rows"]}


def recipe_file(path: Path, name: str) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(yaml.safe_dump(load_recipe(name).resolved()))
    return path


# ---- models


@pytest.mark.parametrize("spelled", ["plain", "symlink"])
def test_a_model_is_never_its_own_output(spelled, model, texts, tmp_path):
    """A result without lrc's forms looks like any other model, and --restart would take it away."""
    narrow = tmp_path / "narrow"
    told = ("--calibration", f"text:{texts[0]}", "--samples", 8, "--length", 48, "--ratio", 0.3)
    lrc_ok("compress", model, "--out", narrow, "--recipe", "narrow", *told)
    out = narrow if spelled == "plain" else tmp_path / "link"
    if spelled == "symlink":
        out.symlink_to(narrow)
    before = contents(narrow)
    result = run_lrc("compress", narrow, "--out", out, "--recipe", "svd-llm", *told, "--restart")
    assert result.code == 2 and "is the folder of the model itself" in result.err
    assert contents(narrow) == before


def test_a_refused_request_leaves_nothing_that_refuses_the_next(model, texts, tmp_path):
    told = (
        "compress",
        model,
        "--out",
        tmp_path / "out",
        "--recipe",
        "svd-llm",
        "--ratio",
        0.3,
        "--calibration",
        f"text:{texts[0]}",
    )
    refused = run_lrc(*told)
    assert refused.code == 2 and "Give --length 256 or less" in refused.err
    lrc_ok(*told, "--length", 48, "--samples", 4)


# ---- rows of a sweep


def test_rows_that_would_be_called_alike_are_refused(model, texts, tmp_path):
    one, two = recipe_file(tmp_path / "a" / "x.yaml", "svd"), recipe_file(tmp_path / "b" / "x.yaml", "svd-llm")
    for recipes, ratios, name in (((one, two), "0.4", "x-0.4"), (("svd",), "0.4,0.40000001", "svd-0.4")):
        result = run_lrc(*swept(model, tmp_path / "out", texts, *recipes, ratios=ratios))
        assert result.code == 2 and f"Two rows would be called {name}" in result.err
    assert not (tmp_path / "out" / "sweep.json").exists()


def test_a_recipe_that_was_edited_is_another_row(model, texts, tmp_path):
    """And one whose file has no suffix stays in the folder of the sweep."""
    file, out = recipe_file(tmp_path / "recipes" / "mine", "svd"), tmp_path / "out"
    lrc_ok(*swept(model, out, texts, file), "--keep")
    first = rows_of(out)["mine-0.4"]
    recipe_file(file, "svd-llm")
    lrc_ok(*swept(model, out, texts, file), "--keep")
    second = rows_of(out)["mine-0.4"]
    assert first["metrics"] != second["metrics"]
    assert second["settings"]["method"] == "svd-llm"
    assert sorted(path.name for path in file.parent.iterdir()) == ["mine"]
    assert rows_of(out)["original"]["nbytes"] == open_model(str(model))[0].get_memory_footprint(return_buffers=False)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--tasks", "text:nothing.txt"), "there is no file nothing.txt"),
        (("--eval-length", 4096), "--eval-length 4096 is more than the 256 positions"),
        (("--length", 4096), "calibration.length 4096 is more than the 256 positions"),
    ],
)
def test_what_a_sweep_cannot_do_is_said_before_it_begins(more, said, model, texts, tmp_path):
    result = run_lrc(*swept(model, tmp_path / "out", texts, "svd-llm"), *more)
    assert result.code == 2 and said in result.err
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_a_sweep_that_is_another_one_says_what_differs(model, texts, tmp_path):
    lrc_ok(*swept(model, tmp_path / "out", texts, "svd"))
    result = run_lrc(*swept(model, tmp_path / "out", texts, "svd"), "--eval-length", 32)
    assert result.code == 2 and "evaluate: it has 64, you asked for 32" in result.err


# ---- what was measured


def test_an_evaluation_that_is_interrupted_keeps_the_tasks_that_are_done(model, texts, tmp_path, monkeypatch):
    perplexity, seen = lrc.evaluation.evaluate.token_perplexity, []

    def until_the_second(*arguments: object) -> object:
        seen.append(arguments)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return perplexity(*arguments)

    monkeypatch.setattr(lrc.evaluation.evaluate, "token_perplexity", until_the_second)
    tasks = ",".join(f"text:{text}" for text in texts[1:])
    result = run_lrc("eval", model, "--tasks", tasks, "--length", 64, "--json", tmp_path / "r.json")
    assert result.code == 130 and "interrupted" in result.err
    assert "text:one.txt-token-ppl@64" in result.out
    assert list(json.loads((tmp_path / "r.json").read_text())["results"]) == ["text:one.txt-token-ppl@64"]


def test_models_that_cannot_be_compared_are_both_reported(model, texts, tiny_checkpoints, tmp_path):
    """One puts a token before every window, the other does not."""
    other = tiny_checkpoints("gemma3_text")
    result = run_lrc(
        "eval", model, "--tasks", f"text:{texts[1]}", "--length", 64, "--baseline", other, "--json", tmp_path / "r.json"
    )
    assert result.code == 1 and "measured by two protocols" in result.err
    document = json.loads((tmp_path / "r.json").read_text())
    assert document["results"] and document["baseline"]["results"] and "differences" not in document
    assert result.out.count("text:one.txt-token-ppl@64") == 2


def test_a_baseline_that_has_seen_the_text_is_refused_before_anything_is_measured(model, texts, tmp_path, monkeypatch):
    lrc_ok(
        "compress", model, "--out", tmp_path / "out", "--recipe", "svd-llm", "--ratio", 0.3,
        "--calibration", f"text:{texts[0]}", "--samples", 4, "--length", 32,
    )  # fmt: skip
    monkeypatch.setattr(lrc.evaluation.evaluate, "measure", None)
    result = run_lrc("eval", model, "--tasks", f"text:{texts[0]}", "--length", 64, "--baseline", tmp_path / "out")
    assert result.code == 2 and f"{tmp_path / 'out'} was calibrated on the text" in result.err


# ---- what is said of a budget


def test_a_budget_that_cannot_be_met_is_named_as_it_was_given(model):
    bits, size = (run_lrc("plan", model, "--recipe", "svd-llm", *budget) for budget in (("--bits", 1), ("--size", "80KB")))
    assert bits.code == 2 and "At 1 bits per weight (ratio 0.96875)" in bits.err
    assert size.code == 2 and "At a size of 80,000 bytes" in size.err


def test_a_budget_without_effect_is_refused(model):
    refused = run_lrc("plan", model, "--recipe", "svd-llm", "--ratio", 0.3, "--set", "rank_multiple=1024")
    assert refused.code == 2 and "svd-llm has no form of any target that is smaller" in refused.err
    assert "rank_multiple" in refused.err


def test_a_plan_of_a_search_is_one_of_a_guess(model):
    assert "perplexity may rise by 5.00%" in lrc_ok("plan", model, "--recipe", "svd-llm", "--max-ppl-increase", "5%")
