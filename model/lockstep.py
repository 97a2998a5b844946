"""Running a model layer by layer, for all calibration batches at once, without knowing its architecture.

A decoder's own forward prepares the inputs of its layers (masks, rotary tables, per-layer kinds of attention) and hands the
hidden state from one layer to the next. lrc runs that very forward once per batch, each in a greenlet that pauses at every
layer. When all batches have reached layer i, its weights are loaded, its outputs are computed for all batches, and all forwards
continue to layer i + 1 (layerwise.py). No architecture's loop is rewritten here, so none can be rewritten wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from ..errors import NonFiniteError


@dataclass(frozen=True)
class Call:
    """What one batch passes to a layer."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def hidden(self) -> Tensor:
        """The hidden state, (batch, length, hidden): the first floating-point tensor of the call."""
        return hidden_of((self.args, dict(self.kwargs)))

    def to(self, device: torch.device) -> Call:
        """The same call with every tensor on `device`."""
        args, kwargs = tree_map(
            lambda x: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x, (self.args, dict(self.kwargs))
        )
        return Call(args, kwargs)


def on_host(output: Any) -> Any:
    """A layer's output with every tensor on the CPU, where hidden states are kept between layers."""
    return tree_map(lambda x: x.to("cpu") if isinstance(x, Tensor) else x, output)


class Lockstep:
    """Many forwards of one model that advance together from layer to layer.

    Args:
        model: the whole model; modules outside `layers` need their weights when `start` is called.
        layers: its decoder layers, in order; they may be on the meta device, since the model does not call them.

    Use as a context; `calls` holds one `Call` per batch for the layer (`index`) that all batches wait before. After the last
    layer was answered, `index` is the number of layers and `calls` is empty.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module]) -> None:
        self._model, self._layers = model, list(layers)
        self._forwards: list[greenlet] = []
        self.calls: list[Call] = []
        self.index = -1

    def __enter__(self) -> Lockstep:
        for index, layer in enumerate(self._layers):
            layer.forward = _pause(index)
        return self

    def __exit__(self, *_: object) -> None:
        for forward in self._forwards:
            if not forward.dead:
                forward.throw(GreenletExit)
        for layer in self._layers:
            del layer.forward

    def start(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Run every batch (keyword arguments of the model's forward) up to the first layer."""
        self._forwards = [greenlet(lambda kwargs=kwargs: self._model(**kwargs, use_cache=False)) for kwargs in batches]
        self._stand([forward.switch() for forward in self._forwards])

    def answer(self, outputs: Sequence[Any]) -> None:
        """Give every batch the layer's output (as the layer returned it) and run it up to the next layer."""
        self.calls = []
        self._stand([forward.switch(output) for forward, output in zip(self._forwards, outputs, strict=True)])

    def finish(self, outputs: Sequence[Any]) -> Iterator[Any]:
        """Answer the last layer batch by batch and yield what the model returns for each; it holds one result at a time."""
        self.calls, self.index = [], len(self._layers)
        for number, output in enumerate(outputs):
            yield self._forwards[number].switch(output)

    @property
    def ended(self) -> bool:
        """Whether the forwards have come to their end."""
        return all(forward.dead for forward in self._forwards)

    def _stand(self, stops: list[Any]) -> None:
        if any(forward.dead for forward in self._forwards):
            self.index, self.calls = len(self._layers), []
            return
        indices = {index for index, _ in stops}
        if len(indices) != 1:
            raise RuntimeError(f"the batches of one model stopped at different layers: {sorted(indices)}")
        self.index = indices.pop()
        self.calls = [call for _, call in stops]


def _pause(index: int) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        parent = getcurrent().parent
        if parent is None:
            raise RuntimeError("a layer under Lockstep was called outside its forward")
        return parent.switch((index, Call(args, kwargs)))

    return forward


def hidden_of(value: Any) -> Tensor:
    """The hidden state in a layer's arguments or output: the first floating-point tensor."""
    return next(t for t in tree_leaves(value) if isinstance(t, Tensor) and t.is_floating_point())


def passed_by(layer: nn.Module, call: Call) -> Any:
    """The output of a layer that does nothing: the call's hidden state in the structure of the layer's output.

    Args:
        layer: on the meta device: only the structure of its output is needed.
    """
    with torch.no_grad():
        output = run_without_weights(layer, call)
    return with_hidden(output, call.hidden)


def with_hidden(value: Any, hidden: Tensor) -> Any:
    """A layer's arguments or output with another hidden state."""
    leaves, spec = tree_flatten(value)
    place = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point())
    leaves[place] = hidden
    return tree_unflatten(leaves, spec)


def run_layer(layer: nn.Module, call: Call) -> Any:
    """Compute one call with the layer's real forward (on the instance, `Lockstep` has put another one in its place)."""
    return type(layer).forward(layer, *call.args, **call.kwargs)


def run_without_weights(layer: nn.Module, call: Call, again: Callable[[], object] = lambda: None) -> Any:
    """What a layer on the meta device returns for a call: shapes, and values that mean nothing.

    The layer runs on the meta device. A layer that looks at values on its way (it gathers the tokens of an expert) cannot run
    there; it runs on the CPU with weights of zeros.

    Args:
        layer: its hooks see both runs.
        again: called before the second run.
    """
    try:
        with replaced(layer.modules(), lambda tensor: tensor.to("meta")):
            return run_layer(layer, call.to(torch.device("meta")))
    except (RuntimeError, ValueError):  # torch has no common error for "this needs values"
        again()
        with replaced(layer.modules(), _zeros):
            return run_layer(layer, call.to(torch.device("cpu")))


def _zeros(tensor: Tensor) -> Tensor:
    """Zeros of a tensor's shape that take no memory, in place of one on the meta device."""
    return torch.zeros(1, dtype=tensor.dtype).expand(tensor.shape) if tensor.is_meta else tensor


@contextmanager
def replaced(modules: Iterable[nn.Module], change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While the context is open, the modules' own parameters and buffers are what `change` makes of them."""
    held: list[tuple[Any, dict[str, Any]]] = [
        (tensors, dict(tensors)) for module in modules for tensors in (module._parameters, module._buffers)
    ]
    try:
        for tensors, before in held:
            for name, tensor in before.items():
                if tensor is not None:
                    new = change(tensor)
                    tensors[name] = nn.Parameter(new, requires_grad=False) if isinstance(tensor, nn.Parameter) else new
        yield
    finally:
        for tensors, before in held:
            tensors.update(before)


def run_calls(layer: nn.Module, name: str, calls: Sequence[Call], device: torch.device) -> list[Any]:
    """A layer's output for each call, computed one after the other on `device`, where its weights are; outputs on the CPU.

    Raises:
        NonFiniteError: an output holds a NaN or an infinity.
    """
    outputs = []
    for batch, call in enumerate(calls):
        output = run_layer(layer, call.to(device))
        check_finite(output, name, batch)
        outputs.append(on_host(output))
    return outputs


def check_finite(output: Any, layer: str, batch: int) -> None:
    """Raise NonFiniteError if any floating-point tensor of a layer's output holds a NaN or an infinity."""
    for tensor in tree_leaves(output):
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not torch.isfinite(tensor.sum(dtype=torch.float32)):
            # a sum of finite values may overflow, so look at every value before accusing the layer
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                raise NonFiniteError(
                    f"{layer}: {bad} of {tensor.numel()} output values are not finite "
                    f"(calibration batch {batch}, {tensor.dtype}).",
                    "In float16 activations can overflow: try --dtype bfloat16 or --dtype float32. "
                    "If it stays, the checkpoint is damaged.",
                )
