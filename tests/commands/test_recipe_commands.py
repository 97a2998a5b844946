"""Choosing and writing a recipe: the list by family, a commented file, the schema, positions of mistakes, and differences."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from commandline import contents, lrc_ok, run_lrc

from lrc.commands.common.options import recipe_names
from lrc.plan.load_recipe import SCHEMA_FILE, SCHEMA_LINE, load_recipe, shipped
from lrc.plan.recipe import Recipe
from lrc.plan.recipes.new_recipe import documented, new_recipe, schema

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def test_the_list_is_by_family_and_says_where_to_start_and_what_each_needs():
    printed = lrc_ok("recipe", "list")
    assert printed.splitlines()[0] == "start here"
    assert [line.split()[0] for line in printed.splitlines()[1:4]] == ["lrc-fast", "lrc-best", "gptq"]
    entries = {entry["name"]: entry for entry in json.loads(run_lrc("recipe", "list", "--json", "-").out)}
    assert set(entries) == set(shipped())
    assert [name for name, entry in entries.items() if not entry["summary"].endswith(".")] == []  # a whole sentence
    families = {
        name: entries[name]["family"] for name in ("svd-llm", "rtn", "compot", "sleb", "svd+lqer", "lrc-best", "nystrom")
    }
    assert list(families.values()) == [
        "low rank", "quantized", "dictionary", "fewer layers", "two steps", "lrc's own", "pruned channels",
    ]  # fmt: skip
    assert entries["rtn"]["needs"] == ["no text"]
    assert entries["kfac"]["needs"] == ["text", "a forward pass", "a backward pass"]
    assert entries["svd-llm-sequential"]["needs"] == ["text", "two forward passes"]
    assert entries["lrc-best-16"]["needs"][-1] == "training"
    assert recipe_names("svd-llm") == sorted(name for name in shipped() if name.startswith("svd-llm"))


def test_every_key_is_documented_and_the_shipped_schema_is_that_of_the_recipe():
    """`lrc recipe schema > recipes/recipe.schema.json` writes it anew."""
    assert set(Recipe.model_fields) - set(documented(Recipe)) == set()
    assert json.loads((RECIPES / SCHEMA_FILE).read_text()) == schema() == json.loads(lrc_ok("recipe", "schema"))
    assert all(text.startswith(f"{SCHEMA_LINE}{SCHEMA_FILE}\n") for text in shipped().values())
    assert all("description" in part for part in schema()["properties"].values())


@pytest.mark.parametrize("name", ["lrc-best", "gptq", "laser", "prune+svd", "energy"])
def test_the_schema_takes_shipped_recipes_and_refuses_mistakes(name):
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(yaml.safe_load(shipped()[name]), schema())
    for wrong in ({"methd": "svd"}, {"method": "svd-lm"}, {"method": "svd", "calibration": {"sample": 3}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema())


@pytest.mark.parametrize("basis", [None, "lrc-best", "gptq"])
def test_a_new_recipe_names_every_key_and_is_one(basis, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lrc_ok("recipe", "new", "my.yaml", *(["--from", basis] if basis else []))
    text = Path("my.yaml").read_text()
    checked = yaml.safe_load(lrc_ok("recipe", "check", "my.yaml"))
    if basis:
        assert checked == yaml.safe_load(lrc_ok("recipe", "check", basis))
    amounts = {"ratio", "bits", "size", "max_ppl_increase"}
    for key in Recipe.model_fields:
        assert re.search(rf"^(# )?{key}:", text, re.MULTILINE) or key in amounts, key
    assert Path(text.splitlines()[0].removeprefix(SCHEMA_LINE)).name == SCHEMA_FILE
    refused = run_lrc("recipe", "new", "my.yaml")
    assert refused.code == 2 and "my.yaml exists" in refused.err and Path("my.yaml").read_text() == text


def test_what_is_commented_out_can_be_taken_in():
    examples = {
        key: yaml.safe_load(value)
        for key, value in re.findall(r"^# (steps|limits|depth|refine|alternatives|keep): (.*)$", new_recipe("x"), re.MULTILINE)
    }
    assert len(examples) == 6
    both = {"ratio": 0.3, "calibration.held_out": 4}
    for key in ("limits", "refine", "keep", "depth"):
        load_recipe("svd-llm", both | {key: examples[key]})
    for key in ("steps", "alternatives"):
        load_recipe("svd-llm", both | {key: examples[key], "allocation": "kl"}, ["method=null"])


def test_mistakes_have_their_places(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(
        "# mine\nratio: 40\nallocation: kl\nalternatives:\n  - method: svd-llm\n  - method: gptq\n    settings:\n"
        "      bitz: 4\n  - steps:\n      - method: nystrom\n      - method: gtpq\ncalibration:\n  source: pydoc\n    \n"
    )
    result = run_lrc("recipe", "check", own, "--set", "calibration.samples=0")
    assert result.code == 2
    assert f"{own}:2:1: ratio:" in result.err
    assert f"{own}:8:7: unknown key 'alternatives.1.settings.bitz'. Did you mean 'bits'?" in result.err
    assert f"{own}:11:9: alternatives.2.steps.1.method: there is no method 'gtpq'. Did you mean 'gptq'?" in result.err
    assert "  - calibration.samples: " in result.err, "a flag is in no file"
    own.write_text("method: svd\nratio: [0.3\n")
    assert f"{own}:3:1: not YAML" in run_lrc("recipe", "check", own).err


def test_a_check_shows_every_default(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("method: svd\nratio: 0.2\n")
    shown = yaml.safe_load(lrc_ok("recipe", "check", own))
    assert set(shown) == set(Recipe.model_fields) - {"steps", "alternatives"}
    own.write_text("alternatives: [{method: svd-llm}, {method: gptq}]\nallocation: kl\nratio: 0.2\n")
    assert set(yaml.safe_load(lrc_ok("recipe", "check", own))) == set(Recipe.model_fields) - {
        "method",
        "settings",
        "steps",
    }


def test_differences_of_two_recipes():
    said = json.loads(lrc_ok("recipe", "diff", "svd-llm", "svd-llm-sequential", "--json", "-"))
    assert said == {"propagate": {"first": "original", "second": "compressed"}}
    printed = lrc_ok("recipe", "diff", "svd-llm", "svd-llm-sequential")
    assert printed == 'propagate\n  svd-llm: "original"\n  svd-llm-sequential: "compressed"\n'
    assert "ask for the same" in lrc_ok("recipe", "diff", "svd", "svd")


def test_a_folder_is_no_recipe(tmp_path):
    (tmp_path / "folder").mkdir()
    result = run_lrc("recipe", "check", tmp_path / "folder")
    assert result.code == 2 and "it is a folder, not a recipe" in result.err


def test_the_record_of_a_result_repeats_its_run(tiny_checkpoints, tiny_text_file, tmp_path):
    model = tiny_checkpoints("llama", num_hidden_layers=2)
    told = ["--recipe", "svd-llm", "--ratio", 0.3, "--calibration", f"text:{tiny_text_file}", "--samples", 4, "--length", 48]
    lrc_ok("compress", model, "--out", tmp_path / "a", "--dtype", "bfloat16", *told)
    again = ["compress", model, "--out", tmp_path / "b", "--recipe", tmp_path / "a" / "lrc.json"]
    refused = run_lrc(*again)  # a record names no folder of the machine that made it
    assert refused.code == 2 and "there is no file" in refused.err
    lrc_ok(*again, "--calibration", f"text:{tiny_text_file}")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    folder = run_lrc("compress", model, "--recipe", tmp_path / "a", "--out", tmp_path / "c")
    assert folder.code == 2 and f"{tmp_path / 'a' / 'lrc.json'} repeats the run that made it" in folder.err
