"""Float32 products keep float32, whichever library computes them, and 16-bit attention is no worse than torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from lrc.evaluation.evaluate import evaluate
from lrc.model.machine import precision


def set_up() -> tuple[object, ...]:
    """What torch computes float32 products with, and transformers attention."""
    backends = torch.backends
    products = (backends.mkldnn.matmul, backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    return (*(each.fp32_precision for each in products), AttentionInterface()["sdpa"])


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("left", ["medium", "high", "highest"])
def test_float32_products_keep_float32(left, rows):
    torch.set_float32_matmul_precision(left)  # as a training script that is imported before might have left it
    a, b = torch.randn(rows, 576), torch.randn(576, 130)
    queries = torch.randn(1, 3, rows, 32)
    exact = functional.scaled_dot_product_attention(*[queries.double()] * 3)
    before = set_up()
    try:
        with precision.full_precision:
            assert relative_error(a @ b, a.double() @ b.double()) < 2e-6
            assert relative_error(functional.scaled_dot_product_attention(queries, queries, queries), exact) < 2e-6
        assert set_up() == before
    finally:
        torch.set_float32_matmul_precision("highest")


def test_all_is_put_back_by_the_last_one_out():
    before = set_up()
    with precision.full_precision:
        inside = set_up()
        with precision.full_precision:
            assert set_up() == inside
        assert set_up() == inside != before
    assert set_up() == before


def test_where_onednn_rounds_it_is_not_allowed_to(monkeypatch):
    monkeypatch.setattr(precision, "_onednn_keeps_float32", lambda: False)
    attention = AttentionInterface()["sdpa"]
    with precision.full_precision:
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee" and precision.float32_products() == "highest"
        assert AttentionInterface()["sdpa"] is attention


def test_a_product_that_rounds_is_found_out(monkeypatch):
    """As on processors with matrix tiles, where oneDNN takes the leave that it is given."""
    product = torch.Tensor.__matmul__

    def rounded(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Factors in bfloat16 where float32 is asked for."""
        return product(a.bfloat16().float(), b.bfloat16().float()) if a.dtype == torch.float32 else product(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert not precision._onednn_keeps_float32.__wrapped__()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("queries", [1, 300])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_as_exact_as_its_numbers(dtype, queries, masked):
    attend = precision.attention_by(AttentionInterface()["sdpa"])
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 3, True
    query = torch.randn(2, 6, queries, 32, dtype=dtype)
    key, value = torch.randn(2, 2, 2, 300, 32, dtype=dtype)
    mask = torch.randn(2, 1, queries, 300, dtype=dtype) if masked else None
    with precision.full_precision:
        found, _ = attend(module, query, key, value, mask)
    wide = [each.double().repeat_interleave(3, 1) for each in (key, value)]
    exact = functional.scaled_dot_product_attention(
        query.double(), *wide, mask.double() if masked else None, is_causal=not masked and queries > 1
    )
    assert found.dtype == dtype
    assert relative_error(found, exact.transpose(1, 2)) < 4 * torch.finfo(dtype).eps


def test_evaluation_says_what_computed_it(tiny_checkpoints, tiny_text_file):
    folder = tiny_checkpoints("llama")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    (result,) = evaluate(model, [f"text:{tiny_text_file}"], tokenizer=AutoTokenizer.from_pretrained(folder), length=32).results
    assert result.protocol["float32_matmul_precision"].startswith("highest")
