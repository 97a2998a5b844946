"""The forms' modules multiply by the kernels: the same numbers, codes as in the file, gradients and compiled code as before."""

from __future__ import annotations

import sys

import pytest
import torch
from graphs import graphs_of
from triton_here import DEVICE, TOLERANCE, error, require_triton

from lrc.compress.forms import kernels
from lrc.compress.forms.base import LowRank, build_module, fill_module, matrix_of
from lrc.compress.forms.dictionary import Dictionary, DictionaryLinear
from lrc.compress.forms.grids import Grid
from lrc.compress.forms.product import Product
from lrc.compress.forms.quantized import Quantized, QuantizedLinear, QuantizedLowRank

require_triton()

ROWS, COLUMNS = 11, 64


def forms():
    torch.manual_seed(0)
    weight, bias = torch.randn(ROWS, COLUMNS), torch.randn(ROWS)
    coded = Quantized.nearest(weight, Grid(4, 32, symmetric=False)).with_bias(bias)
    low_rank = LowRank(torch.randn(ROWS, 5), torch.randn(5, COLUMNS) / 9)
    factors = [Quantized.nearest(factor, Grid(8, 0)) for factor in (low_rank.left, low_rank.right)]
    mask = torch.rand(ROWS, 20) < 0.4
    four = torch.zeros(ROWS, 5, 4, dtype=torch.bool).index_fill_(2, torch.tensor([1, 2]), True).view(ROWS, 20)
    sizes = torch.randn(ROWS, 20), torch.randn(20, COLUMNS)
    return {
        "codes": coded,
        "exponents": Quantized.nearest(weight, Grid(6, 16, "mxint")),
        "codes + low rank": QuantizedLowRank(coded, low_rank),
        "codes + product of codes": QuantizedLowRank(coded, Product(*factors, rank=5)),
        "free dictionary": Dictionary.of(sizes[0], mask, sizes[1]).with_bias(bias),
        "2:4 dictionary": Dictionary.of(sizes[0], four, sizes[1], "2:4"),
        "low rank": LowRank(low_rank.left, low_rank.right, bias),
    }


def module_of(name, dtype=torch.float32):
    form = forms()[name].stored(dtype)
    module = build_module(form.spec(), COLUMNS, ROWS, dtype)
    return form, fill_module(module, form.tensors()).eval().to(DEVICE)


@pytest.mark.parametrize("name", forms())
@pytest.mark.parametrize("tokens", [1, 3, 20, 100])
@torch.no_grad()
def test_a_module_multiplies_by_its_matrix(name, tokens, monkeypatch):
    monkeypatch.setitem(kernels.UP_TO, "low-rank", 16)
    _, module = module_of(name)
    x = torch.randn(2, tokens, COLUMNS, device=DEVICE)[:, :tokens]
    expected = x.double() @ matrix_of(module, torch.float64).T
    bias = getattr(module, "bias", None)
    expected = expected if bias is None else expected + bias.double()
    assert error(module(x), expected) <= 4 * TOLERANCE[torch.float32]
    assert module(x[:, :0]).shape == (2, 0, ROWS)


def calls(module, x, monkeypatch, of):
    """How often the kernel's function is called."""
    seen = []
    real = getattr(kernels, of)
    for where in ("base", "quantized", "dictionary"):
        place = sys.modules[f"lrc.compress.forms.{where}"]
        if hasattr(place, of):
            monkeypatch.setattr(place, of, lambda *args: (seen.append(found := real(*args)), found)[1])
    module(x)
    return sum(found is not None for found in seen)


@torch.no_grad()
def test_kernels_are_taken(monkeypatch):
    x = torch.randn(1, COLUMNS, device=DEVICE)
    for name, of in (("codes", "coded"), ("codes + low rank", "coded"), ("free dictionary", "sparse")):
        assert calls(module_of(name)[1], x, monkeypatch, of) == 1, name
    assert calls(module_of("low rank")[1], x, monkeypatch, "low_rank") == 0, "not until it has been measured"
    monkeypatch.setitem(kernels.UP_TO, "low-rank", 1)
    assert calls(module_of("low rank")[1], x, monkeypatch, "low_rank") == 1


@pytest.mark.parametrize("name", ["codes", "codes + low rank", "free dictionary"])
@torch.no_grad()
def test_codes_stay_as_in_the_file(name):
    form, module = module_of(name)
    for tokens in (1, 100):
        module(torch.randn(tokens, COLUMNS, device=DEVICE))
    held = sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])
    assert held == sum(tensor.nbytes for tensor in form.tensors().values())
    if isinstance(module, DictionaryLinear):
        assert module._index is None and module._starts.nbytes == 4 * ROWS


def test_gradients_go_through_torch():
    _, module = module_of("codes + low rank")
    x = torch.randn(3, COLUMNS, device=DEVICE, requires_grad=True)
    module(x).sum().backward()
    assert error(x.grad, matrix_of(module, torch.float64).sum(0).expand(3, -1)) <= 4 * TOLERANCE[torch.float32]


@torch.no_grad()
def test_loading_other_codes_forgets_where_rows_began():
    _, module = module_of("free dictionary")
    x = torch.randn(1, COLUMNS, device=DEVICE)
    module(x)
    torch.manual_seed(5)
    support = module.mask()[torch.randperm(ROWS)]
    from lrc.compress.forms.dictionary import pack

    module.load_state_dict(module.state_dict() | {"support": pack(support.cpu(), "free").to(DEVICE)})
    expected = x.double() @ matrix_of(module, torch.float64).T + module.bias.double()
    assert error(module(x), expected) <= 4 * TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", ["codes + low rank", "free dictionary", "2:4 dictionary", "low rank"])
@torch.no_grad()
def test_compiled_code_has_no_break_and_one_graph_for_all_lengths(name, monkeypatch):
    monkeypatch.setitem(kernels.UP_TO, "low-rank", 64)
    monkeypatch.setitem(kernels.UP_TO, "dictionary", 64)
    _, module = module_of(name)
    module(torch.randn(1, COLUMNS, device=DEVICE))
    graphs = graphs_of(module, [torch.randn(tokens, COLUMNS, device=DEVICE) for tokens in (2, 3, 4)])
    assert len(graphs) == 1
    assert "lrc." in graphs[0].code, "the kernel is one operator of the graph"


@torch.no_grad()
def test_why_codes_are_not_multiplied_packed():
    _, module = module_of("codes")
    assert isinstance(module, QuantizedLinear)
    assert kernels.why_not_coded(module) == ""
    assert "float64" in kernels.why_not_coded(module.double())


@pytest.mark.gpu
@torch.no_grad()
def test_a_cuda_graph_captures_them():
    for name in ("codes + low rank", "free dictionary"):
        _, module = module_of(name, torch.bfloat16)
        x = torch.randn(1, COLUMNS, device=DEVICE, dtype=torch.bfloat16)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            module(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = module(x)
        x.normal_()
        graph.replay()
        torch.testing.assert_close(y, module(x))
