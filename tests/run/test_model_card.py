"""The model card and the record of a result, as they are published."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from commandline import lrc_ok, run_lrc

from lrc.checkpoint.journal import without_paths
from lrc.plan.load_recipe import load_recipe

FRONT = """---
license: other
license_name: tiny-licence
language: [en]
pipeline_tag: text-generation
base_model: someone/elses
---
# Original
"""


@pytest.fixture
def published(tiny_checkpoints, tiny_text_file, tmp_path) -> tuple[Path, list[object]]:
    """A result of a model with a card and a licence, and its command."""
    model = shutil.copytree(tiny_checkpoints("llama", num_hidden_layers=2), tmp_path / "private" / "Tiny-1B")
    (model / "README.md").write_text(FRONT)
    (model / "LICENSE.txt").write_text("Do as you like.")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"_name_or_path": "maker/Tiny-1B"}))
    out = tmp_path / "out"
    command = ["compress", model, "--recipe", "svd-llm", "--ratio", 0.3, "--calibration", f"text:{tiny_text_file}",
               "--samples", 4, "--length", 48, "--out", out]  # fmt: skip
    lrc_ok(*command)
    return out, command


def test_nothing_of_the_machine_is_in_it(published, tiny_text_file, tmp_path):
    out, command = published
    for path in out.iterdir():
        data = path.read_bytes()
        assert str(tmp_path).encode() not in data and str(tiny_text_file.parent).encode() not in data, path.name
    record = json.loads((out / "lrc.json").read_text())
    assert record["model"]["name"] == "maker/Tiny-1B"
    assert record["calibration"]["provenance"][0]["source"] == f"text:{tiny_text_file.name}"
    assert "nothing to do" in lrc_ok(*command)
    lrc_ok("verify", out)
    other = [*command]
    other[other.index("--samples") + 1] = 5
    assert "recipe.calibration.samples: it has 4, you asked for 5" in run_lrc(*other).err


def test_the_card_says_what_a_reader_needs(published):
    card = (published[0] / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "maker/Tiny-1B" and front["license_name"] == "tiny-licence" and front["language"] == ["en"]
    assert "svd-llm" in front["tags"] and front["pipeline_tag"] == "text-generation"
    for said in ("# maker/Tiny-1B, compressed by lrc", "import lrc", "AutoTokenizer", "4 samples of 48 tokens", "transformers ",
                 "tiny-licence", "`LICENSE.txt`", 'lrc compress "maker/Tiny-1B" --recipe recipe.yaml'):  # fmt: skip
        assert said in card, said


def test_the_recipe_of_the_card_is_the_recipe(published, tmp_path):
    out, _ = published
    card = (out / "README.md").read_text()
    (tmp_path / "recipe.yaml").write_text(card.partition("```yaml\n")[2].partition("```")[0])
    recipe = load_recipe(str(tmp_path / "recipe.yaml"))
    assert recipe.resolved() == json.loads((out / "lrc.json").read_text())["recipe"]


def test_a_folder_that_was_tuned_from_another_model_is_not_called_by_that_models_name(tiny_checkpoints, tmp_path):
    model = shutil.copytree(tiny_checkpoints("llama", num_hidden_layers=2), tmp_path / "mine")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"_name_or_path": "maker/Tiny-1B"}))
    lrc_ok("compress", model, "--recipe", "svd", "--ratio", 0.3, "--out", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "mine"
    assert "name no licence" in card and "No calibration text" in card


@pytest.mark.parametrize(
    ("given", "published"),
    [
        ("text:/home/me/notes.txt", "text:notes.txt"),
        ("c4*0.5+text:~/a/b.txt*0.5", "c4*0.5+text:b.txt*0.5"),
        ("csv:rel/rows.csv:body", "csv:rows.csv:body"),
        ("hf:/data/set", "hf:set"),
        ("hf:allenai/c4", "hf:allenai/c4"),
        ("wikitext2", "wikitext2"),
        ("a text: with / in it", "a text: with / in it"),
    ],
)
def test_folders_of_sources_are_left_out(given, published):
    assert without_paths({"a": [given]}) == {"a": [published]}
