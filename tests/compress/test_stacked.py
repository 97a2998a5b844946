"""Right factors of modules with one input in one product: the same numbers, and parameters that stay each module's own."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from pipeline import IDS, compress
from torch import nn
from transformers import AutoModelForCausalLM

from lrc.compress.forms.base import LowRankLinear
from lrc.compress.forms.stacked import FEW, Stack, stack_siblings


class Attention(nn.Module):
    """q, k and v read one input, o another of the same width."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, out, rank in (("q", 12, 5), ("k", 8, 3), ("v", 8, 2), ("o", 12, 4)):
            module = LowRankLinear(12, out, rank, bias=name == "k")
            for parameter in module.parameters():
                nn.init.normal_(parameter)
            self.add_module(name, module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(self.q(x) + torch.cat([self.k(x), self.v(x)[..., :4]], dim=-1))


@pytest.fixture
def stacked() -> tuple[Attention, Attention]:
    """A model that has found its stack, and the same without."""
    plain, model = Attention(), Attention()
    stack_siblings(model)
    with torch.no_grad():
        for _ in range(2):
            model(torch.ones(1, 12))
    assert isinstance(model.q.together, Stack) and model.q.together is model.v.together and model.o.together is None
    return plain, model


@torch.no_grad()
def same(plain: Attention, model: Attention, rows: int = 1) -> bool:
    x = torch.randn(1, rows, 12, dtype=model.q.weight.dtype)
    return torch.allclose(plain(x), model(x), atol=1e-5)


def products(model: nn.Module, x: torch.Tensor) -> int:
    """How many products a forward takes."""
    with torch.profiler.profile() as profile, torch.no_grad():
        model(x)
    return sum(event.count for event in profile.key_averages() if event.key == "aten::linear")


@pytest.mark.parametrize("rows", [1, 2, FEW, FEW + 1])
def test_one_product_gives_the_same_numbers(stacked, rows):
    plain, model = stacked
    assert all(same(plain, model, rows) for _ in range(3))
    assert products(plain, torch.ones(rows, 12)) == 8
    assert products(model, torch.ones(rows, 12)) == (6 if rows <= FEW else 8)


def test_another_input_is_never_answered_with_the_last_one(stacked):
    plain, model = stacked
    x, y = torch.randn(1, 12), torch.randn(1, 12)
    with torch.no_grad():
        model.q(x)
        assert torch.allclose(model.k(y), plain.k(y), atol=1e-5)
        model.q(x)
        x.mul_(2)  # changed in place, the same object
        assert torch.allclose(model.k(x), plain.k(x), atol=1e-5)
        assert torch.allclose(model.k(x), model.k(x))
    with torch.inference_mode():
        assert torch.allclose(model(x), plain(x), atol=1e-5)


def test_weights_stay_each_modules_own(stacked):
    plain, model = stacked
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name])
    other = {name: torch.randn_like(tensor) for name, tensor in plain.state_dict().items()}
    plain.load_state_dict(other)
    model.load_state_dict(other)  # into the views
    assert same(plain, model) and isinstance(model.q.together, Stack)
    for each in (plain, model):
        each.v.weight = nn.Parameter(torch.ones(2, 12))
    assert same(plain, model) and model.q.together is None
    again = copy.deepcopy(model)
    with torch.no_grad():
        again.q.weight.zero_()
    assert same(plain, model) and not same(plain, again)


def test_another_dtype_and_copies_give_the_stack_up(stacked):
    plain, model = stacked
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded, copied = torch.load(file, weights_only=False), copy.deepcopy(model)
    assert same(plain, loaded) and same(plain, copied) and copied.q.together is None and loaded.q.together is None
    assert same(plain.double(), model.double()) and model.q.together is None


def test_gradients_reach_every_factor(stacked):
    plain, model = stacked
    x = torch.randn(1, 12)
    for each in (plain, model):
        each(x).square().sum().backward()
    for one, two in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.allclose(one.grad, two.grad, atol=1e-4)
    torch.optim.SGD(model.parameters(), 0.01).step()
    torch.optim.SGD(plain.parameters(), 0.01).step()
    assert same(plain, model) and isinstance(model.q.together, Stack)


def test_a_loaded_model_generates_the_same_and_is_saved_as_it_was(tiny_checkpoints, tiny_text_file, tmp_path):
    compress(tiny_checkpoints("llama"), tmp_path / "out", tiny_text_file, "svd-llm", ratio=0.3)
    model, plain = (AutoModelForCausalLM.from_pretrained(tmp_path / "out") for _ in range(2))
    for module in plain.modules():
        module.together = None
    tokens = model.generate(IDS, max_new_tokens=6, do_sample=False)
    assert torch.equal(tokens, plain.generate(IDS, max_new_tokens=6, do_sample=False))
    stacks = {id(module.together): module.together for module in model.modules() if isinstance(module, LowRankLinear)}
    assert sum(isinstance(stack, Stack) for stack in stacks.values()) == 2 * len(model.model.layers)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    for (name, one), two in zip(plain.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    model.dequantize()
    assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False), tokens)
