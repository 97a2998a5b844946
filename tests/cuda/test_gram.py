"""The running gram: the error of float32, where TF32 loses three digits; exact products of 16-bit inputs."""

from __future__ import annotations

import pytest
import torch
from triton_here import DEVICE, INTERPRETED, require_triton

from lrc.calibrate import stats
from lrc.calibrate.stats import MeanOuter

require_triton()

from lrc.cuda.gram import gram_, reference, why_not  # noqa: E402


def activations(tokens, width, dtype):
    """Columns of very different sizes, as a model's channels are; not contiguous."""
    torch.manual_seed(width)
    spread = torch.logspace(-2, 2, width)
    return (torch.randn(tokens, 2 * width) * spread.repeat(2)).to(DEVICE, dtype)[:, ::2].mT.contiguous().mT


def worst(found, x, alpha=1.0):
    """The largest error relative to the norms of the two columns."""
    wide = x.double()
    norms = wide.square().sum(0).sqrt()
    return float(((found.double() - alpha * wide.T @ wide).triu().abs() / (alpha * norms[:, None] * norms)).max())


def rounded_to_tf32(x):
    return ((x.float().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize(("tokens", "width"), [(1, 7), (300, 70), (33, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_error_is_that_of_float32(tokens, width, dtype):
    x = activations(tokens, width, dtype)
    found = torch.full((width, width), torch.nan, device=DEVICE)
    gram_(found, x, 0.0, 0.5)  # with beta 0 what was there does not matter
    torch_s = torch.zeros(width, width, device=DEVICE)
    reference(torch_s, x, 0.0, 0.5)
    assert worst(found, x, 0.5) <= 2 * worst(torch_s, x, 0.5) + 1.2e-7
    if dtype == torch.float32:
        cut = rounded_to_tf32(x).double()
        tf32 = worst(0.5 * cut.T @ cut, x, 0.5)
        print(f"{tokens} x {width}: {worst(found, x, 0.5):.1e}, float32 {worst(torch_s, x, 0.5):.1e}, TF32 {tf32:.1e}")
        assert worst(found, x, 0.5) < tf32 / 100


def test_only_the_upper_triangle_is_written():
    before = torch.randn(150, 150, device=DEVICE)
    found, x = before.clone(), activations(40, 150, torch.float32)
    gram_(found, x, 0.25, 0.75)
    expected = 0.25 * before.double() + 0.75 * x.double().T @ x.double()
    torch.testing.assert_close(found.double().triu(), expected.triu(), rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    far = torch.ones(150, 150, device=DEVICE).tril(-128).bool()  # below the tiles of the diagonal
    assert torch.equal(found[far], before[far])


def test_no_tokens():
    found = torch.eye(5, device=DEVICE)
    gram_(found, torch.empty(0, 5, device=DEVICE), 1.0, 0.5)
    assert torch.equal(found.triu(), torch.eye(5, device=DEVICE))


def test_it_says_what_it_cannot_do():
    x = activations(4, 8, torch.float32)
    assert why_not(torch.zeros(8, 8, device=DEVICE), x) == ""
    assert "float32" in why_not(torch.zeros(8, 8, device=DEVICE, dtype=torch.float64), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_are_collected_by_it(dtype, monkeypatch):
    batches = [activations(tokens, 40, dtype) for tokens in (17, 1, 30)]
    plain, ours = MeanOuter(40, torch.device(DEVICE)), MeanOuter(40, torch.device(DEVICE))
    for batch in batches:
        plain.add(batch)
    monkeypatch.setitem(stats.GRAM_FROM, "float32" if dtype == torch.float32 else "16 bit", 1)
    for batch in batches:
        ours.add(batch)
    whole = torch.cat(batches).double()
    expected = whole.T @ whole / len(whole)
    size = expected.diag().sqrt()[:, None] * expected.diag().sqrt()
    for mean in (plain, ours):
        assert float(((mean.result().double() - expected) / size).abs().max()) < 2e-6
    assert ours.tokens == plain.tokens == len(whole)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter multiplies as float32 does")
@pytest.mark.gpu
def test_many_tokens_on_a_gpu():
    x = activations(65536, 512, torch.float32)
    found, torch_s = torch.zeros(512, 512, device=DEVICE), torch.zeros(512, 512, device=DEVICE)
    gram_(found, x, 0.0, 1.0)
    reference(torch_s, x, 0.0, 1.0)
    assert worst(found, x) <= 2 * worst(torch_s, x)
