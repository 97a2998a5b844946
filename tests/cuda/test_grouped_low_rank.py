"""The grouped low-rank product against float64: ranks off the tile, one row, empty members, strides, bias and residual."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from triton_here import DEVICE, DTYPES, TOLERANCE, error, require_triton

require_triton()

from lrc.cuda.grouped_low_rank import grouped_low_rank, reference, stack, why_not  # noqa: E402


def problem(rows, inputs, ranks, outs, dtype, added=True):
    torch.manual_seed(rows + inputs)
    size = {"dtype": dtype, "device": DEVICE}
    x = torch.randn(rows, 2 * inputs, **size)[:, ::2]  # not contiguous
    right = torch.randn(sum(ranks), inputs, **size) / inputs**0.5
    left = torch.randn(sum(out * rank for out, rank in zip(outs, ranks, strict=True)), **size) / 4
    bias = torch.randn(sum(outs), **size) if added else None
    residual = torch.randn(rows, sum(outs) + 3, **size)[:, 3:] if added else None
    return x, right, left, ranks, outs, bias, residual


def wide(arguments):
    return [value.double() if isinstance(value, torch.Tensor) else value for value in arguments]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5, 70])
@pytest.mark.parametrize(
    ("ranks", "outs", "inputs"),
    [([5, 0, 17], [9, 4, 11], 37), ([16], [24], 64), ([0], [5], 16), ([8, 24], [0, 7], 33)],
)
def test_it_is_the_product_of_each_member(rows, ranks, outs, inputs, dtype):
    given_ = problem(rows, inputs, ranks, outs, dtype, added=rows != 3)
    found = grouped_low_rank(*given_)
    assert found.shape == (rows, sum(outs)) and found.dtype == dtype
    assert error(found, reference(*wide(given_))) <= 2 * TOLERANCE[dtype]


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_sizes(data):
    members = data.draw(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), min_size=1, max_size=4))
    ranks, outs = [rank for rank, _ in members], [out for _, out in members]
    given_ = problem(data.draw(st.integers(1, 20)), data.draw(st.integers(1, 70)), ranks, outs, torch.float32)
    assert error(grouped_low_rank(*given_), reference(*wide(given_))) <= 2 * TOLERANCE[torch.float32]


def test_leading_dimensions_are_kept():
    x, *rest = problem(6, 32, [8], [12], torch.float32)
    rest[-1] = None
    assert torch.equal(grouped_low_rank(x.view(2, 3, 32), *rest), grouped_low_rank(x, *rest).view(2, 3, 12))


def test_stacked_factors_multiply_as_the_members():
    torch.manual_seed(0)
    rights = [torch.randn(rank, 24, device=DEVICE) for rank in (5, 16, 3)]
    lefts = [torch.randn(out, rank, device=DEVICE) for out, rank in ((7, 5), (9, 16), (4, 3))]
    x = torch.randn(3, 24, device=DEVICE)
    right, left, ranks = stack(rights, lefts)
    assert ranks == [16, 16, 16]
    expected = torch.cat([x.double() @ (b.double() @ a.double()).T for a, b in zip(rights, lefts, strict=True)], -1)
    assert error(grouped_low_rank(x, right, left, ranks, [7, 9, 4], None, None), expected) <= 2 * TOLERANCE[torch.float32]


def test_it_says_what_it_cannot_do():
    x, right, left, ranks, *_ = problem(2, 16, [4], [8], torch.float32)
    assert why_not(x, right, left, ranks) == ""
    assert "dtype" in why_not(x.half(), right, left, ranks)
    assert "gradient" in why_not(x.requires_grad_(), right, left, ranks)
