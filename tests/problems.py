"""Weights, inputs and their statistics in float64, for tests of methods."""

from __future__ import annotations

import torch

from lrc.compress.base import GroupStats, Option, Shape, Solution, TargetStats, get_method


def problem(out_features: int, in_features: int, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (out, in) and inputs (tokens, in) whose channels differ in scale and are correlated."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator, dtype=torch.float64)
    mixing = torch.randn(in_features, in_features, generator=generator, dtype=torch.float64)
    scales = torch.logspace(-2, 1, in_features, dtype=torch.float64)
    return weight, torch.randn(tokens, in_features, generator=generator, dtype=torch.float64) @ (mixing * scales)


def statistics(x: torch.Tensor, weight: torch.Tensor | None = None) -> TargetStats:
    """All statistics of the inputs in float64; with a weight also the gram of its outputs."""
    gram = x.T @ x / len(x)
    mean_abs = x.abs().mean(0)
    group = GroupStats(len(x), gram, x.mean(0), mean_abs, x.square().mean(0), peak_abs_mean=mean_abs)
    return TargetStats(group, None if weight is None else weight @ gram @ weight.T)


def error(weight: torch.Tensor, approximation: torch.Tensor, x: torch.Tensor) -> float:
    return float((x @ (weight - approximation).T).square().sum(1).mean())


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    """Draws of variance 1 in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def solved_trellis(weight: torch.Tensor, x: torch.Tensor, **chosen: object) -> tuple[list[Option], Solution]:
    """The options and the solution of `trellis` with 2^8 states and these settings."""
    picked = get_method("trellis")
    settings = picked.settings(**{"state_bits": 8} | chosen)
    return picked.options(Shape(*weight.shape, 2), settings, 1), picked.solve(weight, statistics(x), settings)
