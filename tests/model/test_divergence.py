"""Divergences against float64, at the size of a real vocabulary."""

import pytest
import torch

import lrc.model.divergence
from lrc.model.divergence import Predictions, divergence


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [1e-3, 1e-2, 1.0])
def test_small_divergences_over_large_vocabularies(change, dtype):
    """1e-6 nats per token beside entropies of ten: the difference of two float32 sums is off by more than that."""
    generator = torch.Generator().manual_seed(0)
    original = (3 * torch.randn(2, 112, 50_000, generator=generator)).to(dtype)
    changed = (original.float() + change * torch.randn(original.shape, generator=generator)).to(dtype)
    p, q = (logits.double().log_softmax(-1) for logits in (original, changed))
    expected = float((p.exp() * (p - q)).sum())
    assert Predictions(original).divergence(changed) == pytest.approx(expected, rel=1e-2, abs=224 * 1e-7)
    assert Predictions(original).divergence(original) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_divergence_and_its_slope(dtype, monkeypatch):
    """In parts of 7 tokens, the last one short, against autograd in float64."""
    monkeypatch.setattr(lrc.model.divergence, "_AT_ONCE", 7 * 500)
    generator = torch.Generator().manual_seed(1)
    original, changed = (torch.randn(40, 500, generator=generator).to(dtype) for _ in range(2))
    theirs = changed.double().requires_grad_(True)
    p, q = original.double().log_softmax(-1), theirs.log_softmax(-1)
    expected = (p.exp() * (p - q)).sum()
    expected.backward()
    slope = torch.full_like(changed, torch.nan)
    assert divergence(original, changed, slope) == pytest.approx(expected.item(), rel=1e-5)
    assert divergence(original, changed) == pytest.approx(Predictions(original[None]).divergence(changed[None]), rel=1e-6)
    torch.testing.assert_close(slope.double(), theirs.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-6)
