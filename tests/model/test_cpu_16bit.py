"""16-bit products by float32: as exact as instructions would make them, of every architecture, and only where needed."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import CONFIGS
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from lrc.model.machine import cpu_16bit, precision

SIXTEEN = [torch.bfloat16, torch.float16]


@pytest.fixture
def no_instructions(monkeypatch):
    """A processor that has no instructions for 16-bit numbers, whichever one runs the test."""
    monkeypatch.setattr(cpu_16bit, "slow_dtypes", lambda: frozenset(SIXTEEN))


@pytest.fixture
def all_instructions(monkeypatch):
    monkeypatch.setattr(cpu_16bit, "slow_dtypes", frozenset)


class Loops(TorchFunctionMode):
    """Names of the products that torch was given in 16 bits, of more rows than one."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in ("linear", "addmm", "mm", "bmm", "matmul", "__matmul__", "baddbmm", "_grouped_mm", "grouped_mm", "einsum"):
            factor = next(each for each in args if isinstance(each, torch.Tensor))
            if factor.dtype in SIXTEEN and factor.numel() > factor.shape[-1]:
                self.found.append(name)
        return function(*args, **(kwargs or {}))


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("rows", [(1,), (7,), (2, 5), ()])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("in_cache", [1, 200, 2**20])
def test_rounded_once(no_instructions, monkeypatch, dtype, rows, biased, in_cache):
    monkeypatch.setattr(cpu_16bit, "_IN_CACHE", in_cache)
    given = [torch.randn(*rows, 33, dtype=dtype), torch.randn(21, 33, dtype=dtype)]
    given += [torch.randn(21, dtype=dtype)] if biased else []
    wide = [each.double().requires_grad_() for each in given]
    exact = functional.linear(*wide)
    outward = torch.randn(exact.shape, dtype=dtype)
    gradients = torch.autograd.grad(exact, wide, outward.double())
    with precision.full_precision:
        plain = functional.linear(*given)
        for each in given:
            each.requires_grad_()
        found = functional.linear(*given)
        back = torch.autograd.grad(found, given, outward)
    assert found.dtype == dtype and torch.equal(plain, found)
    # half a last place of each number, for a norm of them all
    assert relative_error(found, exact) < torch.finfo(dtype).eps / 2
    for each, right in zip(back, gradients, strict=True):
        assert each.dtype == dtype and relative_error(each, right) < torch.finfo(dtype).eps / 2


def test_only_what_is_asked_for_gets_a_gradient(no_instructions):
    x, weight = torch.randn(4, 8).bfloat16().requires_grad_(), torch.randn(6, 8).bfloat16()
    with precision.full_precision:
        functional.linear(x, weight).sum().backward()
    assert x.grad is not None and weight.grad is None


def test_no_wide_copy_waits_for_the_gradient(no_instructions):
    x, weight = (torch.randn(9, 8).bfloat16().requires_grad_() for _ in range(2))
    kept: list[torch.Tensor] = []
    with precision.full_precision, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        functional.linear(x, weight)
    assert [each.data_ptr() for each in kept] == [x.data_ptr(), weight.data_ptr()]


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_a_product_with_an_added_matrix(no_instructions, dtype):
    bias, x, weight = torch.randn(5, dtype=dtype), torch.randn(7, 8, dtype=dtype), torch.randn(8, 5, dtype=dtype)
    exact = torch.addmm(bias.double(), x.double(), weight.double(), beta=0.5)
    with precision.full_precision:
        found = torch.addmm(bias, x, weight, beta=0.5)
        into = torch.empty(7, 5, dtype=dtype)
        assert torch.addmm(bias, x, weight, out=into) is into
    assert found.dtype == dtype and relative_error(found, exact) < torch.finfo(dtype).eps / 2


def test_autocast_rounds_factors_and_multiplies_in_float32(no_instructions):
    x, weight = torch.randn(7, 8), torch.randn(5, 8).requires_grad_()
    exact = functional.linear(x.bfloat16().double(), weight.detach().bfloat16().double())
    with precision.full_precision, torch.autocast("cpu", torch.bfloat16), Loops() as loops:
        found = functional.linear(x, weight)
    assert found.dtype == torch.bfloat16 and not loops.found
    assert relative_error(found, exact) < torch.finfo(torch.bfloat16).eps / 2
    found.float().sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32


def test_autocast_leaves_float64_alone(no_instructions):
    with precision.full_precision, torch.autocast("cpu", torch.bfloat16):
        assert functional.linear(torch.randn(4, 8).double(), torch.randn(6, 8).double()).dtype == torch.float64


def test_another_default_dtype_is_no_obstacle(no_instructions):
    x, weight = (torch.randn(9, 8).bfloat16().requires_grad_() for _ in range(2))
    torch.set_default_dtype(torch.bfloat16)
    try:
        with precision.full_precision:
            functional.linear(x, weight).sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert x.grad is not None and x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("family", CONFIGS)
def test_no_architecture_is_left_to_loops(no_instructions, tiny_checkpoints, family):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoints(family), dtype=torch.bfloat16)
    ids = torch.arange(3, 63).view(2, 30)
    with torch.no_grad():
        exact = copy.deepcopy(model).float()(ids).logits
        before = model(ids).logits
        with Loops() as loops:
            model(ids)
        assert loops.found  # as torch does it
        with precision.full_precision, Loops() as loops:
            found = model(ids).logits
    assert not loops.found
    assert found.dtype == torch.bfloat16 and relative_error(found, exact) < 1.5 * relative_error(before, exact)


def test_other_products_are_torchs_own(no_instructions):
    before = functional.linear, torch.addmm
    with precision.full_precision:
        for x in (torch.randn(4, 8), torch.randn(4, 8).double(), torch.empty(4, 8, device="meta", dtype=torch.bfloat16)):
            weight = torch.ones(6, 8).to(x)
            y = functional.linear(x, weight)
            assert (y.dtype, y.device, y.shape) == (x.dtype, x.device, (4, 6))
        with pytest.raises(RuntimeError, match="dtype"):
            functional.linear(torch.randn(4, 8).bfloat16(), torch.randn(6, 8))
        assert functional.linear is not before[0] and torch.addmm is not before[1]
    assert (functional.linear, torch.addmm) == before


def test_with_instructions_nothing_is_replaced(all_instructions):
    before = functional.linear, torch.addmm
    with precision.full_precision:
        assert (functional.linear, torch.addmm) == before


def test_a_subclass_decides_for_itself(no_instructions):
    class Packed(torch.Tensor):
        """As quantization libraries keep weights: its own cpu_16bit."""

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return "its own" if function is cpu_16bit._TORCH else super().__torch_function__(function, types, args, kwargs)

    layer = nn.Linear(8, 6).bfloat16()
    layer.weight = nn.Parameter(torch.randn(6, 8).bfloat16().as_subclass(Packed), requires_grad=False)
    with precision.full_precision:
        assert layer(torch.randn(4, 8).bfloat16()) == "its own"
