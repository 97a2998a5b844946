"""End-to-end refinement: the last step of a run trains the stored parameters towards the original's predictions.

The original runs once more, layer by layer, and its last hidden states are written to disk. The compressed model's output head,
which is the same, computes the original's logits from them. Then the whole compressed model is loaded and trained
(refine/objectives.py), and the shards are written again. After every evaluation on held-out text the state of the training is
written to disk, so that a killed run continues from there.

Memory: the compressed model + 12 bytes per trained number (16 where it is stored in 16 bits) + the best values so far + the
activations and logits of one step. Time: some four forwards of the model per trained token, three without gradient
checkpointing.

Source: KL to the original's logits on the factors alone, a few dozen steps: level 3 of three-level compression ("Per-Matrix
Optimality Is Not Enough", 2026), with the divergence in place of the text's own next tokens, which generalises better.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..calibrate.layerwise import run_batches
from ..calibrate.packing import token_hash
from ..checkpoint.architecture import without_head
from ..checkpoint.artifact import Artifact
from ..checkpoint.atomic import checked_tensors, write_tensors, writing
from ..checkpoint.folder import UNCHECKED
from ..checkpoint.hf_quantizer import install_stored
from ..checkpoint.location import Location
from ..errors import CheckpointError
from ..model.events import Event, Notify
from ..model.layerwise import layerwise
from ..model.view import ModelView
from .objectives import EndToEndSettings, Teaching, refine_end_to_end
from .trainer import Refinement, TrainingState, Windows, trainable

_TEACHER = "teacher.safetensors"
_STATE = "state.safetensors"


class Distillation:
    """One refinement of a compressed model against its original.

    Args:
        folder: for the original's hidden states and the state of the training, until the run is finished.
        settings: of the training.
        windows: calibration samples, which are cut to the length of the settings, and held-out windows.
    """

    def __init__(self, folder: Path, settings: EndToEndSettings, windows: Windows) -> None:
        self._folder, self._settings = folder, settings
        samples = windows.train
        length = min(settings.length or samples.shape[1], samples.shape[1])
        whole = samples[:, : samples.shape[1] // length * length]
        self._train, self._held = list(torch.cat(whole.split(length, dim=1)).split(1)), list(windows.held_out.split(1))
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def watch_original(self, view: ModelView, devices: Sequence[torch.device]) -> None:
        """Write the original's last hidden states to disk, a tensor per window, unless they are there already."""
        path = self._folder / _TEACHER
        if path.is_file():
            return
        windows = [*self._train, *self._held]
        with torch.no_grad(), layerwise(view, windows, head=False) as forward:
            for turn in forward:
                with turn.loaded() as layer:
                    turn.answer(run_batches(layer, turn.name, turn.calls, devices)[0])
            states = {
                token_hash(ids): result.last_hidden_state.clone()
                for ids, result in zip(windows, forward.results(), strict=True)
            }
        with writing(path):
            write_tensors(path, states, sync=True)

    def run(self, model: Any, layers: Sequence[torch.nn.Module], notify: Notify) -> Refinement:
        """Train a compressed model, which is in memory on its device, and leave it in its best state.

        Args:
            notify: is told of each evaluation, with the held-out divergence in nats per token.

        Raises:
            CheckpointError: a file of an interrupted run is damaged.
        """
        looks = -(-self._settings.steps // self._settings.every)
        path = self._folder / _TEACHER
        device = next(model.parameters()).device

        def teacher(ids: Tensor) -> Tensor:
            with checked_tensors(path, "Delete it and run the same command again: it is computed anew.") as states:
                hidden = states.get(token_hash(ids))
            return from_hidden(model, ids.to(device), hidden.to(device))

        return refine_end_to_end(
            model, layers, Teaching(self._train, self._held, teacher), self._settings,
            notify=lambda event: notify(Event("refinement", event.done, looks, loss=event.loss)),
            resume=self._read_state(len(trainable(model, self._settings.vectors))),
            keep=self._write_state,
        )  # fmt: skip

    def _read_state(self, parameters: int) -> TrainingState | None:
        path = self._folder / _STATE
        if not path.is_file():
            return None
        with checked_tensors(path, "Start over with --restart.") as file:
            numbers = json.loads(file.metadata["numbers"])
            tensors = {name: file.get(name) for name in file.names()}
        if len(tensors) != 4 * parameters:
            raise CheckpointError(f"{path} is of another model.", "Start over with --restart.")
        return TrainingState(**numbers, tensors=tensors)

    def _write_state(self, state: TrainingState) -> None:
        path = self._folder / _STATE
        numbers = {key: value for key, value in vars(state).items() if key != "tensors"}
        with writing(path):
            write_tensors(path, state.tensors, {"numbers": json.dumps(numbers)}, sync=True)


def refine_artifact(
    artifact: Artifact,
    config: Mapping[str, Any],
    view: ModelView,
    work: Distillation,
    devices: Sequence[torch.device],
    notify: Notify,
) -> dict[str, Any]:
    """Train the values in the shards of an unfinished artifact, and write the shards again; returns what to record.

    Args:
        artifact: all of its shards are written.
        config: what its config.json will hold.
        view: the original.
        work: not begun, or interrupted.
        devices: the original's layers run on all of them, the training on the first.
        notify: is told of each evaluation, with the held-out divergence in nats per token.
    """
    work.watch_original(view, devices)
    artifact.expose(config)
    location = Location(str(artifact.folder), artifact.folder, config_file=UNCHECKED)
    small = ModelView(location, trust_remote_code=view.trust_remote_code, prepare=install_stored)
    for name in small.layer_names:
        small.load(name)
    small.load_outside(small.source_names(""))
    small.tie()
    small.model.to(devices[0])
    done = work.run(small.model, small.layers, notify)
    state = small.model.state_dict()
    for key, shard in artifact.done.items():
        # guards (empty tensors under the names of the tensors that they guard) have no place in the model
        refined = {name: state[name].cpu() if name in state else held for name, held in artifact.read(key).items()}
        artifact.write(key, shard.file, refined, shard.record)
    return {key: value for key, value in asdict(done).items() if key != "seconds"}  # the same for an interrupted run


def from_hidden(model: Any, ids: Tensor, hidden: Tensor) -> Tensor:
    """The logits that a causal language model computes from its decoder's last hidden states, with its own scaling and capping.

    Args:
        ids: (samples, length), for the shape only.
        hidden: (samples, length, hidden), the decoder's output.
    """
    decoder = without_head(model)
    own = vars(decoder).get("forward")
    decoder.forward = lambda *_, **__: _Given(hidden)
    try:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    finally:
        del decoder.forward
        if own is not None:
            decoder.forward = own
    return logits


class _Given(SimpleNamespace):
    """A decoder's output, as an object and as the tuple that older models unpack."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__(last_hidden_state=hidden, past_key_values=None, hidden_states=None, attentions=None)

    def __getitem__(self, place: int) -> Tensor:
        hidden: Tensor = (self.last_hidden_state,)[place]
        return hidden

    def __getattr__(self, name: str) -> None:
        return None  # router logits, caches: a model without labels does not use them
