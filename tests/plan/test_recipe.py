"""Recipes: read, overridden, checked as a whole, spelled out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from tiny import tiny_text

from lrc.calibrate.data import load_calibration
from lrc.checkpoint.location import locate
from lrc.compress.base import methods
from lrc.errors import RecipeError
from lrc.model.view import ModelView
from lrc.plan.load_recipe import load_recipe, shipped, summary
from lrc.plan.planner import make_draft
from lrc.plan.recipe import Recipe


@pytest.fixture
def write(tmp_path):
    """A function that writes a recipe file and returns its name."""

    def write(text: str) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def problems(name: str, overrides: dict | None = None, settings: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, overrides, settings)
    return [re.sub(r"^\S+\.yaml:\d+:\d+: ", "", line) for line in caught.value.problems]


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_is_sound_and_says_what_it_is(name):
    recipe = load_recipe(name)
    assert recipe.compression[0].source or recipe.depth
    text = shipped()[name]
    assert 20 < len(summary(text)) < 110 and summary(text).endswith(".")
    assert "Source:" in text
    assert f"lrc compress MODEL --recipe {name} " in text


@pytest.mark.parametrize("name", shipped())
def test_a_resolved_recipe_spells_out_everything_and_reads_back_the_same(name, write):
    recipe = load_recipe(name)
    resolved = recipe.resolved()
    alternatives = {
        "method",
        "settings",
        "steps",
        "alternatives",
        "depth",
        "refine",
        "bits",
        "size",
        "max_ppl_increase",
        "allocation_settings",
        "limits",
    }
    assert set(resolved) - alternatives == set(Recipe.model_fields) - alternatives
    for step in resolved.get("steps", [resolved] if "method" in resolved else []):
        assert set(step["settings"]) == set(methods()[step["method"]].settings.model_fields)
    assert set(resolved["calibration"]) == {"source", "samples", "length", "seed", "held_out", "chat"}
    assert load_recipe(write(yaml.safe_dump(resolved))).resolved() == resolved


def test_the_papers_calibration_is_the_default_of_the_papers_recipe():
    assert load_recipe("svd-llm").resolved() == {
        "method": "svd-llm",
        "settings": {},
        "ratio": None,
        "allocation": "uniform",
        "rank_multiple": 1,
        "propagate": "original",
        "keep": [],
        "calibration": {"source": "wikitext2", "samples": 256, "length": 2048, "seed": 0, "held_out": 0, "chat": False},
        "gradients": {"labels": "sampled", "clip": [0.1, 10.0], "trim": 0.0, "seed": 0},
    }


def test_overrides_win_flags_over_set_over_file(write):
    name = write("method: asvd\nratio: 0.1\nsettings: {alpha: 0.3}\ncalibration: {source: pydoc, samples: 4}\n")
    recipe = load_recipe(
        name, {"ratio": 0.4, "calibration.seed": None}, ["ratio=0.2", "settings.alpha=0.7", "calibration.length=9"]
    )
    assert recipe.ratio == 0.4
    assert recipe.compression[1].alpha == 0.7
    calibration = recipe.calibration
    assert (calibration.source, calibration.samples, calibration.length, calibration.seed) == ("pydoc", 4, 9, 0)


def test_values_of_set_are_yaml():
    recipe = load_recipe("svd", settings=["keep=['*.k_proj', 'model.layers.0.*']", "rank_multiple=8", "propagate=compressed"])
    assert recipe.keep == ("*.k_proj", "model.layers.0.*")
    assert (recipe.rank_multiple, recipe.propagate) == (8, "compressed")


def test_all_mistakes_are_shown_together(write):
    name = write(
        "method: asvd\nratio: 40\nsetings: {}\nsamples: 4\npropagate: compresed\nkeep: '*.v_proj'\nrank_multiple: 0\n"
        "settings: {alfa: 1, alpha: much}\ncalibration: {source: wikitext2, sampels: 3, length: 1}\n"
    )
    found = problems(name, settings=("calibration.seed", "ratio.x=1", "keep=[", "=3"))
    for start in (
        "--set 'calibration.seed': write KEY=VALUE",
        "'ratio.x': 'ratio' is a value, not a mapping",
        "--set 'keep=[': the value is not YAML",
        "--set '=3': write KEY=VALUE",
        "settings.alpha: Input should be a valid number",
        "unknown key 'settings.alfa'. Did you mean 'alpha'?",
        "ratio: must lie in [0, 1). Did you mean 0.4?",
        "rank_multiple: Input should be greater than or equal to 1 (got 0)",
        "propagate: Input should be 'original' or 'compressed' (got 'compresed')",
        "keep: write a list of patterns: ['*.v_proj']",
        "calibration.length: Input should be greater than or equal to 2 (got 1)",
        "unknown key 'calibration.sampels'. Did you mean 'samples'?",
        "unknown key 'setings'. Did you mean 'settings'?",
        "unknown key 'samples'. Did you mean 'calibration.samples'?",
    ):
        assert any(line.startswith(start) for line in found), (start, found)
    assert len(found) == 14


@pytest.mark.parametrize(
    ("ratio", "hint"),
    [
        (40, "Did you mean 0.4?"),
        (2.5, "Did you mean 0.025?"),
        (1, "removes 40 %"),
        (-0.1, "removes 40 %"),
        (float("nan"), "0.4"),
    ],
)
def test_a_ratio_is_a_fraction(ratio, hint):
    (line,) = problems("svd", {"ratio": ratio})
    assert line.startswith("ratio: must lie in [0, 1)") and hint in line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("method: sdv\nsettings: {a: 1}\n", "method: there is no method 'sdv'. Did you mean 'svd'?"),
        ("ratio: 0.4\n", "'method' is missing"),
        ("method: svd\nsettings: {alpha: 1}\n", "unknown key 'settings.alpha'. It takes no settings."),
        ("method: svd\ncalibration: {source: wikitxt2}\n", "calibration.source: No source is called 'wikitxt2'. Did you mean"),
        ("method: svd\nratio: 0.2\nratio: 0.4\n", "not YAML: 'ratio' is given twice"),
        ("method: svd\ncalibration: {source: pydoc, seed: 1, seed: 2}\n", "not YAML: 'seed' is given twice"),
        ("method: [svd\n", "not YAML: while parsing a flow sequence"),
        ("- svd\n", "a recipe is a mapping of keys to values"),
        ("", "a recipe is a mapping of keys to values"),
        ("method: svd\n1: 2\n", "keys must be words"),
        ("method: svd\ncalibration:\n", "calibration: Input should be"),
        ("method: svd\nsettings: {1: 2}\n", "settings.1"),
        ("!!python/object/apply:os.system ['touch stung']\n", "not YAML: could not determine a constructor"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_the_users_words(text, line, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = problems(write(text))
    assert any(problem.startswith(line) for problem in found), found
    assert not Path("stung").exists()


def test_a_mistyped_recipe(tmp_path):
    with pytest.raises(RecipeError, match="Did you mean 'svd-llm'") as caught:
        load_recipe("svd-lm")
    assert caught.value.exit_code == 2
    with pytest.raises(RecipeError, match="no shipped recipe and no file"):
        load_recipe(str(tmp_path / "mine.yaml"))
    (tmp_path / "latin.yaml").write_bytes("method: svd # gew\xf6hnlich".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"latin.yaml.*\n.*cannot be read"):
        load_recipe(str(tmp_path / "latin.yaml"))


def test_identity_depends_on_meaning_not_on_spelling(write, tiny_checkpoints, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(tiny_text(4000))
    view = ModelView(locate(str(tiny_checkpoints("llama"))))

    def identity(recipe: str) -> dict:
        plan = make_draft(view, load_recipe(write(recipe)))
        return plan.identity(view.identity(), load_calibration(plan.recipe.calibration, view.location.tokenizer()))

    calibration = f"{{source: 'text:{text}', samples: 4, length: 32}}"
    one = identity(f"# Mine.\nmethod: asvd\nratio: 0.4\ncalibration: {calibration}\n")
    same = f"calibration: {{length: 32, seed: 0, samples: 4, source: 'text:{text}'}}\nsettings: {{alpha: 0.50}}\nratio: .40"
    assert identity(f"{same}\nkeep: []\nmethod: asvd # yours\n") == one
    assert identity(f"{same}\nkeep: ['*.v_proj']\nmethod: asvd\n") != one
    assert (
        identity(f"{same.replace('seed: 0', 'seed: 1')}\nmethod: asvd\n")["recipe"]["calibration"]["tokens"]
        != (one["recipe"]["calibration"]["tokens"])
    )


@pytest.mark.parametrize(
    ("name", "setting", "said"),
    [
        ("svd-llm+gptq", "steps.7.settings.bits=6", "'steps' has no entry '7'; it has entries 0 to 1"),
        ("svd-llm+gptq", "steps.-1.method=rtn", "'steps' has no entry '-1'"),
        ("svd-llm+gptq", "settings.bits=2", "settings are those of one method, and there is none here; write steps.0.settings"),
        ("svd-llm+gptq", "steps.².x=1", "'steps' has no entry '²'"),
        ("svd-llm", "depth.scor=sleb", "unknown key 'depth.scor'. Did you mean 'score'?"),
        ("svd-llm", "refine.blok=1", "unknown key 'refine.blok'. Did you mean 'block'?"),
        ("lrc-best-16", "refine.end-to-end.stepz=3", "unknown key 'refine.end-to-end.stepz'. Did you mean 'steps'?"),
        ("svd-llm", "limits={a: {mn: 0.4}}", "unknown key 'limits.a.mn'. Did you mean 'min'?"),
        ("svd-llm", "calibration.source=[{source: a, wight: 3}]", "'calibration.source.0.wight'. Did you mean 'weight'?"),
        ("svd-llm", "calibration.source=text:", "calibration.source: Input should be a valid string"),
        ("svd-llm", "samples=3", "Did you mean 'calibration.samples'?"),
        ("svd-llm", 'limits={"*q": {min: 0.5}, "*q": {max: 0.7}}', "'*q' is given twice"),
        ("svd-llm", 'limits={"*q": {rank: .nan}}', "limits.*q.rank: Input should be a finite number"),
        ("svd-llm", 'limits={"*q": {rank: true}}', "limits.*q.rank: must be a whole number from 1 on"),
        ("svd-llm", "keep=2024-13-45", "the value is not YAML: month must be in 1..12"),
        ("svd-llm", "calibration.samples=0x_", "the value is not YAML"),
        ("lrc-best-16", "refine.end-to-end.lr=.inf", "refine.end-to-end.lr: Input should be a finite number"),
    ],
)
def test_a_key_or_value_that_cannot_be_is_named_and_changes_nothing_else(name, setting, said):
    assert any(said in problem for problem in problems(name, settings=(setting,)))


def test_settings_beside_alternatives_are_told_where_to_go(write):
    own = write("alternatives: [{method: svd-llm}, {method: gptq}]\nallocation: kl\n")
    said = problems(own, settings=("settings.banana=2", "alternatives.7.settings.bits=6"))
    assert any("write alternatives.0.settings" in problem for problem in said)
    assert any("'alternatives' has no entry '7'; it has entries 0 to 1" in problem for problem in said)


@pytest.mark.parametrize("text", ["note: 2024-13-45\n", "keep: " + "[" * 3000])
def test_a_file_that_yaml_cannot_build(text, write):
    (problem,) = problems(write(text))
    assert problem.startswith("not YAML")


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ("[{method: gptq}, {method: svd-llm}]", "svd-llm cannot follow gptq"),
        ("[{method: svd-llm}, {method: svd-llm}]", "needs settings that fix its size"),
        ("[{method: svd-llm}, {method: compot}]", "needs settings that fix its size"),
    ],
)
def test_steps_that_do_not_fit_each_other_are_found_without_a_model(steps, said, write):
    assert any(said in problem for problem in problems(write(f"steps: {steps}\n")))
    mixed = f"alternatives: [{{steps: {steps}}}, {{method: svd}}]\nallocation: kl\n"
    assert any(said in problem for problem in problems(write(mixed)))
