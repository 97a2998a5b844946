"""Statistics of activations: the inputs and the outputs of a layer's targets.

Everything is a running mean over tokens in float32 (TF32 off): sums overflow and lose digits, means do not, and the means
of two workers merge by their token counts. Targets of one group read the same tensor and share its statistics. Where a method
needs only the second moment of the outputs, `W C Wᵀ`, the smaller gram is collected: the group's (in, in) one, or each target's
own (out, out) one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..compress.base import FORWARD_NEEDS, GroupStats, TargetStats
from ..compress.forms import experts
from ..compress.forms.base import linear_weight
from ..cuda.dispatch import GRAM_FROM, why_not
from ..errors import NonFiniteError
from ..model.targets import Target

STATISTICS_AT_ONCE = 4 << 30
"""Bytes of a layer's statistics that are collected together, in each device's memory.

Just above what a layer of a dense 70B model takes (8192 and 28672 wide: 4.1 GB), so that only mixtures of experts and wider
models are collected in several chunks. All experts of a DeepSeek-V3 layer would take 57 GB.
"""

_BLOCKS = 8  # a gram is symmetric: in 8 x 8 blocks only 36 of 64 are computed
_NARROWEST = 144  # a block that is narrower than this costs more by itself than it saves


class MeanOuter:
    """Running mean over tokens of x xᵀ, (n, n) float32."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.tokens = 0
        self.value = torch.zeros(width, width, device=device)
        step = max(_NARROWEST, -(-width // (_BLOCKS * 16)) * 16)
        self._edges = list(range(0, width, step))

    def add(self, x: Tensor) -> None:
        """Add (tokens, n) activations of any floating dtype; sums are float32 sums of exact products."""
        total = self.tokens + len(x)
        if self._by_kernel(x):
            from ..cuda.gram import gram_

            gram_(self.value, x, self.tokens / total, 1 / total)
            self.tokens = total
            return
        x = x.float()
        for start, end in zip(self._edges, [*self._edges[1:], len(self.value)], strict=True):
            self.value[start:end, start:].addmm_(x[:, start:end].T, x[:, start:], beta=self.tokens / total, alpha=1 / total)
        self.tokens = total

    def _by_kernel(self, x: Tensor) -> bool:
        least = GRAM_FROM["float32" if x.dtype == torch.float32 else "16 bit"]
        return least is not None and len(self.value) >= least and len(x) > 0 and not why_not(x, self.value)

    def result(self) -> Tensor:
        """The symmetric mean (the lower triangle is mirrored from the upper one)."""
        return self.value.triu() + self.value.triu(1).T


class MeanVector:
    """Running mean over tokens of f(x), (n,) float32."""

    def __init__(self, width: int, device: torch.device, function: Callable[[Tensor], Tensor]) -> None:
        self.tokens, self.value, self._function = 0, torch.zeros(width, device=device), function

    def add(self, x: Tensor) -> None:
        total = self.tokens + len(x)
        self.value.mul_(self.tokens / total).add_(self._function(x).sum(0), alpha=1 / total)
        self.tokens = total

    def result(self) -> Tensor:
        return self.value


class PeakMean:
    """Largest over calibration samples of the sample's mean |x|, (n,) float32; it does not depend on the batches.

    Which sample an expert's token is from is not known: its tokens of a batch count as one sample.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.tokens, self.value = 0, torch.zeros(width, device=device)

    def add(self, x: Tensor) -> None:
        """Add (samples, tokens, n) or, as one sample, (tokens, n) activations."""
        means = x.abs().float().reshape(-1, *x.shape[-2:]).mean(1)
        self.value = torch.maximum(self.value, means.amax(0))
        self.tokens += x.numel() // x.shape[-1]

    def result(self) -> Tensor:
        return self.value


_VECTORS: dict[str, Callable[[Tensor], Tensor]] = {"mean": lambda x: x, "abs_mean": torch.abs, "mean_square": torch.square}


@dataclass(frozen=True)
class Wanted:
    """What to collect in one layer.

    Args:
        inputs: group -> names of the statistics of its input ('gram', 'mean', ...).
        outputs: the targets whose own output gram is collected.
    """

    inputs: Mapping[str, frozenset[str]]
    outputs: frozenset[str]

    def nbytes(self, targets: Iterable[Target], stored: bool = False) -> int:
        """Bytes of these targets' statistics: those that a `LayerCollector` allocates, or (`stored`) those on disk."""

        def gram(width: int) -> int:
            return width * (width + 1) // 2 if stored else width**2

        total, seen = 0, set[str]()
        for target in targets:
            if target.name in self.outputs:
                total += 4 * gram(target.out_features)
            if target.group not in seen:
                seen.add(target.group)
                wanted = self.inputs.get(target.group, frozenset())
                total += 4 * sum(gram(target.in_features) if name == "gram" else target.in_features for name in wanted)
        return total


def wanted(targets: Sequence[Target], needs: Mapping[str, frozenset[str]]) -> Wanted:
    """Choose what to collect in a forward for targets of one layer: the smallest statistics that meet the needs of each.

    Args:
        needs: target -> the statistics that its method reads.
    """
    groups: dict[str, list[Target]] = defaultdict(list)
    for target in targets:
        groups[target.group].append(target)
    inputs: dict[str, frozenset[str]] = {}
    outputs: set[str] = set()
    for group, members in groups.items():
        names = frozenset[str]().union(*(needs[target.name] & FORWARD_NEEDS for target in members))
        if "output_gram" in names and "gram" not in names:
            asking = [target for target in members if "output_gram" in needs[target.name]]
            # of an expert only the inputs are observed
            if members[0].expert is None and sum(t.out_features**2 for t in asking) < members[0].in_features ** 2:
                outputs.update(target.name for target in asking)
            else:
                names = names | {"gram"}
        inputs[group] = names - {"output_gram"}
    return Wanted(inputs, frozenset(outputs))


def chunks_of(
    targets: Sequence[Target],
    nbytes: Callable[[Sequence[Target]], int],
    together: Iterable[Collection[str]] = (),
    budget: int | None = None,
) -> list[list[Target]]:
    """Split targets of one layer into chunks whose statistics are collected one chunk after the other, each within a budget.

    Targets of one group share a gram and stay in one chunk. Which chunk a target is in changes none of its statistics: each
    chunk is collected over all batches, in the same order.

    Args:
        nbytes: bytes that the statistics of such targets take (`Wanted.nbytes`).
        together: names of targets that belong into one chunk, such as the members of a unit; names of others are ignored.
        budget: bytes of a chunk; `STATISTICS_AT_ONCE` by default. What cannot be split and takes more is a chunk of its own.

    Returns:
        The chunks, each in the order of `targets`; a single empty one where there are no targets.
    """
    budget = STATISTICS_AT_ONCE if budget is None else budget
    groups: dict[str, list[str]] = defaultdict(list)
    for target in targets:
        groups[target.group].append(target.name)
    place = {target.name: number for number, target in enumerate(targets)}
    joined = {name: [name] for name in place}  # target -> all targets of its chunk that cannot be in another one
    for names in (*groups.values(), *together):
        merged = sorted({other for name in names if name in joined for other in joined[name]}, key=place.__getitem__)
        joined |= dict.fromkeys(merged, merged)
    chunks: list[list[Target]] = [[]]
    taken = 0
    for first in (name for name in place if joined[name][0] == name):
        members = [targets[place[name]] for name in joined[first]]
        size = nbytes(members)
        if chunks[-1] and taken + size > budget:
            chunks.append([])
            taken = 0
        chunks[-1] += members
        taken += size
    return [sorted(chunk, key=lambda target: place[target.name]) for chunk in chunks]


class LayerCollector:
    """Collects statistics of one layer's targets while the context is open.

    Args:
        layer: the layer on its device; hooks are set on its modules and removed at the end.
        prefix: the layer's path in the model, by which targets are named.
        targets: of the layer, all or some; those of one group together.
        what: from `wanted`, of all targets of the layer.
    """

    def __init__(self, layer: nn.Module, prefix: str, targets: Sequence[Target], what: Wanted, device: torch.device) -> None:
        self._layer, self._prefix, self._targets, self._what = layer, prefix, list(targets), what
        self._means: dict[tuple[str, str], MeanOuter | MeanVector | PeakMean] = {}
        for target in self._targets:
            if target.name in what.outputs:
                self._means[target.name, "output_gram"] = MeanOuter(target.out_features, device)
            for name in what.inputs[target.group]:
                if (target.group, name) not in self._means:
                    self._means[target.group, name] = _accumulator(name, target.in_features, device)
        self.samples, self.length = 1, 0  # of the batch that runs through the layer; for statistics per sample
        self._experts = {(target.module, target.role.rpartition(".")[2], target.expert): target for target in self._targets}

    def __enter__(self) -> LayerCollector:
        self._stack = ExitStack()
        watched: set[str] = set()
        for target in self._targets:
            if target.expert is not None:
                continue
            module = self._layer.get_submodule(target.module.removeprefix(self._prefix + "."))
            # the first of these targets that reads it: the group's namesake may stay dense, and is not among them then
            if target.group not in watched and self._what.inputs[target.group]:
                watched.add(target.group)
                hook = module.register_forward_pre_hook(self._input_hook(target.group))
                self._stack.callback(hook.remove)
            if target.name in self._what.outputs:
                handle = module.register_forward_hook(self._output_hook(target.name))
                self._stack.callback(handle.remove)
        if any(target.expert is not None for target in self._targets):
            paths = {id(module): f"{self._prefix}.{path}" for path, module in self._layer.named_modules()}
            self._stack.enter_context(experts.observe(lambda m, p, e, x: self._see_expert(paths.get(id(m)), p, e, x)))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _input_hook(self, group: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: self._add(group, args[0])

    def _output_hook(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            # subtracting a large bias from the output would leave little but rounding errors
            y = output if getattr(module, "bias", None) is None else nn.functional.linear(args[0], linear_weight(module))
            self._means[name, "output_gram"].add(y.reshape(-1, y.shape[-1]))

        return hook

    def _see_expert(self, module: str | None, parameter: str, expert: int, x: Tensor) -> None:
        target = self._experts.get((module or "", parameter, expert))
        if target is not None:
            self._add(target.name, x)

    def _add(self, group: str, x: Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1])
        wide = flat.float()
        for name in self._what.inputs[group]:
            mean = self._means[group, name]
            mean.add(self._by_sample(x) if name == "peak_abs_mean" else flat if isinstance(mean, MeanOuter) else wide)

    def _by_sample(self, x: Tensor) -> Tensor:
        """The activations as (samples, tokens, n), also where the model flattens them to (samples · tokens, n).

        Which sample an expert's tokens are from is not known: they count as one sample.
        """
        whole = x.ndim == 2 and len(x) == self.samples * self.length
        return x.view(self.samples, self.length, -1) if whole else x

    def result(self, others: Sequence[LayerCollector] = ()) -> dict[str, TargetStats]:
        """Target name -> its statistics, merged with those of `others` (other devices' shares of the same batches).

        Raises:
            NonFiniteError: a statistic is NaN or infinite; names the target.
        """
        merged = {key: _merge([self._means[key], *(other._means[key] for other in others)]) for key in self._means}
        for (name, statistic), (tokens, value) in merged.items():
            if not torch.isfinite(value).all():
                raise NonFiniteError(
                    f"{name}: its {statistic} over {tokens} tokens is not finite.",
                    "Activations overflow: try --dtype bfloat16 or --dtype float32.",
                )
        groups: dict[str, GroupStats] = {}
        for target in self._targets:
            if target.group not in groups:
                have = {name: merged[target.group, name] for name in self._what.inputs[target.group]}
                outputs = merged.get((target.name, "output_gram"))
                tokens = next((count for count, _ in have.values()), outputs[0] if outputs else 0)
                groups[target.group] = GroupStats(tokens, **{name: value for name, (_, value) in have.items()})
        return {
            target.name: TargetStats(groups[target.group], merged.get((target.name, "output_gram"), (0, None))[1])
            for target in self._targets
        }


def _accumulator(name: str, width: int, device: torch.device) -> MeanOuter | MeanVector | PeakMean:
    if name == "gram":
        return MeanOuter(width, device)
    return PeakMean(width, device) if name == "peak_abs_mean" else MeanVector(width, device, _VECTORS[name])


def _merge(means: Sequence[MeanOuter | MeanVector | PeakMean]) -> tuple[int, Tensor]:
    """Token-weighted mean of several workers' means, on the first one's device."""
    tokens = sum(mean.tokens for mean in means)
    first = means[0].result()
    if len(means) == 1 or tokens == 0:
        return tokens, first
    if isinstance(means[0], PeakMean):
        return tokens, torch.stack([mean.result().to(first.device) for mean in means]).amax(0)
    return tokens, sum((mean.result().to(first.device) * (mean.tokens / tokens) for mean in means), torch.zeros_like(first))
