"""What engines multiply by, without an engine: the matrices of a fused layer, and what is refused before a weight is read."""

from __future__ import annotations

import pytest
import torch

from lrc.compress.forms.base import Dense, LowRank
from lrc.compress.forms.dictionary import Dictionary
from lrc.compress.forms.grids import Grid
from lrc.compress.forms.product import Product
from lrc.compress.forms.pruned import Pruned
from lrc.compress.forms.quantized import Quantized, QuantizedLowRank
from lrc.errors import CheckpointError, RequestError
from lrc.serve.plugins import _refusing
from lrc.serve.result import Result, require_one_device, require_served, shards

WIDTH, ROWS = 64, (48, 16, 32)
NAMES = ["m.q_proj", "m.k_proj", "m.v_proj"]
GRID = Grid(4, 32)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def low_rank(rows: int, columns: int = WIDTH, rank: int = 7, bias: bool = False) -> LowRank:
    return LowRank(rand(rows, rank), rand(rank, columns), rand(rows) if bias else None)


def codes(rows: int, columns: int = WIDTH, bits: int = 4) -> Quantized:
    return Quantized.nearest(rand(rows, columns), Grid(bits, 32)).stored(torch.float32)


def quantized_factors(rows: int) -> Product:
    return Product(codes(rows, 8, 8), codes(8, WIDTH, 8), 8)


FORMS = {
    "different ranks": [low_rank(48, rank=20), low_rank(16, rank=5), low_rank(32, rank=9)],
    "one of each": [low_rank(48), Dense(rand(16, WIDTH)), codes(32)],
    "codes with corrections": [QuantizedLowRank(codes(rows), low_rank(rows, rank=4)) for rows in ROWS],
    "codes with quantized corrections": [QuantizedLowRank(codes(rows, bits=3), quantized_factors(rows)) for rows in ROWS],
    "quantized factors": [quantized_factors(rows) for rows in ROWS],
}


def result_of(forms: dict) -> Result:
    return Result({"quant_method": "lrc", "format_version": 1, "modules": {name: form.spec() for name, form in forms.items()}})


def filled(forms: list, dtype: torch.dtype = torch.float32, has_bias: bool = False):
    rows = [len(form.dense()) for form in forms]
    names = NAMES[: len(forms)]
    matrices = result_of(dict(zip(names, forms, strict=True))).matrices(names, WIDTH, rows, dtype, has_bias)
    for place, form in enumerate(forms):
        for path, tensor in form.tensors().items():
            if path != "bias" or not has_bias:
                matrices.fill(place, path, tensor)
    matrices.finish()
    return matrices


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_fused_layer_is_the_product_with_each_dense_matrix(name, compiled):
    x = rand(3, 5, WIDTH)
    expected = torch.cat([x.double() @ form.dense().double().T for form in FORMS[name]], dim=-1)
    matrices = filled(FORMS[name])
    product = torch.compile(matrices, fullgraph=True, backend="aot_eager", dynamic=True) if compiled else matrices
    with torch.inference_mode():
        assert float((product(x) - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("rows", [1, 100])
def test_packed_codes_compile_into_one_graph_for_few_and_many_rows(rows):
    """Whichever way the kernel goes is decided inside one operator: the graph is the same."""
    forms = [
        QuantizedLowRank(codes(rows).stored(torch.bfloat16), low_rank(rows, rank=4).stored(torch.bfloat16)) for rows in ROWS
    ]
    matrices = filled(forms, torch.bfloat16)
    x = rand(rows, WIDTH).bfloat16()
    with torch.inference_mode():
        plain = matrices(x)
        compiled = torch.compile(matrices, fullgraph=True, backend="aot_eager", dynamic=True)
        assert torch.equal(compiled(x), plain)
        expected = torch.cat([x.double() @ form.dense().double().T for form in forms], dim=-1)
        assert float((plain - expected).norm() / expected.norm()) < 0.02


def test_right_factors_are_in_memory_once():
    matrices = filled(FORMS["different ranks"])
    assert sum(parameter.numel() for parameter in matrices.parameters()) == sum(
        tensor.numel() for form in FORMS["different ranks"] for tensor in form.tensors().values()
    )


def test_the_channels_that_are_left_are_multiplied():
    kept = torch.arange(0, 48, 2)
    form = Pruned(Dense(rand(24, WIDTH)), kept, torch.arange(WIDTH), (48, WIDTH))
    x = rand(2, WIDTH)
    torch.testing.assert_close(filled([form])(x), x @ form.form.dense().T)


def test_a_bias_is_the_forms_own_only_where_the_layer_has_none():
    form, x = low_rank(48, bias=True), rand(2, WIDTH)
    product = x @ form.dense().T
    torch.testing.assert_close(filled([form])(x), product + form.bias)
    torch.testing.assert_close(filled([form], has_bias=True)(x), product)
    with pytest.raises(RequestError, match=r"'m\.q_proj' is stored as 'low-rank' without a bias"):
        filled([low_rank(48)], has_bias=True)


def test_a_tensor_that_is_missing_is_named():
    result = result_of({NAMES[0]: low_rank(48)})
    matrices = result.matrices(NAMES[:1], WIDTH, [48], torch.float32, False)
    matrices.fill(0, "weight", rand(7, WIDTH))
    with pytest.raises(CheckpointError, match=r"1 tensors .* 'm\.q_proj\.left' first"):
        matrices.finish()


@pytest.mark.parametrize(
    ("path", "tensor"), [("weight", rand(8, WIDTH)), ("scales", rand(48)), ("weight", torch.ones(7, WIDTH).byte())]
)
def test_a_tensor_that_does_not_fit_is_named(path, tensor):
    matrices = result_of({NAMES[0]: low_rank(48)}).matrices(NAMES[:1], WIDTH, [48], torch.float32, False)
    with pytest.raises(CheckpointError, match=rf"'m\.q_proj\.{path}'"):
        matrices.fill(0, path, tensor)


def test_steps_that_the_dtype_would_change_are_refused():
    form = codes(48)
    matrices = result_of({NAMES[0]: form}).matrices(NAMES[:1], WIDTH, [48], torch.float16, False)
    with pytest.raises(CheckpointError, match=r"does not hold exactly(.|\n)*float32"):
        matrices.fill(0, "scales", torch.full_like(form.scales.steps, 1e-9))


def test_forms_that_no_engine_multiplies_by_are_refused_at_once():
    dictionary = {"kind": "dictionary", "atoms": 8, "nonzeros": 96, "pattern": "free", "bias": False}
    inside = {"kind": "pruned", "rows": 8, "columns": 8, "form": {"kind": "shared-low-rank", "rank": 2, "bias": False}}
    assert Dictionary.kind == "dictionary"
    coded = {"kind": "encoded", "code": {"kind": "e8", "bits": 2, "state_bits": 0}, "seed": 1, "bias": False}
    named = ("'dictionary': 2 modules, a", "'encoded': 1 modules, e", "'shared-low-rank': 1 modules, c")
    with pytest.raises(RequestError, match="(?m)forms:" + "".join(rf"\n  - {each} first" for each in named) + "$") as error:
        Result({"modules": {"a": dictionary, "b": dictionary, "c": inside, "d": low_rank(4).spec(), "e": coded}})
    assert "--to dense" in str(error.value)


def test_what_the_engine_has_no_layer_for_is_refused():
    result = result_of(dict.fromkeys(NAMES, low_rank(16)))
    result.matrices(NAMES[:2], WIDTH, [16, 16], torch.float32, False)
    with pytest.raises(RequestError, match=r"1 compressed modules, m\.v_proj first"):
        result.require_taken()


def test_fused_matrices_must_agree_on_the_names_and_the_channels():
    result = result_of({NAMES[0]: quantized_factors(48), NAMES[1]: low_rank(16)})
    with pytest.raises(RequestError, match="quantized factors are in some of them only"):
        result.matrices(NAMES[:2], WIDTH, [48, 16], torch.float32, False)
    halves = {name: Pruned(Dense(rand(kept, WIDTH)), torch.arange(kept), torch.arange(WIDTH), (48, WIDTH))
              for name, kept in (("gate", 20), ("up", 24))}  # fmt: skip
    with pytest.raises(RequestError, match="different numbers of channels"):
        result_of(halves).matrices(["gate", "up"], WIDTH, [48, 48], torch.float32, False)


def test_types_devices_and_versions_that_were_not_tested_are_refused_by_name():
    with pytest.raises(RequestError, match="'gpt2' were not tested"):
        require_served("gpt2")
    with pytest.raises(RequestError, match="tensor parallel size is 2"):
        require_one_device(2, 1)

    class Base:
        __abstractmethods__ = frozenset({"from_config", "get_name"})

    with pytest.raises(RequestError, match=r"tested with vLLM 0\.32\.0; this is 9\.9\.9\.\npip install vllm==0\.32\.0"):
        _refusing(Base, "vLLM", "9.9.9", ("0.32.0",), "vllm").from_config({})


def test_the_matrices_of_a_layer_are_found_by_their_path():
    fused = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    assert shards("model.layers.0.self_attn.qkv_proj", fused) == [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    assert shards("model.layers.0.mlp.down_proj", fused) == ["model.layers.0.mlp.down_proj"]
