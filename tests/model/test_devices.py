"""Work on an accelerator: what lies on disk or waits on the CPU follows the layer to its device, and comes back."""

from __future__ import annotations

import pytest
import torch
from pipeline import compress, logits

from lrc.compress.base import GroupStats, TargetStats
from lrc.model.layer_forms import install
from lrc.run.verify import verify

META = torch.device("meta")


def test_targets_of_one_group_share_the_copy_on_a_device():
    group = GroupStats(5, torch.eye(3), mean=torch.zeros(3))
    first, second = TargetStats(group, grad_gram=torch.eye(2)).to(META), TargetStats(group).to(META)
    assert first.group is second.group
    assert first.group.gram.device == first.group.mean.device == first.grad_gram.device == META
    assert first.group.tokens == 5 and first.group.abs_mean is None
    assert TargetStats(group).to(torch.device("cpu")).group is group, "what is there already is not copied"


def test_forms_go_where_their_layer_is():
    layer = torch.nn.ModuleDict({"proj": torch.nn.Linear(6, 4, bias=False, device=META)})
    spec = {"kind": "low-rank", "rank": 2, "bias": False}
    install(
        layer,
        "layers.0",
        {"layers.0.proj": spec},
        {"layers.0.proj.left": torch.ones(4, 2), "layers.0.proj.weight": torch.ones(2, 6)},
    )
    assert {tensor.device for tensor in layer.state_dict().values()} == {META}
    assert layer["proj"](torch.ones(1, 6, device=META)).shape == (1, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("lrc-fast", {}),
        ("lrc-gradient", {}),
        ("kfac", {}),
        ("svd-llm", {"allocation": "kl"}),
        ("svd-llm-sequential", {}),
        ("aa-svd", {"refine.block.epochs": 1}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_gpu_gives_what_the_cpu_gives(recipe, more, family, tiny_checkpoints, tiny_text_file, tmp_path):
    found = []
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        compress(tiny_checkpoints(family), out, tiny_text_file, recipe, devices=[torch.device(device)], ratio=0.3, **more)
        verify(out)
        found.append(logits(out))
    assert torch.allclose(*found, atol=0.05 * float(found[0].std()))
