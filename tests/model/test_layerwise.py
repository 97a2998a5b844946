"""The layer-wise forward: the model's own results, with the weights of one layer in memory at a time."""

from __future__ import annotations

import pytest
import torch

from lrc.checkpoint.hf_quantizer import open_model
from lrc.checkpoint.location import locate
from lrc.model.layerwise import layerwise
from lrc.model.lockstep import run_calls
from lrc.model.view import ModelView

CPU = torch.device("cpu")
IDS = [torch.arange(3, 40)[None], torch.arange(5, 29)[None].repeat(2, 1)]


def in_memory(view: ModelView) -> set[str]:
    return {name for name, parameter in view.model.named_parameters() if not parameter.is_meta}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("head", [True, False])
def test_results_are_the_models_own_and_one_layer_is_in_memory_at_a_time(family, head, tiny_checkpoints):
    folder = tiny_checkpoints(family)
    view, whole = ModelView(locate(str(folder))), open_model(str(folder))[0]
    with torch.no_grad(), layerwise(view, IDS, head=head) as forward:
        assert not in_memory(view)
        for turn in forward:
            with turn.loaded() as layer:
                assert {name.startswith(f"{turn.name}.") for name in in_memory(view)} == {True}
                turn.answer(run_calls(layer, turn.name, turn.calls, CPU))
            assert not in_memory(view)
        results = list(forward.results())
        assert not any(name.startswith(view.layers_path + ".") for name in in_memory(view))
        for ids, result in zip(IDS, results, strict=True):
            if head:
                assert torch.equal(result.logits, whole(ids).logits)
            else:
                decoder = whole.get_submodule(whole.base_model_prefix)
                assert torch.equal(result.last_hidden_state, decoder(ids).last_hidden_state)
    assert not in_memory(view)


def test_a_skipped_layer_does_nothing(tiny_checkpoints):
    view = ModelView(locate(str(tiny_checkpoints("llama"))))
    with torch.no_grad(), layerwise(view, IDS) as forward:
        for turn in forward:
            if turn.index == 1:
                before = [call.hidden for call in turn.calls]
                turn.answer(turn.passed_by())
                continue
            if turn.index == 2:
                assert all(torch.equal(call.hidden, state) for call, state in zip(turn.calls, before, strict=True))
                break
            with turn.loaded() as layer:
                turn.answer(run_calls(layer, turn.name, turn.calls, CPU))


def test_after_a_stop_or_an_error_nothing_stays_in_memory_and_layers_are_themselves(tiny_checkpoints):
    view = ModelView(locate(str(tiny_checkpoints("llama"))))
    with torch.no_grad(), layerwise(view, IDS) as forward:
        for turn in forward:
            assert turn.index == 0
            break

    def fail() -> None:
        with torch.no_grad(), layerwise(view, IDS) as forward, next(iter(forward)).loaded():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not in_memory(view)
    assert all("forward" not in vars(layer) for layer in view.layers)
