"""Products by packed codes against the matrix that the grid decodes, in float64: every number of bits, groups, shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from triton_here import DEVICE, DTYPES, TOLERANCE, error, require_triton

from lrc.compress.forms.grids import BITS, Grid
from lrc.compress.forms.quantized import Quantized

require_triton()

from lrc.cuda.packed_codes import Codes, codes_dense, codes_product, dense_reference, reference, why_not  # noqa: E402

GRIDS = [Grid(bits, 32, symmetric=False) for bits in BITS] + [
    Grid(4, 0),
    Grid(3, 64),
    Grid(2, 128, symmetric=False),
    Grid(4, 20, symmetric=False),  # groups that are no whole 32-bit words
    Grid(6, 16, "mxint"),
    Grid(8, 128),
]


def stored(grid, rows, columns):
    form = Quantized.nearest(torch.randn(rows, columns), grid).stored(torch.float32)
    tensors = {name: tensor.to(DEVICE) for name, tensor in form.tensors().items()}
    steps = tensors["exponents"] if grid.kind == "mxint" else tensors["scales"]
    codes = Codes(tensors["weight"], steps, tensors.get("zeros"), grid.bits, grid.width(columns), columns, rows)
    return codes, form.dense().double().to(DEVICE)


def check(grid, rows, columns, tokens, dtype, rank, added):
    torch.manual_seed(rows + columns)
    size = {"dtype": dtype, "device": DEVICE}
    codes, matrix = stored(grid, rows, columns)
    x = torch.randn(tokens, 2 * columns, **size)[:, ::2]
    right, left = torch.randn(rank, columns, **size) / 9, torch.randn(rows, rank, **size)
    bias = torch.randn(rows, **size) if added else None
    residual = torch.randn(tokens, rows + 1, **size)[:, 1:] if added else None
    assert why_not(x, codes, right, left) == ""
    expected = x.double() @ matrix.T + x.double() @ right.double().T @ left.double().T
    if bias is not None and residual is not None:
        expected += bias.double() + residual.double()
    found = codes_product(x, codes, right, left, bias, residual)
    assert found.dtype == dtype
    assert error(found, expected) <= 2 * TOLERANCE[dtype]
    torch.testing.assert_close(reference(x.double(), codes, *_wide(right, left, bias, residual)), expected)


def _wide(*tensors):
    return [None if tensor is None else tensor.double() for tensor in tensors]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "rank"), [(1, 5), (3, 0), (18, 5)])
def test_it_is_the_product_of_the_matrix(grid, dtype, tokens, rank):
    check(grid, 11, 77 if rank else 96, tokens, dtype, rank, added=tokens != 3)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_sizes(data):
    bits = data.draw(st.sampled_from(BITS))
    grid = Grid(bits, data.draw(st.sampled_from([0, 8, 32, 64])), symmetric=data.draw(st.booleans()))
    sizes = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 150)), data.draw(st.integers(1, 9))
    check(grid, *sizes, torch.float32, data.draw(st.integers(0, 35)), data.draw(st.booleans()))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("columns", [96, 77])
def test_the_matrix_written_out_is_the_grids(grid, columns):
    codes, matrix = stored(grid, 19, columns)
    assert torch.equal(dense_reference(codes, torch.float64), matrix)
    assert torch.equal(codes_dense(codes, torch.float32).double(), matrix.float().double())


def test_many_rows_and_columns_fill_several_tiles():
    check(Grid(4, 64, symmetric=False), 70, 320, 66, torch.float16, 40, added=True)


def test_it_says_what_it_cannot_do():
    codes, _ = stored(Grid(3, 20), 4, 60)
    x = torch.randn(1, 60, device=DEVICE)
    assert "groups of 20" in why_not(x, codes)
    codes, _ = stored(Grid(4, 32), 4, 64)
    assert "float64" in why_not(x.double(), codes)


def test_no_rows_and_no_tokens():
    codes, _ = stored(Grid(4, 32), 4, 64)
    assert codes_product(torch.randn(2, 0, 64, device=DEVICE), codes).shape == (2, 0, 4)
