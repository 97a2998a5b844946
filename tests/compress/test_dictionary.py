"""The dictionary form: packing, both forwards, bytes on disk and in a model; how it is learned is in test_sparse_coding.py."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from dictionaries import NAMES, options, solve
from pipeline import IDS, compress, place_of
from problems import problem, statistics
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lrc.checkpoint.hf_quantizer import open_model
from lrc.compress.dictionary import compot
from lrc.compress.dictionary.sparse_coding import MOST_OPTIONS
from lrc.compress.forms.base import build_module, fill_module
from lrc.compress.forms.dictionary import Dictionary, DictionaryLinear, pack, unpack
from lrc.compress.options import Shape
from lrc.run.verify import verify


@pytest.fixture(autouse=True)
def same_numbers_in_any_order() -> None:
    torch.manual_seed(0)


def some_form(pattern="free", out_features=13, in_features=9, atoms=8, seed=0) -> Dictionary:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(out_features, atoms, generator=generator)
    mask = compot.largest(codes, out_features * 3, "target", pattern)
    return Dictionary.of(codes * mask, mask, torch.randn(atoms, in_features, generator=generator), pattern)


def module_of(form: Dictionary) -> DictionaryLinear:
    with torch.device("meta"):
        empty = build_module(form.spec(), form.atoms.shape[1], form.out_features, form.atoms.dtype)
    return fill_module(empty, form.tensors())


# --- the form


@pytest.mark.parametrize("pattern", ["free", "2:4"])
@pytest.mark.parametrize("shape", [(1, 4), (7, 12), (13, 8), (33, 64)])
def test_packing_gives_back_the_support(pattern, shape):
    mask = compot.largest(torch.randn(shape), shape[0] * shape[1] // 3, "target", pattern)
    packed = pack(mask, pattern)
    assert packed.dtype == torch.uint8 and packed.numel() - mask.numel() / 8 < 8
    assert torch.equal(unpack(packed, *shape, pattern), mask)


def test_the_free_support_is_numpys_packbits():
    mask = torch.rand(5, 13) < 0.4
    expected = np.packbits(mask.numpy().flatten(), bitorder="little")
    assert np.array_equal(pack(mask, "free").numpy()[: len(expected)], expected)


def test_a_pattern_that_is_not_two_of_four_is_refused():
    with pytest.raises(ValueError, match="exactly two"):
        pack(torch.ones(2, 8, dtype=torch.bool), "2:4")


@pytest.mark.parametrize("pattern", ["free", "2:4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_both_forwards_are_the_dense_matrix(pattern, dtype):
    form = some_form(pattern).with_bias(torch.randn(13)).stored(dtype)
    module, x = module_of(form), torch.randn(2, 3, 9, dtype=dtype)
    expected = x.float() @ form.dense().float().T + form.bias.float()
    z = torch.nn.functional.linear(x, module.weight)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.2, torch.float16: 0.03}[dtype]
    assert torch.allclose(module.gather(z).float(), expected, atol=tolerance)
    assert torch.allclose(module.multiply(z).float(), expected, atol=tolerance)
    assert torch.allclose(module(x).float(), expected, atol=tolerance)
    assert torch.equal(module.matrix(dtype), form.dense())
    assert torch.allclose(module.gather(z[0, :1]).float(), expected[0, :1], atol=tolerance)  # one token has code of its own
    assert module.gather(z[:0]).shape == module.multiply(z[:0]).shape == (0, 3, 13)


def test_gradients_agree_between_both_forwards():
    module = module_of(some_form())
    module.values.requires_grad_(True)
    z = torch.randn(4, 8)
    found = []
    for forward in (module.gather, module.multiply):
        module.zero_grad()
        forward(z).square().sum().backward()
        found.append(module.values.grad.clone())
    assert torch.allclose(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_a_cast_leaves_the_support_alone():
    module = module_of(some_form())
    before = module.matrix(torch.float32)
    assert module.to(torch.bfloat16).support.dtype == torch.uint8
    assert torch.allclose(module.matrix(torch.float32), before, atol=0.1)


@pytest.mark.parametrize("settings", [{}, {"pattern": "2:4"}, {"atoms_per_nonzero": "auto"}, {"share": "row"}])
@pytest.mark.parametrize("shape", [(40, 26), (26, 40), (31, 31)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_file_has_the_bytes_of_its_option(settings, shape, dtype, tmp_path):
    weight, x = problem(*shape, tokens=100)
    weight = weight.to(dtype)
    element = weight.element_size()
    found = options("compot", Shape(*shape, element), **settings)
    solution = solve("compot", weight, statistics(x), iterations=2, refits=1, **settings)
    for option in found[:: max(1, len(found) // 3)]:
        form = solution.form(option.choice).stored(dtype)
        save_file(form.tensors(), tmp_path / "form.safetensors")
        with safe_open(tmp_path / "form.safetensors", "pt") as file:
            slices = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118
        assert sum(t.numel() * t.element_size() for t in slices) == form.nbytes == option.nbytes


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "shape", [(576, 576), (192, 576), (1536, 576), (576, 1536), (4096, 14336), (14336, 4096), (1, 12), (12, 1)]
)
def test_options_ascend_stay_below_the_dense_bytes_and_are_few(name, shape):
    for element in (2, 4):
        dense = Shape(*shape, element)
        found = options(name, dense)
        assert len(found) <= MOST_OPTIONS
        assert all(a.nbytes < b.nbytes for a, b in pairwise(found))
        assert all(o.nbytes < dense.nbytes and 1 <= o.choice.nonzeros <= o.choice.atoms for o in found)
    if min(shape) > 100:
        gaps = [b.nbytes - a.nbytes for a, b in pairwise(found)]
        assert max(gaps) < 0.02 * dense.nbytes and found[-1].nbytes > 0.97 * dense.nbytes


def test_an_orthogonal_dictionary_is_clipped_and_the_surplus_goes_to_nonzeros():
    largest = options("compot", Shape(1536, 576, 2))[-1].choice
    assert largest.atoms == 576 and largest.nonzeros > 288


# --- through the pipeline

RUNS = {
    "compot": {},
    "compot 2:4": {"settings.pattern": "2:4", "settings.atoms_per_nonzero": 2.0},
    "cospadi": {"settings.iterations": 2},
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_an_artifact_loads_and_multiplies_as_its_dense_matrices_do(
    run, family, tiny_checkpoints, tiny_text_file, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    model = tiny_checkpoints(family)
    plan = compress(model, out, tiny_text_file, run.split()[0], ratio=0.3, **RUNS[run])
    shards = verify(out)["shards"]
    tensors = {k: v for shard in shards for k, v in load_file(out / shard).items()}
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == plan.whole_after
    small, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    original, _ = open_model(str(model))
    found = {path: m for path, m in small.named_modules() if isinstance(m, DictionaryLinear)}
    assert found
    with torch.no_grad():
        for path, module in found.items():
            place_of(original, path.replace("_forms.", "."))[1].copy_(module.matrix(torch.float32))
        small.eval()
        expected = original(IDS).logits
        assert torch.allclose(small(IDS).logits, expected, atol=1e-4)
        monkeypatch.setattr("lrc.compress.forms.dictionary.GATHER_UP_TO", 0)  # and by expanding
        assert torch.allclose(small(IDS).logits, expected, atol=1e-4)
    half = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    kinds = {m.support.dtype for m in half.modules() if isinstance(m, DictionaryLinear)}
    assert half.dtype == torch.bfloat16 and kinds == {torch.uint8}
    small.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, small(IDS).logits)
