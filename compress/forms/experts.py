"""Mixtures of experts: multiplying by experts that are stored in forms.

transformers 5 keeps all experts of a layer in fused 3-D parameters (experts, out, in), and implementations of the experts'
forward pass can be registered by name. lrc registers one, `lrc`. It multiplies expert by expert: by the fused parameter where
that is dense, by a form's module where an expert is compressed. It can also show each expert's input to an observer; statistics
per expert are collected in this way. The gate, the activation and the biases remain the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

IMPLEMENTATION = "lrc"
FORMS = "_forms"
_TRIED = 5  # channels on which a gate is tested
# observer(experts module, parameter name, expert index, input (tokens, in)); one at a time, set by `observe`
_observers: list[Callable[[nn.Module, str, int, Tensor], None]] = []
_readings: list[Callable[[Tensor], Tensor]] = []  # applied to an expert's input before it is multiplied


def register() -> None:
    """Register the experts implementation `lrc` with transformers; calling it again changes nothing."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


@contextmanager
def observe(observer: Callable[[nn.Module, str, int, Tensor], None]) -> Iterator[None]:
    """While the context is open, `observer(module, parameter, expert, input)` is called with every expert's input."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


@contextmanager
def reading_through(function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While the context is open, experts multiply `function(input)` instead of their input (tokens, in)."""
    _readings.append(function)
    try:
        yield
    finally:
        _readings.remove(function)


def expert_parameters(module: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Parameter name -> (experts, out, in) of the fused weights of an experts module; empty for any other module."""
    if not hasattr(module, "_apply_gate") or not hasattr(module, "is_transposed"):
        return {}
    found = {}
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim == 3:
            experts, a, b = parameter.shape
            found[name] = (experts, b, a) if module.is_transposed else (experts, a, b)
    return found


def number_of_matrices(module: nn.Module) -> int:
    """The number of matrices that an experts module multiplies by: one per expert and parameter, compressed or not."""
    forms = sum(
        len(child) for name, child in module.named_children() if name.endswith(FORMS) and isinstance(child, nn.ModuleList)
    )
    return forms + sum(experts for experts, _, _ in expert_parameters(module).values())


def channels_are_free(module: Any) -> bool:
    """Whether an inner channel of an expert can be pruned by removing its rows and its column.

    It cannot where experts have biases, which would have to be pruned too, or where gate and up are not the two halves of one
    matrix (gpt-oss interleaves their rows). The latter is found by testing the gate on a few channels.
    """
    if any(name.endswith("_bias") for name, _ in module.named_parameters(recurse=False)):
        return False
    if not module.has_gate:
        return True
    x = torch.linspace(-2, 2, 2 * _TRIED).repeat(2, 1)
    kept = torch.arange(1, _TRIED)
    with torch.no_grad():
        return torch.equal(module._apply_gate(x)[:, kept], module._apply_gate(x[:, torch.cat([kept, kept + _TRIED])]))


def expert_weight(module: nn.Module, parameter: str, expert: int) -> Tensor:
    """A view of one expert's dense weight as (out, in)."""
    weight: Tensor = getattr(module, parameter)[expert]
    return weight.T if module.is_transposed else weight


def install(module: nn.Module, parameter: str, forms: list[nn.Module]) -> None:
    """Replace a fused parameter by one module per expert.

    Under the parameter's name remains an empty guard of shape (0,): a reader without lrc fails on that shape instead of
    initialising random experts.
    """
    old = getattr(module, parameter)
    setattr(module, parameter, nn.Parameter(torch.empty(0, dtype=old.dtype, device=old.device), requires_grad=False))
    module.add_module(parameter + FORMS, nn.ModuleList(forms))


def stored_name(parameter: str, expert: int) -> str:
    """The path of an expert's form inside its experts module: 'gate_up_proj', 3 -> 'gate_up_proj_forms.3'."""
    return f"{parameter}{FORMS}.{expert}"


def _multiply(module: nn.Module, parameter: str, expert: int, x: Tensor) -> Tensor:
    for observer in _observers:
        observer(module, parameter, expert, x)
    for reading in _readings:
        x = reading(x)
    forms = getattr(module, parameter + FORMS, None)
    y: Tensor = forms[expert](x) if forms is not None else nn.functional.linear(x, expert_weight(module, parameter, expert))
    bias = getattr(module, parameter + "_bias", None)
    return y if bias is None else y + bias[expert]


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward pass of a layer's experts, expert by expert.

    Args:
        self: an experts module of transformers.
        hidden_states: (tokens, hidden).
        top_k_index: (tokens, k) the experts of each token; an index past the last expert means none.
        top_k_weights: (tokens, k) their weights.

    Returns:
        (tokens, hidden): the weighted sum of the experts' outputs, summed in float32.
    """
    if hidden_states.device.type == "meta":  # shapes only: which expert gets which token depends on the data
        return torch.empty_like(hidden_states)
    result = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    first = "gate_up_proj" if self.has_gate else "up_proj"
    for expert in top_k_index.unique().tolist():
        if expert >= self.num_experts:
            continue
        token, slot = (top_k_index == expert).nonzero(as_tuple=True)
        x = _multiply(self, first, expert, hidden_states[token])
        x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
        x = _multiply(self, "down_proj", expert, x)
        if self.has_post_expert_norm:
            x = self.post_expert_norm(x)
        result.index_add_(0, token, (x * top_k_weights[token, slot, None]).float())
    return result.to(hidden_states.dtype)
