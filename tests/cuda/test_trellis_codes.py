"""Trellis codes read as they are stored against their values in float64: all bits, states and edges, few and many rows."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from graphs import graphs_of
from triton_here import DEVICE, DTYPES, TOLERANCE, error, require_triton

from lrc.compress.forms.base import build_module, fill_module
from lrc.compress.forms.codes import encoded, reading
from lrc.compress.forms.codes.code import BITS, TILE, Code, from_tiles
from lrc.compress.forms.codes.encoded import Encoded
from lrc.compress.forms.codes.tables import FACTOR, trellis_unit

require_triton()

from lrc.cuda.trellis_codes import (  # noqa: E402
    Trellis,
    dense_reference,
    reference,
    trellis_dense,
    trellis_product,
    why_not,
    why_not_product,
)

KINDS = [(bits, state_bits) for bits in BITS["trellis"] for state_bits in (6, 12, 16)]


def stored(bits, state_bits, tall, wide):
    torch.manual_seed(tall + bits)
    code = Code("trellis", bits, state_bits)
    packed = torch.randint(0, 256, (tall * wide, code.nbytes), dtype=torch.uint8)
    values = from_tiles(code.values(packed).view(tall, wide, TILE)).to(DEVICE)
    return Trellis(packed.flatten().to(DEVICE), trellis_unit(state_bits), tall, wide, bits, state_bits, FACTOR), values


@pytest.mark.parametrize(("bits", "state_bits"), KINDS)
@pytest.mark.parametrize(("tall", "wide"), [(3, 5), (17, 2), (1, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_matrix_written_out_is_that_of_the_code_to_the_last_bit(bits, state_bits, tall, wide, dtype):
    trellis, values = stored(bits, state_bits, tall, wide)
    assert torch.equal(trellis_dense(trellis, dtype), values.to(dtype))
    assert torch.equal(dense_reference(trellis, dtype), values.to(dtype))


@pytest.mark.parametrize(("bits", "state_bits"), KINDS)
@pytest.mark.parametrize(("tall", "wide"), [(2, 5), (1, 19)])
@pytest.mark.parametrize("tokens", [1, 3, 4])
def test_the_product(bits, state_bits, tall, wide, tokens):
    trellis, values = stored(bits, state_bits, tall, wide)
    for dtype in DTYPES:
        x = torch.randn(tokens, 32 * wide, dtype=dtype, device=DEVICE)[:, ::2]
        expected = x.double() @ values.double().T
        assert error(trellis_product(x, trellis), expected) <= TOLERANCE[dtype]
        torch.testing.assert_close(reference(x.double(), trellis), expected)


def test_it_says_what_it_cannot_do():
    trellis, _ = stored(2, 12, 1, 2)
    assert "more than 4 rows" in why_not_product(torch.randn(5, 32, device=DEVICE), trellis)
    assert "float64" in why_not(torch.randn(1, 32, device=DEVICE).double(), trellis)


def test_codes_may_begin_within_a_word():
    trellis, values = stored(3, 12, 2, 2)
    odd = torch.empty(1 + trellis.codes.numel(), dtype=torch.uint8, device=DEVICE)[1:].copy_(trellis.codes)
    assert torch.equal(trellis_dense(trellis._replace(codes=odd), torch.float32), values)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("tokens", [1, 4, 5, 300])
@torch.no_grad()
def test_a_module_multiplies_by_the_kernels(tokens, seed, monkeypatch):
    monkeypatch.setattr(reading, "has_numba", lambda: False)
    code = Code("trellis", 3, 12)
    codes = torch.randint(0, 256, (3, 5, code.nbytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    form = Encoded(code, codes, torch.rand(5) + 0.5, (40, 72), seed, bias=torch.randn(40)).stored(torch.float32)
    module = fill_module(build_module(form.spec(), 72, 40, torch.float32), form.tensors()).to(DEVICE)
    x = torch.randn(tokens, 72, device=DEVICE)
    expected = x.double() @ form.dense().double().to(DEVICE).T + module.bias.double()
    taken = []
    real = {name: getattr(encoded, name) for name in ("trellis", "trellis_matrix")}

    def noted(name, *args):
        y = real[name](*args)
        taken.append((name, y is not None))
        return y

    for name in real:
        monkeypatch.setattr(encoded, name, partial(noted, name))
    assert error(module(x), expected) <= 4 * TOLERANCE[torch.float32]
    if tokens <= 4:
        assert taken == [("trellis", True)]
    else:  # the matrix of very many rows is rotated back
        assert taken[-1] == ("trellis_matrix", True) and len(taken) == (1 if tokens == 300 and seed else 2)


@torch.no_grad()
def test_compiled_code_has_no_break_and_one_graph_for_all_lengths(monkeypatch):
    monkeypatch.setattr(reading, "has_numba", lambda: False)
    code = Code("trellis", 2, 12)
    module = build_module({"kind": Encoded.kind, "code": code.spec(), "seed": 3, "bias": False}, 64, 32, torch.float32)
    module.weight.random_(0, 256)
    module.scales.fill_(1.0)
    module.to(DEVICE)
    graphs = graphs_of(module, [torch.randn(tokens, 64, device=DEVICE) for tokens in (2, 3, 4)])
    assert len(graphs) == 1
    assert "lrc." in graphs[0].code, "the kernel is one operator of the graph"
