"""Statistics of the gradients at a layer's targets, collected while `backward` runs that layer with autograd.

`grad_gram` is token-wise: E over tokens of g gᵀ, with g = ∂loss/∂y of the target's output y and the loss summed over a sample.
Computed from per-sample weight gradients instead (GFWSVD), its rank is too low, and compressed models fail. A few tokens have
far larger gradients than all others; clipping each token's norm to a band around the mean keeps them from dominating the gram
(KFAC-SVD: 0.1 to 10 times the mean). The mean is per sample, so that it does not depend on the batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..compress.base import GroupStats, Settings, TargetStats
from ..compress.forms import experts
from ..errors import ModelError, NonFiniteError
from ..model.targets import Target
from .stats import MeanOuter

_AT_ONCE = 1 << 22  # entries of a sample's weight gradient that are in memory together (16 MiB)


class GradientSettings(Settings):
    """How the loss is computed, and which tokens count.

    Attributes:
        labels: `sampled`: drawn from the model's own distribution at every position, the true Fisher, in nats; `data`: the
            text's next token, the empirical one.
        clip: (low, high): each token's gradient norm is clipped to [low, high] × its sample's mean norm in `grad_gram`; None
            does not clip. `fisher_in` is never clipped.
        trim: fraction of a sample's tokens that `grad_gram` leaves out at its start, and again at its end (KFAC-SVD: 0.125).
        seed: of the sampled labels; each sample derives its own, whatever its batch.
    """

    labels: Literal["sampled", "data"] = "sampled"
    clip: tuple[float, float] | None = (0.1, 10.0)
    trim: float = Field(default=0.0, ge=0, lt=0.5)
    seed: int = 0

    @model_validator(mode="after")
    def _band(self) -> GradientSettings:
        if self.clip is not None and not 0 <= self.clip[0] <= 1 <= self.clip[1]:
            raise ValueError(f"clip is a band around the mean, such as (0.1, 10); {self.clip} does not hold 1")
        return self

    def relevant_to(self, needs: frozenset[str]) -> GradientSettings:
        """These settings, with those set to a neutral value that `needs` do not depend on (`clip`, `trim`, `seed`)."""
        neutral: dict[str, Any] = {} if "grad_gram" in needs else {"clip": None, "trim": 0.0}
        return self.model_copy(update=neutral | ({"seed": 0} if self.labels == "data" else {}))


def backward_passes(asked: Iterable[tuple[GradientSettings, frozenset[str]]]) -> dict[GradientSettings, frozenset[str]]:
    """The fewest backward passes that collect everything asked for: settings -> the statistics to collect.

    Args:
        asked: pairs of settings and the statistics needed with them, of `base.BACKWARD_NEEDS`, possibly none.
    """
    passes: dict[GradientSettings, frozenset[str]] = {}
    for settings, needs in sorted(asked, key=lambda one: "grad_gram" not in one[1]):  # first those that depend on all settings
        if needs:
            own = settings.relevant_to(needs)
            serving = next((each for each in passes if each.relevant_to(needs) == own), own)
            passes[serving] = passes.get(serving, frozenset()) | needs
    return passes


def gradient_bytes(targets: Iterable[Target], needs: frozenset[str]) -> int:
    """Bytes that a `GradientCollector` allocates for these targets."""
    total = 0
    for target in targets:
        if "grad_gram" in needs:
            total += 4 * target.out_features**2
        if "weight_grad" in needs:
            total += 4 * target.numel
        if "fisher_in" in needs:
            total += 8 * target.in_features
    return total


class GradientCollector:
    """Collects statistics of the gradients at one layer's targets while the context is open.

    Args:
        layer: the layer on its device; hooks are set on its modules and removed at the end.
        prefix: the layer's path in the model, by which targets are named.
        targets: of the layer, all or some; experts of a mixture too (their gradient includes the router's weight).
        needs: of `base.BACKWARD_NEEDS`.
        settings: of the tokens that count.
        device: of the sums.
    """

    def __init__(
        self,
        layer: nn.Module,
        prefix: str,
        targets: Sequence[Target],
        needs: frozenset[str],
        settings: GradientSettings,
        device: torch.device,
    ) -> None:
        self._layer, self._prefix, self._targets, self._settings = layer, prefix, list(targets), settings
        self._grams = {t.name: MeanOuter(t.out_features, device) for t in targets} if "grad_gram" in needs else {}
        summed = [t for t in targets if "fisher_in" in needs]
        self._fishers = {t.name: torch.zeros(t.in_features, dtype=torch.float64, device=device) for t in summed}
        averaged = [t for t in targets if "weight_grad" in needs]
        self._weights = {t.name: torch.zeros(t.out_features, t.in_features, device=device) for t in averaged}
        self._tokens = 0
        self._reached: set[str] = set()
        self._routes: dict[int, Tensor] = {}  # experts module -> the experts of each token
        self.samples = 0
        self._batch = (0, 0)

    def expect(self, samples: int, length: int) -> None:
        """Announce the shape of the next forward's batch."""
        self._batch = (samples, length)
        self.samples += samples
        self._tokens += samples * length

    def __enter__(self) -> GradientCollector:
        self._stack = ExitStack()
        fused: dict[tuple[str, str], dict[int, str]] = {}
        for target in self._targets:
            if target.expert is not None:
                fused.setdefault((target.module, target.role.rpartition(".")[2]), {})[target.expert] = target.name
                continue
            module = self._layer.get_submodule(target.module.removeprefix(self._prefix + "."))
            self._stack.callback(module.register_forward_hook(self._hook(target.name)).remove)
        for (path, parameter), names in fused.items():
            self._watch_experts(self._layer.get_submodule(path.removeprefix(self._prefix + ".")), parameter, names)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _watch_experts(self, module: nn.Module, parameter: str, names: dict[int, str]) -> None:
        """Give each expert of a fused parameter a module of its own to multiply with, on which a hook can be set."""

        def route(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._routes[id(module)] = (args[1] if len(args) > 1 else kwargs["top_k_index"]).detach()

        count = experts.expert_parameters(module)[parameter][0]
        stand_ins = [_Expert(experts.expert_weight(module, parameter, expert)) for expert in range(count)]
        for expert, name in names.items():
            stand_ins[expert].register_forward_hook(self._hook(name, module, expert))
        place = experts.stored_name(parameter, 0).partition(".")[0]
        module.add_module(place, nn.ModuleList(stand_ins))
        self._stack.callback(delattr, module, place)
        self._stack.callback(module.register_forward_pre_hook(route, with_kwargs=True).remove)

    def _hook(
        self, name: str, routed: nn.Module | None = None, expert: int = 0
    ) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def forward(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if not output.requires_grad:
                return
            x = args[0].detach() if self._fishers or self._weights else None
            rows = None
            if routed is not None:
                rows = (self._routes[id(routed)] == expert).nonzero(as_tuple=True)[0]
            output.register_hook(lambda gradient: self._add(name, gradient.detach(), x, rows))

        return forward

    def _add(self, name: str, gradient: Tensor, x: Tensor | None, rows: Tensor | None) -> None:
        """Add one target's ∂loss/∂y, (..., out); `rows` are the flat indices of its tokens, None for all of them."""
        samples, length = self._batch
        flat = gradient.reshape(-1, gradient.shape[-1]).float()
        if rows is None:
            if len(flat) != samples * length:
                raise ModelError(
                    f"{name} multiplies {len(flat)} rows for {samples * length} tokens; whose gradients they are is not known.",
                    f"Leave it as it is (keep: ['{name}']), or use a method without statistics of gradients.",
                )
            rows = torch.arange(len(flat), device=flat.device)
        self._reached.add(name)
        sample = rows // length
        if x is not None:
            inputs = x.reshape(len(flat), -1).float()
            if name in self._fishers:
                self._fishers[name] += _squared_gradients(flat, inputs, sample, samples, self._weights.get(name))
            elif name in self._weights:
                self._weights[name].addmm_(flat.T, inputs)
        if name in self._grams:
            kept, sample = _trimmed(flat, sample, rows % length, length, self._settings.trim)
            if len(kept):
                self._grams[name].add(_clipped(kept, sample, samples, self._settings.clip))

    def result(self, others: Sequence[GradientCollector] = ()) -> dict[str, TargetStats]:
        """Target name -> its statistics of gradients, merged with those of `others` (other devices' shares of the batches).

        `group.tokens` is the number of tokens under `grad_gram`; an expert that no token reached has zeros, over 0 tokens.

        Raises:
            NonFiniteError: a statistic is NaN or infinite.
            ModelError: no gradient reaches a target.
        """
        workers = [self, *others]
        found = {}
        for target in self._targets:
            name = target.name
            if target.expert is None and not any(name in worker._reached for worker in workers):
                raise ModelError(
                    f"{name}: no gradient of the loss reaches its output through the hidden state.",
                    f"Leave it as it is (keep: ['{name}']), or use a method without statistics of gradients.",
                )
            tokens = sum(worker._grams[name].tokens for worker in workers) if self._grams else 0
            gram = fisher = mean = None
            if self._grams:
                gram = _mean_of([worker._grams[name] for worker in workers], tokens)
            if self._fishers:
                total = torch.stack([worker._fishers[name].cpu() for worker in workers]).sum(0)
                fisher = (total / max(1, sum(worker.samples for worker in workers))).float()
            if self._weights:
                summed = torch.stack([worker._weights[name].cpu() for worker in workers]).sum(0)
                mean = summed / max(1, sum(worker._tokens for worker in workers))
            for statistic, value in (("grad_gram", gram), ("fisher_in", fisher), ("weight_grad", mean)):
                if value is not None and not torch.isfinite(value).all():
                    raise NonFiniteError(
                        f"{name}: its {statistic} is not finite.",
                        "Gradients overflow: try --dtype bfloat16 or --dtype float32.",
                    )
            found[name] = TargetStats(GroupStats(tokens), grad_gram=gram, fisher_in=fisher, weight_grad=mean)
        return found


class _Expert(nn.Module):
    """One expert's matrix of a fused parameter; the weight is a view, and no parameter of this module."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self._weight)


def _mean_of(means: Sequence[MeanOuter], tokens: int) -> Tensor:
    """Token-weighted mean of several workers' means, on the CPU."""
    if len(means) == 1 or not tokens:
        return means[0].result().cpu()
    return torch.stack([mean.result().cpu() * (mean.tokens / tokens) for mean in means]).sum(0)


def _squared_gradients(gradient: Tensor, x: Tensor, sample: Tensor, samples: int, summed: Tensor | None) -> Tensor:
    """Sum over samples and outputs of (∂loss/∂W)², (in,) float64, from (rows, out) and (rows, in).

    Where `summed`, (out, in), is given, the gradients of all samples are added to it.
    """
    total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    step = max(1, _AT_ONCE // x.shape[1])
    for count in range(samples):
        chosen = sample == count
        if not chosen.any():
            continue
        own, inputs = (gradient, x) if samples == 1 else (gradient[chosen], x[chosen])
        for start in range(0, gradient.shape[1], step):
            part = own[:, start : start + step].T @ inputs
            if summed is not None:
                summed[start : start + step] += part
            total += part.square_().sum(0, dtype=torch.float64)
    return total


def _trimmed(gradient: Tensor, sample: Tensor, position: Tensor, length: int, trim: float) -> tuple[Tensor, Tensor]:
    cut = int(trim * length)
    if cut == 0:
        return gradient, sample
    inner = (position >= cut) & (position < length - cut)
    return gradient[inner], sample[inner]


def _clipped(gradient: Tensor, sample: Tensor, samples: int, clip: tuple[float, float] | None) -> Tensor:
    """(rows, out) with each row's norm in `clip` × the mean norm of its sample's rows; rows of zeros stay zero."""
    if clip is None:
        return gradient
    norm = gradient.norm(dim=1)
    counts = torch.zeros(samples, device=norm.device).index_add_(0, sample, torch.ones_like(norm))
    means = torch.zeros(samples, device=norm.device).index_add_(0, sample, norm) / counts.clamp_min(1)
    mean = means[sample]
    wanted = torch.minimum(torch.maximum(norm, clip[0] * mean), clip[1] * mean)
    return gradient * torch.where(norm > 0, wanted / norm.clamp_min(torch.finfo(norm.dtype).tiny), 1.0)[:, None]
