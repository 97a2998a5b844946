"""Sparse codes read as they are stored against their expansion in float64: both patterns, rows that begin within a byte."""

from __future__ import annotations

import pytest
import torch
from triton_here import DEVICE, DTYPES, TOLERANCE, error, require_triton

from lrc.compress.forms.dictionary import Dictionary

require_triton()

from lrc.cuda.sparse_codes import (  # noqa: E402
    Sparse,
    dense_reference,
    reference,
    sparse_dense,
    sparse_product,
    why_not,
    why_not_product,
)

SHAPES = [("free", 9, 37), ("free", 5, 64), ("free", 3, 700), ("free", 1, 1), ("2:4", 7, 36), ("2:4", 3, 64), ("2:4", 2, 600)]


def stored(pattern, rows, atoms, dtype=torch.float32):
    torch.manual_seed(rows * atoms)
    if pattern == "free":
        mask = torch.rand(rows, atoms) < 0.4
        mask[rows // 2] = False  # a row without codes
    else:
        kept = torch.rand(rows, atoms // 4, 4).topk(2).indices
        mask = torch.zeros(rows, atoms // 4, 4, dtype=torch.bool).scatter_(2, kept, True).view(rows, atoms)
    codes = (torch.randn(rows, atoms) * mask).to(dtype)
    form = Dictionary.of(codes, mask, torch.randn(atoms, 8), pattern)
    counts = mask.sum(1)
    starts = (counts.cumsum(0) - counts).int().to(DEVICE) if pattern == "free" else None
    return Sparse(form.values.to(DEVICE), form.support.to(DEVICE), starts, rows, atoms), codes.to(DEVICE)


@pytest.mark.parametrize(("pattern", "rows", "atoms"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_codes_written_out(pattern, rows, atoms, dtype):
    sparse, codes = stored(pattern, rows, atoms, dtype)
    assert torch.equal(sparse_dense(sparse), codes)
    assert torch.equal(dense_reference(sparse), codes)


@pytest.mark.parametrize(("pattern", "rows", "atoms"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 4])
def test_the_product(pattern, rows, atoms, dtype, tokens):
    sparse, codes = stored(pattern, rows, atoms, dtype)
    z = torch.randn(tokens, 2 * atoms, dtype=dtype, device=DEVICE)[:, ::2]
    added = tokens != 3
    bias = torch.randn(rows, dtype=dtype, device=DEVICE) if added else None
    residual = torch.randn(tokens, rows, dtype=dtype, device=DEVICE) if added else None
    expected = z.double() @ codes.double().T
    if bias is not None and residual is not None:
        expected += bias.double() + residual.double()
        torch.testing.assert_close(
            reference(z.double(), sparse._replace(values=sparse.values.double()), bias.double(), residual.double()), expected
        )
    assert error(sparse_product(z, sparse, bias, residual), expected) <= TOLERANCE[dtype]


def test_a_damaged_support_reads_no_foreign_memory():
    """More entries than values: those past the last value count as zero."""
    sparse, _ = stored("free", 4, 40)
    damaged = sparse._replace(support=torch.full_like(sparse.support, 255))
    assert sparse_dense(damaged).isfinite().all()
    assert int((sparse_dense(damaged) != 0).sum()) <= 4 * len(sparse.values)


def test_it_says_what_it_cannot_do():
    sparse, _ = stored("free", 4, 40)
    assert "more than 4 rows" in why_not_product(torch.randn(5, 40, device=DEVICE), sparse)
    assert "dtype" in why_not(torch.randn(1, 40, device=DEVICE).half(), sparse)
