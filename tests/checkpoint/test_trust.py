"""Models whose code comes with the checkpoint: run only where they are trusted, and then all the way."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from commandline import lrc_ok, run_lrc
from transformers import AutoModelForCausalLM

CONFIGURATION = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own_llama"
"""
MODELLING = """
from pathlib import Path
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
from .parts_own import SCALE

Path({marker!r}).write_text("ran")

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        result = super().forward(*args, **kwargs)
        result.logits = result.logits * SCALE
        return result
"""
AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


@pytest.fixture(scope="module", autouse=True)
def modules_cache(tmp_path_factory):
    """One folder for all copies of such code: the package that holds them is imported once in a process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.path", list(sys.path))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield
        for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
            del sys.modules[name]


@pytest.fixture
def own(tiny_checkpoints, tmp_path):
    """(a checkpoint with code of its own, the file that this code writes when it runs)."""
    folder, marker = tmp_path / f"own_{tmp_path.name}", tmp_path / "ran"
    shutil.copytree(tiny_checkpoints("llama"), folder)
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(MODELLING.format(marker=str(marker)))
    (folder / "parts_own.py").write_text("SCALE = 0.5\n")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own_llama", "auto_map": AUTO_MAP}))
    return folder, marker


def compress(model, out, text, *more):
    return ("compress", model, "--recipe", "svd", "--ratio", 0.3, "--out", out, "--calibration", f"text:{text}",
            "--samples", 2, "--length", 32, *more)  # fmt: skip


def test_trusted_code_goes_all_the_way(own, tiny_checkpoints, tiny_text_file, tmp_path):
    model, marker = own
    out = tmp_path / "out"
    lrc_ok(*compress(model, out, tiny_text_file, "--trust-remote-code"))
    assert marker.exists()
    assert {"configuration_own.py", "modeling_own.py", "parts_own.py"} <= {path.name for path in out.iterdir()}
    lrc_ok("verify", out, "--trust-remote-code")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)(ids).logits
        lrc_ok(*compress(tiny_checkpoints("llama"), tmp_path / "plain", tiny_text_file))
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")(ids).logits
    assert torch.allclose(logits, plain * 0.5, atol=1e-6), "the checkpoint's own forward runs on the same factors"
    scores = tmp_path / "scores.json"
    lrc_ok("eval", out, "--tasks", f"text:{tiny_text_file}", "--length", 32, "--max-windows", 1, "--json", scores,
           "--trust-remote-code", "--allow-calibration-text")  # fmt: skip
    assert json.loads(scores.read_text())["results"]


def test_code_that_is_not_trusted_never_runs(own, tiny_text_file, tmp_path):
    model, marker = own
    result = run_lrc(*compress(model, tmp_path / "out", tiny_text_file))
    assert result.code == 2 and "--trust-remote-code" in result.err
    assert not marker.exists() and not (tmp_path / "out").exists()


def test_verifying_a_result_that_needs_its_code_says_so(own, tiny_text_file, tmp_path):
    model, marker = own
    lrc_ok(*compress(model, tmp_path / "out", tiny_text_file, "--trust-remote-code"))
    marker.unlink()
    result = run_lrc("verify", tmp_path / "out")
    assert result.code != 0 and "--trust-remote-code" in result.err
    assert not marker.exists()


def test_a_known_architecture_loses_the_code_that_was_not_trusted(own, tiny_text_file, tmp_path):
    """It was loaded by transformers' own classes: what points to code that is not copied would only mislead a loader."""
    model, marker = own
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    lrc_ok(*compress(model, tmp_path / "out", tiny_text_file))
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not list((tmp_path / "out").glob("*.py")) and not marker.exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
