"""A wrong request is refused before a model, transformers or a text is read, with everything that is wrong with it."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys

import pytest
from commandline import lrc_ok, run_lrc

from lrc.checkpoint.location import Location
from lrc.errors import BudgetError, LrcError
from lrc.model.view import ModelView
from lrc.plan.load_recipe import load_recipe, shipped
from lrc.plan.planner import make_draft
from lrc.plan.recipes.amount import require_amount


@pytest.fixture
def no_model(monkeypatch):
    """Reading the configuration is the beginning of reading a model."""
    monkeypatch.setattr(Location, "config", lambda *_: pytest.fail("a model was read"))


def write_noise(path):
    path.write_bytes(random.Random(3).randbytes(300_000))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "there is no file"),
        (lambda path: path.write_text(""), "is empty"),
        (lambda path: path.write_text(" \n" * 50), "holds no text"),
        (write_noise, "no text"),
        (lambda path: path.write_bytes("naïve".encode("latin-1") * 9), "is not UTF-8 text"),
        (lambda path: path.mkdir(), "is a folder"),
    ],
)
@pytest.mark.parametrize("command", ["compress", "plan"])
def test_calibration_text_that_is_none_beside_a_missing_amount(command, make, said, tiny_checkpoints, tmp_path, no_model):
    make(tmp_path / "text.txt")
    result = run_lrc(
        command, tiny_checkpoints("llama"), "--recipe", "svd-llm", "--calibration", f"text:{tmp_path / 'text.txt'}"
    )
    assert (result.code, result.out) == (2, "")
    assert said in result.err and "Add --ratio" in result.err


def test_several_sources_and_a_missing_tokenizer_at_once(tiny_checkpoints, tmp_path, no_model):
    model = shutil.copytree(tiny_checkpoints("llama"), tmp_path / "model")
    for path in model.glob("*token*"):
        path.unlink()
    (tmp_path / "empty.jsonl").write_text("")
    mix = f"text:{tmp_path / 'gone.txt'}*0.5+jsonl:{tmp_path / 'empty.jsonl'}*0.5"
    result = run_lrc("compress", model, "--ratio", 0.3, "--calibration", mix)
    assert result.code == 2
    for said in ("gone.txt", "empty.jsonl is empty", "holds no tokenizer"):
        assert said in result.err


def test_a_hub_out_of_reach_stops_a_run_and_is_a_note_in_a_plan(tiny_checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    request = [tiny_checkpoints("llama"), "--recipe", "svd-llm", "--ratio", 0.3, "--length", 64]
    assert "note: Data set 'Salesforce/wikitext:wikitext-2-raw-v1' (train) is not available" in lrc_ok("plan", *request)
    with monkeypatch.context() as patched:
        patched.setattr(Location, "config", lambda *_: pytest.fail("a model was read"))
        result = run_lrc("compress", *request)
    assert result.code == 2 and "offline mode is set" in result.err and "pydoc" in result.err
    assert list(tmp_path.iterdir()) == []


def test_whether_a_recipe_names_an_amount_is_known_without_its_model(tiny_checkpoints):
    view = ModelView(Location("llama", tiny_checkpoints("llama")))

    def missing(check) -> bool:
        try:
            check()
        except BudgetError as error:
            return "How m" in error.what
        except LrcError:
            return False
        return False

    for name in shipped():
        recipe = load_recipe(name)
        assert missing(lambda: require_amount(recipe)) == missing(lambda: make_draft(view, recipe)), name  # noqa: B023
    assert missing(lambda: require_amount(load_recipe("svd-llm")))
    require_amount(load_recipe("svd-llm", {"ratio": 0.3}))


def test_a_wrong_request_loads_no_transformers(tiny_checkpoints, tmp_path):
    """How long it takes is measured by hand; why it is quick is asserted."""
    words = ["lrc", "compress", str(tiny_checkpoints("llama")), "--recipe", "svd-llm", "--calibration", "text:gone.txt"]
    program = (
        f"import sys\nsys.argv = {words}\nfrom lrc.cli import main\n"
        "try:\n    main()\nfinally:\n"
        "    print([name for name in ('transformers', 'datasets', 'rich.progress') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "gone.txt" in done.stderr and "Add --ratio" in done.stderr
    assert done.stdout.strip() == "[]"
