"""A model of any architecture as lrc sees it: layers, targets by role, groups, sub-layers, and parameters that are kept.

Nothing here knows an architecture by name. The targets are the matrices that the layers multiply by (model/targets.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.streamed import Checkpoint
from ..errors import CalibrationError
from .sublayers import SubLayer, require_sublayers
from .targets import Target, watch


@dataclass(frozen=True)
class Kept:
    """Parameters that are not compressed, and why."""

    name: str
    numel: int
    reason: str


class ModelView(Checkpoint):
    """A checkpoint seen as layers and targets."""

    def widened(self) -> ModelView:
        """The same checkpoint, its weights held in float32 (float64 stays)."""
        if self.dtype in (torch.float32, torch.float64):
            return self
        return ModelView(self.location, torch.float32, self.trust_remote_code)

    @cached_property
    def targets(self) -> list[Target]:
        """Every matrix that the layers multiply by, in the order in which a forward reaches them."""
        return [target for target in self._matrices() if not self._why_kept(target)]

    @cached_property
    def sublayers(self) -> list[SubLayer]:
        """The residual sub-layers of all layers; reads the weights of one layer of each kind (see `require_sublayers`)."""
        return require_sublayers(self, self.targets)

    @cached_property
    def kept(self) -> list[Kept]:
        """Parameters that are not targets, each with the reason."""
        covered = {target.module if target.expert is None else target.name.rpartition(".")[0] for target in self.targets}
        reasons = {target.module: reason for target in self._matrices() if (reason := self._why_kept(target))}
        embeddings = {id(m) for m in (self.model.get_input_embeddings(), self.model.get_output_embeddings()) if m is not None}
        found, seen = [], set[int]()
        for module_name, module in self.model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                path = f"{module_name}.{name}" if module_name else name
                if id(parameter) in seen or (name == "weight" and module_name in covered) or path in covered:
                    continue
                seen.add(id(parameter))
                found.append(Kept(path, parameter.numel(), self._reason(module_name, module, parameter, reasons, embeddings)))
        return found

    def _reason(self, path: str, module: nn.Module, parameter: Tensor, reasons: dict[str, str], embeddings: set[int]) -> str:
        if path in reasons:
            return reasons[path]
        if id(module) in embeddings or isinstance(module, nn.Embedding):
            return "embedding or output head"
        if parameter.ndim < 2:
            return "norm, bias or other vector"
        if not path.startswith(self.layers_path + "."):
            return "outside the decoder layers"
        if parameter.ndim == 2:
            return "no linear module multiplies by it (a router, or an operation that lrc does not know)"
        return f"{parameter.ndim}-D parameter of {type(module).__name__}, which lrc does not know how to multiply by"

    def _why_kept(self, target: Target) -> str:
        experts = number_of_experts(self.config)
        if experts and target.expert is None and target.out_features == experts:
            return "router: it chooses experts"
        if target.numel < 2 * (target.out_features + target.in_features):
            return "too small: even rank 1 would not halve it"
        if self.model.get_submodule(target.module).get_parameter(_parameter(target)).dtype != self.dtype:
            return "transformers holds it in another dtype than the model"
        return ""

    def _matrices(self) -> list[Target]:
        if not hasattr(self, "_found"):
            self._found = watch(self)
        return self._found

    @cached_property
    def left_out(self) -> list[Kept]:
        """Tensors of the checkpoint that the model of config.json has no place for; the result will not hold them."""
        shapes = {name: self.source.shape(name) for name in self.unused}
        return [
            Kept(name, math.prod(shape or (0,)), "the model of config.json has no place for it")
            for name, shape in shapes.items()
        ]

    def require_tokens(self, tokens: Tensor) -> None:
        """Refuse calibration tokens (samples, length) that this model's forward cannot process.

        Raises:
            CalibrationError: samples are longer than the model's positions, or a token is not in its vocabulary.
        """
        text = self.config.get_text_config()
        require_positions(self.config, tokens.shape[1], "calibration.length")
        if (largest := int(tokens.max())) >= text.vocab_size:
            raise CalibrationError(
                f"{self.location.name}: the tokenizer gives token {largest}, and the model knows tokens 0 to "
                f"{text.vocab_size - 1}.",
                "Tokenizer and model do not belong together; put the model's own tokenizer beside its weights.",
            )


def _parameter(target: Target) -> str:
    """The name of the target's parameter in its module."""
    return "weight" if target.expert is None else target.role.rpartition(".")[2]


def require_positions(config: Any, length: int, what: str) -> None:
    """Refuse sequences that are longer than the model's positions.

    Raises:
        CalibrationError: `what`, an option of the command line or a key of the recipe, asks for more.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and 0 < positions < length:  # XLNet writes -1: as many as you like
        raise CalibrationError(
            f"{what} {length} is more than the {positions} positions of this model (max_position_embeddings).",
            f"Give {what if what.startswith('--') else '--length'} {positions} or less.",
        )


def number_of_experts(config: Any) -> int | None:
    """How many experts a router chooses from; None where the model is no mixture of experts."""
    text = config.get_text_config()
    return getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
