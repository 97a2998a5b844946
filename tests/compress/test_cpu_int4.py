"""Products by packed codes on the CPU: the numbers of the decoded matrix, and a checkpoint that is not touched by it."""

from __future__ import annotations

import copy

import pytest
import torch
from pipeline import compress, logits
from transformers import AutoModelForCausalLM

from lrc.compress.forms import quantized
from lrc.compress.forms.base import build_module, fill_module
from lrc.compress.forms.cpu import int4
from lrc.compress.forms.cpu.int4 import DENSE_FROM, available
from lrc.compress.forms.grids import Grid
from lrc.compress.forms.quantized import Quantized, QuantizedLinear

pytestmark = pytest.mark.skipif(not available(), reason="torch has no 4-bit kernel for this processor, or another layout")
GRIDS = [
    (Grid(4, 64, symmetric=False), 128, 192),
    (Grid(4, 32), 80, 96),  # rows that fill no block
    (Grid(3, 128, symmetric=False), 64, 256),
    (Grid(2, 0, symmetric=False), 65, 320),  # one group per row
    (Grid(8, 64, symmetric=False), 80, 128),
    (Grid(8, 32), 64, 96),
    (Grid(6, 128, symmetric=False), 64, 256),
    (Grid(5, 64), 70, 64),
    (Grid(4, 32, "mxint"), 64, 64),
    (Grid(8, 32, "mxint"), 96, 64),
]


def module_of(grid: Grid, rows: int, columns: int, bias: bool = True) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator)
    form = Quantized.nearest(weight, grid).with_bias(torch.randn(rows, generator=generator) if bias else None)
    stored = form.stored(torch.bfloat16)
    module = build_module(stored.spec(), columns, rows, torch.bfloat16)
    return fill_module(module, stored.tensors()).eval()


@pytest.mark.parametrize(("grid", "rows", "columns"), GRIDS)
@pytest.mark.parametrize("tokens", [1, 3, DENSE_FROM[2], DENSE_FROM[1] - 1, DENSE_FROM[1], DENSE_FROM[1] + 1])
def test_packed_products_are_those_of_the_matrix(grid, rows, columns, tokens):
    module = module_of(grid, rows, columns)
    matrix = module.matrix(torch.float64)
    x = torch.randn(2, tokens, columns, generator=torch.Generator().manual_seed(tokens)).bfloat16() / columns**0.5
    expected = x.double() @ matrix.T + module.bias.double()
    before = float((module(x).double() - expected).norm() / expected.norm())
    assert module.pack()
    with torch.no_grad():
        after = float((module(x).double() - expected).norm() / expected.norm())
    assert after < 1.5 * before + 2e-3
    assert torch.equal(module.matrix(torch.float64), matrix)
    assert module(x[:, :0]).shape == (2, 0, rows)


@pytest.mark.parametrize(("grid", "rows", "columns"), GRIDS)
def test_compiled_codes_are_decoded_as_by_torch_to_the_last_bit(grid, rows, columns, monkeypatch):
    pytest.importorskip("numba")
    module = module_of(grid, rows, columns)
    assert module.pack()
    monkeypatch.setattr(int4, "AT_ONCE", 64 * columns)
    by_torch = torch.cat(list(int4._decoded_tiles(module._packed))).transpose(1, 2).flatten(0, 1)
    by_numba = torch.cat(list(int4._compiled_blocks(module._packed)), 1).T
    assert torch.equal(by_torch[:rows], by_numba[:rows])
    x = torch.randn(DENSE_FROM[1], columns, dtype=torch.bfloat16)
    with torch.no_grad():
        monkeypatch.setattr(int4, "_ONE_DECODES", 1 << 10)
        compiled = module(x)
        monkeypatch.setattr(int4, "_ONE_DECODES", 0)
        torch.testing.assert_close(compiled, module(x), rtol=2e-2, atol=1e-2 * float(compiled.abs().max()))


@pytest.mark.parametrize(("grid", "rows", "columns"), [(Grid(4, 32, symmetric=False), 200, 64), (Grid(8, 64), 320, 64)])
def test_a_large_matrix_is_decoded_in_parts(grid, rows, columns, monkeypatch):
    module = module_of(grid, rows, columns)
    x = torch.randn(3, 40, columns, dtype=torch.bfloat16)
    with torch.no_grad():
        expected, whole = x @ module.matrix(torch.bfloat16).T + module.bias, module(x)
        for where in (int4, quantized):
            monkeypatch.setattr(where, "AT_ONCE", 2 * 64 * columns)
        close = {"rtol": 2e-2, "atol": 1e-2 * float(expected.abs().max())}
        torch.testing.assert_close(module(x), whole, **close)  # codes in their own order
        torch.testing.assert_close(module.float()(x.float()), x.float() @ module.matrix(torch.float32).T + module.bias)
        assert module.bfloat16().pack()
        torch.testing.assert_close(module(x), expected, **close)


@pytest.mark.parametrize(("grid", "rows", "columns"), GRIDS)
def test_whatever_needs_the_codes_gets_them_in_their_order(grid, rows, columns):
    module = module_of(grid, rows, columns)
    stored = copy.deepcopy(module.state_dict())
    assert module.pack()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, stored[name])
    assert module.weight.numel() == 0, "the codes are held once"
    if grid.kind == "int":
        assert module.scales.numel() == 0, "the steps are held once"
    again = copy.deepcopy(module)
    again.load_state_dict(stored)
    assert torch.equal(again.weight, stored["weight"])
    assert torch.equal(copy.deepcopy(module).train().weight, stored["weight"])
    held = list(again.parameters())
    assert again.pack() and all(one is two for one, two in zip(again.train().parameters(), held, strict=True))
    assert torch.equal(module.to(torch.float64).weight, stored["weight"]) and not list(module.buffers())
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor.to(stored[name].dtype), stored[name])


def test_gradients_go_through_the_matrix():
    module = module_of(*GRIDS[0])
    x = torch.randn(2, 192, dtype=torch.bfloat16, requires_grad=True)
    module(x).sum().backward()
    expected, x.grad = x.grad, None
    assert module.pack()
    module(x).sum().backward()
    assert torch.equal(x.grad, expected)


def test_no_kernel_no_packing():
    for grid, columns in ((Grid(4, 20), 60), (Grid(8, 48), 96), (Grid(4, 16, "mxint"), 64)):
        assert not module_of(grid, 64, columns).pack()
    assert not module_of(*GRIDS[0]).float().pack()  # torch's float32 kernel is a plain loop


def test_a_loaded_checkpoint_holds_its_codes_once_and_is_saved_as_it_was(tiny_checkpoints, tiny_text_file, tmp_path):
    changes = {"hidden_size": 64, "intermediate_size": 96, "dtype": torch.bfloat16}
    compress(tiny_checkpoints("llama", **changes), tmp_path / "out", tiny_text_file, "gptq", settings__group_size=32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    packed = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert len(packed) == 21 and all(module.weight.numel() == 0 for module in packed)
    on_disk = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert model.get_memory_footprint() < 1.2 * on_disk
    exact = logits(tmp_path / "out", torch.float32)
    assert float((logits(tmp_path / "out") - exact).norm()) < 0.03 * float(exact.norm())
    tokens = model.generate(torch.arange(3, 9)[None], max_new_tokens=6, do_sample=False)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again.generate(torch.arange(3, 9)[None], max_new_tokens=6, do_sample=False), tokens)
    for (name, one), two in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
