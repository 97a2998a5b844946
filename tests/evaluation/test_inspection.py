"""What `lrc inspect` says of a model, against the same numbers from the whole model in float64."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from commandline import run_lrc
from rich.console import Console
from tiny_gguf import write_tiny_gguf
from transformers import AutoModelForCausalLM

import lrc
from lrc.calibrate.data import CalibrationSpec, load_calibration
from lrc.checkpoint.location import Location
from lrc.commands.look.inspect_output import print_map
from lrc.compress.forms.base import linear_weight
from lrc.errors import NonFiniteError
from lrc.evaluation.spectrum import RATIOS, energies

SIZES = ("--samples", 8, "--length", 48)


def looked(model: Path, *flags: object) -> dict:
    done = run_lrc("inspect", model, "--json", "-", *flags)
    assert done.code == 0, done.err
    return json.loads(done.out)


def check(found: dict, singular: torch.Tensor, ranks: list[int], tolerance: float) -> None:
    """A spectrum in numbers against singular values (float64) from elsewhere.

    `tolerance` is relative to energies; of the largest singular value the smallest are known to its root.
    """
    share = singular.square() / singular.square().sum()
    entropy = -sum(p * math.log(p) for p in share.tolist() if p > 0)
    assert found["effective_rank"] == pytest.approx(math.exp(entropy), rel=tolerance)
    assert found["energy"] == pytest.approx([float(share[:rank].sum()) for rank in ranks], rel=tolerance)
    least = float(singular[0]) * tolerance**0.5
    for rank, value, kept in found["points"]:
        assert value == pytest.approx(float(singular[rank - 1]), rel=1e-3, abs=least)
        assert kept == pytest.approx(float(share[:rank].sum()), rel=tolerance)
    assert found["points"][0][0] == 1 and found["points"][-1][0] == len(singular)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3"])
def test_spectra_and_outliers_are_those_of_the_whole_model(family, tiny_checkpoints, tiny_text_file):
    """Plain spectra by `svdvals`; those of outputs from every token's input, collected by hooks in float64."""
    folder = tiny_checkpoints(family)
    found = looked(folder, "--calibration", f"text:{tiny_text_file}", *SIZES)
    spec = CalibrationSpec(source=f"text:{tiny_text_file}", samples=8, length=48)
    tokens = load_calibration(spec, Location("it", folder).tokenizer()).tokens
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    inputs: dict[str, list[torch.Tensor]] = {each["name"]: [] for each in found["matrices"]}
    for name in inputs:
        keep = inputs[name].append
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, keep=keep: keep(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(tokens)
    assert (found["samples"], found["ratios"], found["schema"]) == ([8, 48], list(RATIOS), 1)
    for each in found["matrices"]:
        weight = linear_weight(model.get_submodule(each["name"])).detach()
        x = torch.cat(inputs[each["name"]])
        assert (tuple(each["shape"]), each["tokens"]) == (tuple(weight.shape), 8 * 48)
        check(each["plain"], torch.linalg.svdvals(weight), each["ranks"], 1e-9)
        check(each["weighted"], torch.linalg.svdvals(x @ weight.T / len(x) ** 0.5)[: min(weight.shape)], each["ranks"], 1e-5)
        rms = weight.square().mean().sqrt()
        assert each["largest"] == pytest.approx(float(weight.abs().max() / rms), rel=1e-6)
        assert each["kurtosis"] == pytest.approx(float((weight / rms).pow(4).mean()), rel=1e-6)
        channels = x.square().mean(0)
        assert each["input_largest"] == pytest.approx(float((channels.max() / channels.mean()).sqrt()), rel=1e-3)


def test_ranks_are_those_that_a_plan_gives(tiny_checkpoints):
    found = {each["name"]: each["ranks"] for each in looked(tiny_checkpoints("mistral"))["matrices"]}
    for place, ratio in enumerate(RATIOS):
        steps = lrc.plan(tiny_checkpoints("mistral"), "svd", ratio=ratio).steps
        assert {step.target.name: step.choice.rank for step in steps} == {name: ranks[place] for name, ranks in found.items()}


def test_experts_are_looked_at_one_by_one(tiny_checkpoints, tiny_text_file):
    found = looked(tiny_checkpoints("mixtral"), "--calibration", f"text:{tiny_text_file}", *SIZES)
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoints("mixtral"), dtype=torch.float64)
    experts = [each for each in found["matrices"] if each["expert"] is not None]
    assert len(experts) == 3 * 4 * 2
    for each in experts:
        parameter, _, number = each["name"].rpartition(".")
        check(each["plain"], torch.linalg.svdvals(model.get_parameter(parameter)[int(number)].detach()), each["ranks"], 1e-9)
    for layer in range(3):  # every token reaches two of four experts
        assert sum(each["tokens"] for each in experts if each["layer"] == layer and "gate" in each["role"]) == 2 * 8 * 48


def test_an_expert_that_no_token_reached_has_no_outputs_to_look_at(tiny_checkpoints, tiny_text_file, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoints("mixtral"))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[0].zero_()
            layer.mlp.gate.weight[1:] = layer.mlp.gate.weight[1:].sign() * 0.0
            layer.mlp.gate.weight[2:, 0] = 50.0
            layer.mlp.gate.weight[:2, 0] = -50.0
    folder = shutil.copytree(tiny_checkpoints("mixtral"), tmp_path / "model")
    for file in folder.glob("model*"):
        file.unlink()
    model.save_pretrained(folder)
    flags = ("--calibration", f"text:{tiny_text_file}", "--samples", 1, "--length", 2)
    found = looked(folder, *flags)
    unseen = [each for each in found["matrices"] if not each["tokens"]]
    assert unseen and all(each["weighted"] is None and each["input_largest"] is None for each in unseen)
    shown = run_lrc("inspect", folder, *flags, "--html", tmp_path / "page.html")
    assert shown.code == 0 and f"no token reached {len(unseen)} of {len(found['matrices'])} targets" in shown.out
    assert unseen[0]["name"] in (tmp_path / "page.html").read_text()


def test_a_gguf_file_is_looked_at_as_it_is(tmp_path):
    found = looked(write_tiny_gguf(tmp_path / "tiny.gguf"))
    assert found["matrices"] and all(each["plain"]["effective_rank"] > 0 for each in found["matrices"])


def test_a_result_is_no_model_to_compress(tiny_checkpoints, tmp_path):
    assert (
        run_lrc("compress", tiny_checkpoints("llama"), "--recipe", "svd", "--ratio", 0.3, "--out", tmp_path / "out").code == 0
    )
    done = run_lrc("inspect", tmp_path / "out")
    assert done.code == 2 and done.out == ""


def test_a_matrix_of_zeros_and_a_gram_that_overflowed(tiny_checkpoints):
    from lrc.evaluation.spectrum import outliers, spectrum

    zeros = torch.zeros(6, 4)
    assert spectrum(energies(zeros), (1, 1, 0)).effective_rank == 0 and outliers(zeros).largest == 0
    with pytest.raises(NonFiniteError, match="not finite"):
        energies(torch.ones(3, 4), torch.full((4, 4), math.nan))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_it_fits_the_terminal_and_colours_can_be_switched_off(family, tiny_checkpoints, tiny_text_file, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    model = tiny_checkpoints(family)
    flags = ("--calibration", f"text:{tiny_text_file}", "--samples", 1, "--length", 24)
    coloured = run_lrc("inspect", model, *flags)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", coloured.out)
    assert coloured.code == 0 and "48;5;" in coloured.out
    assert max(map(len, plain.splitlines())) <= 80
    monkeypatch.setenv("NO_COLOR", "1")
    without = run_lrc("inspect", model, *flags).out
    assert "48;5;" not in without and plain.splitlines()[-4:] == re.sub(r"\x1b\[[0-9;]*m", "", without).splitlines()[-4:]


@pytest.mark.parametrize(("layers", "columns", "blocks"), [(30, 80, 1), (61, 80, 1), (80, 80, 2), (80, 160, 1), (126, 160, 1)])
def test_the_map_has_a_digit_for_every_layer_in_as_many_blocks_as_it_takes(layers, columns, blocks):
    rows = {"self_attn.q_proj": [layer / layers for layer in range(layers)], "mlp.up_proj": [None] * layers}
    written = io.StringIO()
    print_map(Console(file=written, width=columns, force_terminal=True, color_system=None), "it", rows, "rank")
    lines = written.getvalue().splitlines()
    assert max(map(len, lines[2:])) <= columns and len(lines) == 2 + 3 * blocks
    digits = "".join("".join(line[16:].split()) for line in lines if line.startswith("self_attn"))
    assert len(digits) == layers and digits == "".join(sorted(digits)) and digits[0] + digits[-1] == "09"


def test_the_page_has_every_figure_and_needs_no_network(tiny_checkpoints, tiny_text_file, tmp_path):
    done = run_lrc(
        "inspect",
        tiny_checkpoints("llama"),
        "--calibration",
        f"text:{tiny_text_file}",
        *SIZES,
        "--html",
        tmp_path / "page.html",
    )
    assert done.code == 0 and done.out.splitlines()[-1] == str(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    for name in ("energy-0.2", "energy-0.4", "energy-0.6", "effective-rank", "spectra", "largest", "input"):
        spec = re.search(rf'id="spec-{re.escape(name)}">(.*?)</script>', page)
        assert spec is not None and json.loads(spec[1])["data"]
    own = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert "http://" not in own and "https://" not in own and "src=" not in own
    assert "model.layers.2.mlp.down_proj" in own
