"""Which graphs torch.compile makes of a module."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def graphs_of(module: nn.Module, inputs: Iterable[Tensor], tolerance: float | None = None) -> list[torch.fx.GraphModule]:
    """The graphs compiled for these inputs, without a break in any; each input's product is the module's own.

    Args:
        module: not compiled before.
        inputs: one after the other.
        tolerance: of a number, relative to itself and to the largest one of its product; None: torch's own.
    """
    torch._dynamo.reset()
    graphs = []

    def compiler(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=compiler)
    with torch.no_grad():
        for x in inputs:
            expected = module(x).float()
            absolute = None if tolerance is None else tolerance * float(expected.abs().max())
            torch.testing.assert_close(compiled(x).float(), expected, rtol=tolerance, atol=absolute)
    return graphs
