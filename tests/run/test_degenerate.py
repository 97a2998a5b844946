"""Models and texts at the edge of what numbers can do: results are finite, or the request is refused and says why."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import run_lrc
from safetensors.torch import load_file, save_file
from tiny import tiny_text

from lrc.checkpoint.location import locate
from lrc.errors import LrcError
from lrc.plan.load_recipe import load_recipe, shipped
from lrc.run.pipeline import run_request
from lrc.run.request import Request
from lrc.run.verify import verify

FIXED = {"energy", "laser", "utilized-rank", "welore"}  # whose settings decide the size
# less work where a method or a recipe repeats something
FEW = {"iterations": 1, "rounds": 1, "inner_rounds": 1, "refits": 1, "power_iterations": 1, "state_bits": 8}
TRAINING = {"steps": 2, "every": 1, "batch_tokens": 48, "length": 24}


def rank_one(rows: int, columns: int) -> torch.Tensor:
    return 0.1 * torch.randn(rows, 1) @ torch.randn(1, columns)


def mixed(weights: dict[str, torch.Tensor]) -> None:
    """Zero, rank-one and enormous matrices, channels that never fire."""
    weights["model.layers.0.self_attn.q_proj.weight"].zero_()
    weights["model.layers.1.mlp.gate_proj.weight"].copy_(rank_one(80, 48))
    weights["model.layers.1.self_attn.o_proj.weight"].copy_(rank_one(48, 64))
    weights["model.layers.1.self_attn.k_proj.weight"][2] = 1e4
    weights["model.layers.2.mlp.up_proj.weight"][3, 5] = 1e4
    weights["model.layers.2.input_layernorm.weight"][::3] = 0


def zero(weights: dict[str, torch.Tensor]) -> None:
    """Layers that do nothing at all."""
    for name, weight in weights.items():
        if name.startswith("model.layers.") and weight.ndim == 2:
            weight.zero_()


def loud(weights: dict[str, torch.Tensor]) -> None:
    """Activations of 10^4 in single channels."""
    weights["model.layers.1.input_layernorm.weight"][7] = 1e4
    weights["model.layers.2.post_attention_layernorm.weight"][3] = 1e4
    weights["model.embed_tokens.weight"][:, 5] *= 1e4


def sound(weights: dict[str, torch.Tensor]) -> None:
    """As it is."""


LONG, SAME = tiny_text(4000), "the" * 20_000
SITUATIONS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], None], str, int, int]] = {
    "mixed": (mixed, LONG, 4, 24),
    "zero": (zero, LONG, 4, 24),
    "loud": (loud, LONG, 4, 24),
    "one token again and again": (sound, SAME, 4, 24),
    "two tokens": (sound, LONG, 1, 2),
}


@pytest.fixture
def situation(tiny_checkpoints, tmp_path) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """A function of a situation's name: the model in it, and the recipe's keys for its text."""

    def make(name: str) -> tuple[Path, dict[str, Any]]:
        change, text, samples, length = SITUATIONS[name]
        model = tiny_checkpoints("llama", num_hidden_layers=4, tie_word_embeddings=False)
        folder = shutil.copytree(model, tmp_path / "model")
        with torch.random.fork_rng():
            torch.manual_seed(5)
            weights = {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
            change(weights)
        for file in folder.glob("*.safetensors"):
            save_file({key: weights[key] for key in load_file(file)}, file, metadata={"format": "pt"})
        (tmp_path / "text.txt").write_text(text)
        return folder, {
            "calibration.source": f"text:{tmp_path / 'text.txt'}",
            "calibration.samples": samples,
            "calibration.length": length,
        }

    return make


def quick_settings(name: str) -> dict[str, Any]:
    """Settings of a recipe for little work and a size that it can reach."""
    recipe, found = load_recipe(name), {}
    if recipe.method:
        known = recipe.compression[0].settings.model_fields
        found |= {f"settings.{key}": value for key, value in FEW.items() if key in known}
    if recipe.refine is not None and recipe.refine.end_to_end is not None:
        found |= {f"refine.end-to-end.{key}": value for key, value in TRAINING.items()}
    if recipe.calibration.held_out:
        found["calibration.held_out"] = 1
    if name not in FIXED:
        found["ratio"] = {"svd-llm+gptq": 0.75, "svd+lqer": 0.75, "lems": 0.4, "streamline": 0.25}.get(name, 0.5)
    return found


def finite(name: str, model: Path, text: dict[str, Any], out: Path) -> str:
    """Compress: 'made', and the result is sound; or 'refused', and nothing looks finished."""
    try:
        request = Request(locate(str(model)), load_recipe(name, quick_settings(name) | text))
        result = run_request(request, out)
    except LrcError:
        assert not (out / "config.json").exists()
        return "refused"
    verify(out)
    for target in result.targets:
        assert target.error is None or (math.isfinite(target.error) and target.error >= 0), target
        assert math.isfinite(target.damping), target
    return "made"


@pytest.mark.parametrize("name", ["svd-llm", "gptq", "nystrom", "qera", "compot", "block-influence"])
@pytest.mark.parametrize("case", ["mixed", "one token again and again"])
def test_what_is_degenerate_leaves_finite_results(name, case, situation, tmp_path):
    model, text = situation(case)
    assert finite(name, model, text, tmp_path / "out") == "made"


@pytest.mark.slow
@pytest.mark.parametrize("name", shipped())
@pytest.mark.parametrize("case", SITUATIONS)
def test_what_is_degenerate_leaves_finite_results_with_every_recipe(name, case, situation, tmp_path):
    model, text = situation(case)
    # a repair, a search and a refinement hold windows out, and there is one window of two tokens
    assert finite(name, model, text, tmp_path / "out") in (("made", "refused") if case == "two tokens" else ("made",))


def test_a_text_of_one_token_is_told_and_too_little_of_it_is_refused(situation, tmp_path):
    model, text = situation("one token again and again")
    told = ["compress", model, "--recipe", "svd-llm", "--ratio", 0.5, "--out", tmp_path / "out", "--calibration"]
    printed = run_lrc(*told, text["calibration.source"], "--samples", 2, "--length", 16)
    assert printed.code == 0 and "different tokens: their statistics say little" in printed.err
    (tmp_path / "short.txt").write_text("the owls")
    short = ["--set", f"calibration.source=text:{tmp_path / 'short.txt'}", "--length", 64]
    for sizes, message in ((["--samples", 1, "--length", 1], "length"), (short, r"tokens; a sample of length 64 needs 65")):
        refused = run_lrc(*told[:7], tmp_path / "other", *sizes)
        assert refused.code == 2 and message in refused.err
        assert not (tmp_path / "other").exists()


def test_sub_layers_are_found_whatever_the_weights_are(situation, tmp_path):
    model, text = situation("mixed")
    wanted = {"ratio": 0.2, "depth.loss_samples": 1, "depth.loss_length": 16}
    result = run_request(Request(locate(str(model)), load_recipe("finercut", wanted | text)), tmp_path / "out")
    assert result.record["depth"]["removed"]


@pytest.mark.parametrize("name", ["kfac", "finercut"])
def test_layers_that_do_nothing_have_no_gradient_and_are_compressed_all_the_same(name, situation, tmp_path):
    model, text = situation("zero")
    result = run_request(Request(locate(str(model)), load_recipe(name, quick_settings(name) | text)), tmp_path / "out")
    verify(tmp_path / "out")
    assert result.ratio >= 0.5
