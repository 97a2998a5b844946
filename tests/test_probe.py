"""Probes: divergences of models with one target compressed, in float32 at every dtype, in any number of passes."""

from __future__ import annotations

import copy

import pytest
import torch
from pipeline import compress

import lrc.probe
import lrc.variants
from lrc.divergence import Predictions
from lrc.load import open_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [1e-3, 1e-2, 1.0])
def test_small_divergences_over_large_vocabularies(change, dtype):
    """1e-6 nats per token beside entropies of ten: the difference of two float32 sums is off by more than that."""
    generator = torch.Generator().manual_seed(0)
    original = (3 * torch.randn(224, 50_000, generator=generator)).to(dtype)
    changed = (original.float() + change * torch.randn(original.shape, generator=generator)).to(dtype)
    p, q = (logits.double().log_softmax(-1) for logits in (original, changed))
    expected = float((p.exp() * (p - q)).sum())
    assert Predictions(original).divergence(changed) == pytest.approx(expected, rel=1e-2, abs=224 * 1e-7)
    assert Predictions(original).divergence(original) == pytest.approx(0, abs=1e-9)


@pytest.fixture
def watched(monkeypatch):
    """What probing found, and the forms that it put in place."""
    seen, run, made = {"forms": {}, "passes": 0}, lrc.probe.Probing.run, lrc.probe.forms_at

    def told(self, *arguments):
        seen["passes"], seen["probing"], seen["found"] = len(self._passes), self, run(self, *arguments)
        return seen["found"]

    def forms_at(item, solution, choice):
        seen["forms"][item.name, choice] = made(item, solution, choice)
        return seen["forms"][item.name, choice]

    monkeypatch.setattr(lrc.probe.Probing, "run", told)
    monkeypatch.setattr(lrc.probe, "forms_at", forms_at)
    return seen


@pytest.mark.parametrize("recipe", ["svd-llm", "basis-sharing"])
def test_passes_that_hold_few_variants_find_the_same(recipe, tiny_checkpoints, tiny_text_file, tmp_path, watched, monkeypatch):
    model, found = tiny_checkpoints("llama"), {}
    for states in (lrc.variants.STATES, 1 << 18):
        monkeypatch.setattr(lrc.variants, "STATES", states)
        compress(model, tmp_path / str(states), tiny_text_file, recipe, ratio=0.3, allocation="kl")
        found[watched["passes"]] = watched["found"]
    (one, whole), (several, parts) = sorted(found.items())
    assert one == 1 < several
    assert parts.keys() == whole.keys()
    assert all(parts[unit] == pytest.approx(whole[unit], rel=1e-4, abs=1e-7) for unit in whole)


@pytest.mark.parametrize("recipe", ["svd-llm", "rtn"])
def test_a_16_bit_checkpoint_is_probed_in_float32(recipe, tiny_checkpoints, tiny_text_file, tmp_path, watched):
    """Small divergences are what bfloat16 would drown in its rounding."""
    model = tiny_checkpoints("llama")
    compress(model, tmp_path / "out", tiny_text_file, recipe, dtype=torch.bfloat16, ratio=0.4, allocation="kl")
    probing = watched["probing"]
    original = open_model(str(model), dtype=torch.float32)[0]
    tokens, compared = probing._tokens, 0
    for (name, choice), forms in watched["forms"].items():
        unit = f"{next(iter(forms)).layer}.{next(iter(forms)).role}"
        offer = next(index for index in watched["found"][unit] if probing._offers[name][index].choice == choice)
        changed = copy.deepcopy(original)
        for target, form in forms.items():
            changed.get_submodule(target.module).weight.data.copy_(form.stored(torch.bfloat16).stored(torch.float32).dense())
        with torch.no_grad():
            p, q = (torch.log_softmax(each(tokens).logits[:, 16:].double(), -1) for each in (original, changed))
        assert watched["found"][unit][offer] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=2e-3, abs=5e-6)
        compared += 1
    assert compared >= 7 * 3
