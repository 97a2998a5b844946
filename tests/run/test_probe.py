"""Probes: divergences of models with one target compressed, in float32 at every dtype, in any number of passes."""

from __future__ import annotations

import copy

import pytest
import torch
from pipeline import compress

import lrc.model.ablation
import lrc.run.losses.probe
from lrc.checkpoint.hf_quantizer import open_model


@pytest.fixture
def watched(monkeypatch):
    """What probing found, and the forms that it put in place."""
    seen, run, made = {"forms": {}, "passes": 0}, lrc.run.losses.probe.Probing.run, lrc.run.losses.probe.forms_at

    def told(self, *arguments):
        seen["passes"], seen["probing"], seen["found"] = len(self._passes), self, run(self, *arguments)
        return seen["found"]

    def forms_at(unit, solution, choice):
        seen["forms"][unit.name, choice] = made(unit, solution, choice)
        return seen["forms"][unit.name, choice]

    monkeypatch.setattr(lrc.run.losses.probe.Probing, "run", told)
    monkeypatch.setattr(lrc.run.losses.probe, "forms_at", forms_at)
    return seen


@pytest.mark.parametrize("recipe", ["svd-llm", "basis-sharing"])
def test_passes_that_hold_few_variants_find_the_same(recipe, tiny_checkpoints, tiny_text_file, tmp_path, watched, monkeypatch):
    model, found = tiny_checkpoints("llama"), {}
    for states in (lrc.model.ablation.STATES, 1 << 18):
        monkeypatch.setattr(lrc.model.ablation, "STATES", states)
        compress(model, tmp_path / str(states), tiny_text_file, recipe, ratio=0.3, allocation="kl")
        found[watched["passes"]] = watched["found"]
    (one, whole), (several, parts) = sorted(found.items())
    assert one == 1 < several
    assert parts.keys() == whole.keys()
    assert all(parts[group] == pytest.approx(whole[group], rel=1e-4, abs=1e-7) for group in whole)


@pytest.mark.parametrize("recipe", ["svd-llm", "rtn"])
def test_a_16_bit_checkpoint_is_probed_in_float32(recipe, tiny_checkpoints, tiny_text_file, tmp_path, watched):
    """Small divergences are what bfloat16 would drown in its rounding."""
    model = tiny_checkpoints("llama")
    compress(model, tmp_path / "out", tiny_text_file, recipe, dtype=torch.bfloat16, ratio=0.4, allocation="kl")
    probing = watched["probing"]
    original = open_model(str(model), dtype=torch.float32)[0]
    tokens, compared = probing._tokens, 0
    for (name, choice), forms in watched["forms"].items():
        group = f"{next(iter(forms)).layer}.{next(iter(forms)).role}"
        option = next(index for index in watched["found"][group] if probing._options[name][index].choice == choice)
        changed = copy.deepcopy(original)
        for target, form in forms.items():
            changed.get_submodule(target.module).weight.data.copy_(form.stored(torch.bfloat16).stored(torch.float32).dense())
        with torch.no_grad():
            p, q = (torch.log_softmax(each(tokens).logits[:, 16:].double(), -1) for each in (original, changed))
        assert watched["found"][group][option] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=2e-3, abs=5e-6)
        compared += 1
    assert compared >= 7 * 3
