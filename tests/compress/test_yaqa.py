"""Error feedback on both sides of a weight, against the whole product written out in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import problem, statistics

from lrc.compress.base import get_method
from lrc.compress.forms.codes.code import TILE, Code, from_tiles
from lrc.compress.forms.codes.tables import scalar_levels
from lrc.compress.low_rank.kfac import shrunk
from lrc.compress.options import Choice, Shape
from lrc.compress.quantize.encoding.two_sided import encode_two_sided
from lrc.compress.quantize.gptq import compensator
from lrc.errors import NonFiniteError

CPU = torch.device("cpu")


def both(out_features: int, in_features: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight (out, in), the gram of its inputs, and that of gradients that differ in size and are correlated."""
    weight, x = problem(out_features, in_features, 300, seed)
    _, g = problem(3, out_features, 300, seed + 1)
    return weight, statistics(x).group.gram, g.T @ g / len(g)


def decoded(code: Code, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    tiles = code.values(codes.flatten(0, 1)).double().view(*codes.shape[:2], TILE)
    return from_tiles(tiles) * scales.repeat_interleave(16)


def nats(error: torch.Tensor, gram: torch.Tensor, gradients: torch.Tensor) -> float:
    return float(torch.einsum("ij,ik,kl,jl->", gradients, error, gram, error)) / 2


def test_each_tile_is_the_nearest_to_what_makes_its_part_of_the_error_nothing():
    """Sᵀ (W - Ŵ) R, a tile and what is above it and to its left: the continuous values that make it zero, rounded."""
    weight, gram, gradients = both(48, 32)
    inputs, outputs = compensator(gram, 0.01, False).factor, compensator(shrunk(gradients, 0.3), 0, False).factor
    code, levels = Code("scalar", 3), scalar_levels(3, CPU).double()
    codes, scales = encode_two_sided(weight, inputs, outputs, code)
    found = decoded(code, codes, scales)
    for row in range(0, 48, 16):
        for column in range(0, 32, 16):
            here = (slice(row, row + 16), slice(column, column + 16))
            known = torch.zeros(48, 32, dtype=torch.float64)
            known[: row + 16, : column + 16] = (weight - found)[: row + 16, : column + 16]
            known[here] = weight[here]
            left = (outputs.T @ known @ inputs)[here]  # of the error, with nothing in the tile
            wanted = torch.linalg.inv(outputs[here[0], here[0]]).T @ left @ torch.linalg.inv(inputs[here[1], here[1]])
            scale = scales[column // 16]
            nearest = levels[(wanted[..., None] / scale - levels).abs().argmin(-1)] * scale
            assert (nearest - found[here]).abs().max() < 1e-5 * float(scale)


@pytest.mark.parametrize("shape", [(96, 160), (70, 100), (16, 16), (5, 200), (200, 5), (1, 1)])
def test_scales_are_those_of_the_values_that_are_encoded(shape):
    """The error of the code alone, Mᵀ (W - Ŵ) N, is the distortion of the code at these scales: they were foretold well."""
    weight, gram, gradients = both(*shape, seed=3)
    inputs, outputs = compensator(gram, 0.01, False).factor, compensator(shrunk(gradients, 0.3), 0, False).factor
    code = Code("trellis", 3, 8)
    codes, scales = encode_two_sided(weight, inputs, outputs, code)
    found = decoded(code, codes, scales)[: shape[0], : shape[1]]
    own = lambda factor: torch.block_diag(*(factor[i : i + 16, i : i + 16] for i in range(0, len(factor), 16)))  # noqa: E731
    alone = torch.linalg.inv(own(outputs)).T @ outputs.T @ (weight - found) @ inputs @ torch.linalg.inv(own(inputs))
    share = alone.square().sum() / (scales.repeat_interleave(16)[: shape[1]].square() * shape[0]).sum()
    assert 0 < float(share) < (0.05 if min(shape) >= 70 else 0.5)


@pytest.mark.parametrize("code", ["trellis", "e8", "scalar"])
@pytest.mark.parametrize("shape", [(96, 64), (40, 100)])
def test_the_loss_is_in_nats_and_lower_than_by_the_inputs_alone(code, shape):
    weight, gram, gradients = both(*shape, seed=1)
    stats = replace(statistics(torch.eye(shape[1], dtype=torch.float64)), grad_gram=gradients)
    stats.group.gram = gram
    found = {}
    for name in ("yaqa", "trellis"):
        method = get_method(name)
        settings = method.settings(code=code, bits=3, **({"state_bits": 8} if code == "trellis" else {}))
        (option,) = method.options(Shape(*shape, 2), settings, 1)
        solution = method.solve(weight, stats, settings)
        form = solution.form(option.choice)
        assert form.stored(torch.bfloat16).nbytes == option.nbytes
        found[name] = nats(weight - form.dense(), gram, shrunk(gradients, 0.3))
        if name == "yaqa":
            assert solution.loss(option.choice) == pytest.approx(found[name], rel=1e-6)
            assert solution.total == pytest.approx(nats(weight, gram, shrunk(gradients, 0.3)), rel=1e-6)
    assert found["yaqa"] < found["trellis"]


@pytest.mark.parametrize("missing", ["inputs", "gradients", "both", "one of each"])
def test_what_was_never_seen(missing):
    """All-zero grams (an expert without tokens), and grams of rank one."""
    weight, gram, gradients = both(32, 48)
    if missing in ("inputs", "both"):
        gram = torch.zeros_like(gram)
    if missing in ("gradients", "both"):
        gradients = torch.zeros_like(gradients)
    if missing == "one of each":
        gram, gradients = torch.ones_like(gram), torch.ones_like(gradients)
    stats = replace(statistics(torch.eye(48, dtype=torch.float64)), grad_gram=gradients)
    stats.group.gram = gram
    method = get_method("yaqa")
    form = method.solve(weight, stats, method.settings(bits=4, state_bits=8)).form(Choice(bits=4))
    assert float((weight - form.dense()).square().sum() / weight.square().sum()) < 0.5


def test_zeros_stay_zeros_and_a_weight_that_is_not_finite_is_refused():
    _, gram, gradients = both(16, 32)
    stats = replace(statistics(torch.eye(32, dtype=torch.float64)), grad_gram=gradients)
    stats.group.gram = gram
    method = get_method("yaqa")
    settings = method.settings(bits=2, state_bits=8)
    assert not method.solve(torch.zeros(16, 32), stats, settings).form(Choice(bits=2)).dense().any()
    with pytest.raises(NonFiniteError, match="512 of 512 values"):
        method.solve(torch.full((16, 32), torch.nan), stats, settings)
