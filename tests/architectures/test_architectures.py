"""Every architecture works, or the plan refuses it with a reason: a sample here, all of them in `make architectures`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from commandline import lrc_ok, run_lrc
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lrc.checkpoint.location import locate
from lrc.model.view import ModelView

from .survey import NEAREST, STEPS, look_at, tiny_model, types, write_checkpoint

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
WORKING = [
    "bert",  # a head with a bias, layers that are an encoder's
    "cpmant",  # takes no embeddings in place of tokens
    "dbrx",  # gathers the tokens of an expert
    "deepseek_v4",  # routes by the tokens' numbers
    "glm4_moe",  # a router with a stored buffer
    "gpt_neo",  # masks as buffers
]
REFUSED = {
    "blt": "has no hidden_size",
    "gemma4_assistant": "transformers cannot build",
    "hrm_text": "calls layer 0 after 4 calls",
    "mllama": "or does not call that layer on text alone",
    "musicgen": "is an encoder-decoder",
    "xlm": "computes with weights outside",
}


def rows() -> dict[str, str]:
    """Type -> its row of the page."""
    return dict(re.findall(r"^\| `([^`]+)` (\|.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))


def test_the_page_lists_every_type_and_none_fails() -> None:
    assert sorted(rows()) == types()
    assert not [name for name, row in rows().items() if "fails" in row]


@pytest.mark.parametrize("model_type", WORKING)
def test_a_working_architecture(model_type: str, tmp_path: Path) -> None:
    assert look_at(model_type, tmp_path, [NEAREST, "svd-llm"]).steps == {NEAREST: "works", "svd-llm": "works"}
    assert "works" in rows()[model_type]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", WORKING)
def test_other_recipes(model_type: str, tmp_path: Path) -> None:
    assert look_at(model_type, tmp_path, ["gptq", "block-influence"]).sound


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_refused_architecture(model_type: str, tmp_path: Path) -> None:
    write_checkpoint(model_type, tmp_path)
    result = run_lrc("plan", tmp_path, "--recipe", "svd-llm", "--ratio", 0.3)
    assert result.code == 2
    assert REFUSED[model_type] in result.err
    assert REFUSED[model_type] in rows()[model_type]


def test_what_transformers_holds_in_float32_stays_so(tmp_path: Path) -> None:
    """A router's correction is a buffer in float32 in a bfloat16 checkpoint; rounded, it would choose other experts."""
    write_checkpoint("glm4_moe", tmp_path / "float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    wanted = {name: b for name, b in model.state_dict().items() if name.endswith("e_score_correction_bias")}
    assert wanted
    assert {buffer.dtype for buffer in wanted.values()} == {torch.float32}

    lrc_ok("compress", tmp_path / "model", *STEPS[NEAREST], "--out", tmp_path / "out")
    stored = {name: t for shard in (tmp_path / "out").glob("*.safetensors") for name, t in load_file(shard).items()}
    for name, buffer in wanted.items():
        assert torch.equal(stored[name], buffer)
        assert stored[name].dtype == torch.float32


def test_an_infinite_bound_is_no_damage(tmp_path: Path) -> None:
    from .tiny_configs import tiny_config

    model = tiny_model(tiny_config("glm4_moe"))
    router = next(module for module in model.modules() if hasattr(module, "e_score_correction_bias"))
    router.e_score_correction_bias[0] = float("-inf")  # an expert that is never chosen
    model.save_pretrained(tmp_path)
    view = ModelView(locate(str(tmp_path)))
    loaded = [view.load(name) for name in view.layer_names]
    bounds = [buffer for layer in loaded for name, buffer in layer.named_buffers() if name.endswith("e_score_correction_bias")]
    assert sum(int(bound.isinf().sum()) for bound in bounds) == 1
