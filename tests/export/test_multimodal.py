"""Exports of multimodal results: the whole model in the class that config.json names, nothing but the text model changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures.survey import READING, write_checkpoint
from commandline import lrc_ok
from pipeline import IDS
from stock import stock_python

from lrc.errors import RequestError
from lrc.export.write import export

CODES = ["--set", "settings.group_size=16"]
RECIPES = {"svd-llm": ["--ratio", 0.3], "lqer": [*CODES, "--set", "settings.rank=4"], "rtn": CODES}
Made = Callable[[str, str], tuple[Path, Any]]


@pytest.fixture(scope="module")
def made(tiny_text_file, tmp_path_factory) -> Made:
    """(Family, recipe) -> a result, and the original model."""
    originals: dict[str, tuple[Path, Any]] = {}
    results: dict[tuple[str, str], Path] = {}

    def make(family: str, recipe: str) -> tuple[Path, Any]:
        if family not in originals:
            folder = tmp_path_factory.mktemp(family)
            originals[family] = folder, write_checkpoint(family, folder, whole=True)
        folder, source = originals[family]
        if (family, recipe) not in results:
            results[family, recipe] = out = tmp_path_factory.mktemp("result") / "out"
            asked = ["--recipe", recipe, *RECIPES[recipe], "--calibration", f"text:{tiny_text_file}", *READING]
            lrc_ok("compress", folder, *asked, "--out", out)
        return results[family, recipe], source

    return make


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize(
    ("to", "recipe"),
    [("dense", "svd-llm"), ("self-contained", "svd-llm"), ("compressed-tensors", "rtn"), ("compressed-tensors", "lqer")],
)
def test_an_export_opens_without_lrc_as_the_whole_model(to, recipe, made, tmp_path):
    if to == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    result, source = made("qwen2_vl", recipe)
    done = export(result, to, out=tmp_path / "export")
    kind = getattr(transformers, json.loads((result / "config.json").read_text())["architectures"][0])
    card = (done.folder / "README.md").read_text()
    assert "AutoModelForMultimodalLM" in card and "AutoProcessor" in card and "AutoModelForCausalLM" not in card
    opened = stock_python(
        """
        import sys, torch
        from transformers import AutoModelForMultimodalLM
        sys.modules["lrc"] = None
        trust = sys.argv[3] == "self-contained"
        model = AutoModelForMultimodalLM.from_pretrained(sys.argv[1], dtype=torch.float32, trust_remote_code=trust).eval()
        with torch.no_grad():
            torch.save(model(input_ids=torch.arange(3, 40)[None], use_cache=False).logits, sys.argv[2])
        """,
        done.folder,
        tmp_path / "logits",
        to,
    )
    assert opened.returncode == 0, opened.stderr
    expected = logits(kind.from_pretrained(result, dtype=torch.float32))
    assert float((torch.load(tmp_path / "logits") - expected).norm()) < 1e-5 * float(expected.norm())
    if to == "dense":
        found = kind.from_pretrained(done.folder).state_dict()
        seeing = {name: tensor for name, tensor in source.state_dict().items() if "visual" in name}
        assert seeing and all(torch.equal(found[name], tensor) for name, tensor in seeing.items())


def test_the_codes_of_a_multimodal_result_in_gptqs_format(made, tmp_path):
    done = export(made("qwen2_vl", "lqer")[0], "gptq", out=tmp_path / "export")
    assert done.difference is not None and done.difference < 1e-5


def test_modules_that_transformers_builds_otherwise_for_a_format_are_named(made):
    with pytest.raises(RequestError, match=r"replaces 4 modules.*feed_forward\.experts \(Llama4TextExperts\)"):
        export(made("llama4", "rtn")[0], "compressed-tensors")
