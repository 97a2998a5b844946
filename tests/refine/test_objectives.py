"""Refinement of blocks and of whole models: it lowers the held-out loss, and never leaves it higher."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pipeline import compress
from torch import nn
from torch.nn.functional import kl_div

from lrc.checkpoint.hf_quantizer import open_model
from lrc.compress.forms.base import LowRankLinear
from lrc.errors import NonFiniteError, RequestError
from lrc.model.lockstep import Call, Lockstep, run_layer
from lrc.refine.objectives import BlockExamples, BlockSettings, EndToEndSettings, Teaching, refine_block, refine_end_to_end
from lrc.refine.trainer import Course, Trainer, TrainingSettings, TrainingState, trainable

FAST = BlockSettings(lr=3e-3, epochs=4, batch_tokens=96, patience=4)


def test_a_training_goes_on_to_the_same_numbers_whoever_got_a_gradient_when():
    """Parameters of experts get one only in steps in which a token reaches them."""
    settings = TrainingSettings(lr=0.05, batch_tokens=1, patience=99)

    def trained(stop: int | None, resume: TrainingState | None = None) -> tuple[list[float], TrainingState]:
        one, two = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        states: list[TrainingState] = []

        def backward(batch: int, tokens: int) -> float:
            loss = (one - 2).square().sum() + ((two - 3).square().sum() if batch == 2 else 0)
            loss.backward()
            return float(loss.detach())

        def keep(state: TrainingState) -> None:
            states.append(copy.deepcopy(state))
            if len(states) == stop:
                raise KeyboardInterrupt

        def judge() -> float:
            return float((one.detach() - 2).square().sum() + (two.detach() - 3).square().sum())

        course = Course(backward, [1] * 3, 1, 4, judge)
        with contextlib.suppress(KeyboardInterrupt):
            Trainer([one, two], settings, 12, resume).run(course, keep=keep)
        return [*one.tolist(), *two.tolist()], states[-1]

    whole, _ = trained(None)
    _, half = trained(1)
    assert half.steps == 4
    assert trained(None, half)[0] == whole


def batches(seed: int, count: int, samples: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 320, (samples, 24), generator=generator) for _ in range(count)]


def through(model: nn.Module, stop: int, ids: list[torch.Tensor]) -> tuple[list[Call], list[torch.Tensor]]:
    """What layer `stop` is called with, and its outputs."""
    layers = list(model.model.layers)
    with torch.no_grad(), Lockstep(model, layers) as steps:
        steps.start([{"input_ids": each} for each in ids])
        for layer in layers[:stop]:
            steps.answer([run_layer(layer, call) for call in steps.calls])
        return steps.calls, [run_layer(layers[stop], call) for call in steps.calls]


class Block:
    """Layer 1 of a compressed model, with what it is to be trained on."""

    def __init__(self, original: Path, compressed: Path, dtype: torch.dtype) -> None:
        teacher, student = (open_model(str(folder), dtype=dtype)[0] for folder in (original, compressed))
        self.layer = student.model.layers[1]
        train, held = batches(1, 60), batches(2, 4)
        self.data = BlockExamples(through(student, 1, train)[0], through(teacher, 1, train)[1])
        self.held = BlockExamples(through(student, 1, held)[0], through(teacher, 1, held)[1])

    def held_error(self) -> float:
        """Mean squared error on held-out tokens, in float64."""
        with torch.no_grad():
            pairs = zip(self.held.calls, self.held.goals, strict=True)
            found = [run_layer(self.layer, call).double() - y.double() for call, y in pairs]
        return float(torch.cat([each.flatten() for each in found]).square().mean())

    def refine(self, settings: BlockSettings, **options):
        return refine_block(self.layer, self.data, self.held, settings, **options)


@pytest.fixture(scope="module")
def block(tiny_checkpoints, tiny_text_file, tmp_path_factory) -> Callable[..., Block]:
    """A function (family, dtype) -> a fresh Block of a model compressed by svd-llm to half."""
    folders: dict[str, Path] = {}
    blocks: dict[tuple[str, torch.dtype], Block] = {}

    def fresh(family: str = "llama", dtype: torch.dtype = torch.float32) -> Block:
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp("refine") / family
            compress(tiny_checkpoints(family), folders[family], tiny_text_file, ratio=0.5)
        if (family, dtype) not in blocks:
            blocks[family, dtype] = Block(tiny_checkpoints(family), folders[family], dtype)
        return copy.deepcopy(blocks[family, dtype])

    return fresh


@pytest.mark.parametrize("loss", ["mse", "variance", "token"])
@pytest.mark.parametrize(("family", "dtype"), [("llama", torch.float32), ("llama", torch.bfloat16), ("mixtral", torch.float32)])
def test_a_block_comes_closer_to_the_original_on_text_that_it_was_not_trained_on(block, family, dtype, loss):
    mine = block(family, dtype)
    before = mine.held_error()
    dense = {name: p.clone() for name, p in mine.layer.named_parameters() if name not in trainable(mine.layer, vectors=True)}
    report = mine.refine(FAST.model_copy(update={"loss": loss}))
    assert mine.held_error() < 0.9 * before
    assert report.best < 0.9 * report.start and report.steps == 4 * 30 and report.stopped == "done"
    if loss == "mse":
        assert report.start == pytest.approx(before, rel=1e-3) and report.best == pytest.approx(mine.held_error(), rel=1e-3)
    parameters = dict(mine.layer.named_parameters())
    assert all(p.dtype == dtype and not p.requires_grad and p.grad is None for p in parameters.values())
    assert all(torch.equal(parameters[name], value) for name, value in dense.items())


def test_factors_norms_and_biases_are_trained_and_nothing_else(block):
    layer = block("mixtral").layer
    names = set(trainable(layer, vectors=True))
    assert {"input_layernorm.weight", "self_attn.q_proj.left", "self_attn.q_proj.weight"} <= names
    assert "mlp.experts.down_proj_forms.3.left" in names and "mlp.gate.weight" not in names
    assert "input_layernorm.weight" not in trainable(layer, vectors=False)
    plain = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    assert set(trainable(plain, vectors=True)) == {"0.bias", "1.weight", "1.bias"}


def test_a_block_that_only_gets_worse_is_left_as_it_was(block):
    mine = block()
    before = copy.deepcopy(mine.layer.state_dict())
    report = mine.refine(BlockSettings(lr=3.0, epochs=9, batch_tokens=96, patience=2))
    assert report.stopped in ("early", "diverged") and report.steps < 9 * 30
    assert report.best == report.start
    assert all(torch.equal(value, before[name]) for name, value in mine.layer.state_dict().items())


def test_the_best_state_is_kept_not_the_last(block):
    mine, seen = block(), []
    mine.data = BlockExamples(mine.data.calls[:4], mine.data.goals[:4])  # so few tokens that they are soon learnt by heart
    settings = BlockSettings(lr=0.01, epochs=30, batch_tokens=96, patience=30)
    report = mine.refine(settings, notify=lambda event: seen.append(event.loss))
    assert len(seen) == 30 and report.best == min(seen) < 0.99 * seen[-1]
    again = mine.refine(FAST.model_copy(update={"lr": 1e-12, "epochs": 1}))
    assert again.start == report.best


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_seed_gives_the_same_bytes_and_another_does_not(block, dtype):
    def result(seed: int) -> torch.Tensor:
        mine = block(dtype=dtype)
        mine.refine(FAST.model_copy(update={"epochs": 2, "epoch_tokens": 480, "seed": seed}))
        return mine.layer.mlp.down_proj.left

    assert torch.equal(result(0), result(0))
    assert not torch.equal(result(0), result(1))


def test_bfloat16_steps_smaller_than_a_rounding_add_up_in_the_masters(block):
    # steps of at most 1e-4 each, and bfloat16 weights of 0.1 have their neighbours 5e-4 away: without masters a tenth of this
    # gain is left. Far smaller steps would prove nothing: what they add up to is itself less than a rounding
    settings = BlockSettings(lr=1e-4, epochs=4, batch_tokens=96, patience=4)
    wide, narrow = (block(dtype=dtype).refine(settings) for dtype in (torch.float32, torch.bfloat16))
    assert narrow.start - narrow.best > 0.8 * (wide.start - wide.best) > 0


def test_an_epoch_can_be_a_part_of_the_tokens_and_the_parts_go_round(block):
    mine = block()
    counts = [0] * 60

    class Counted(list):
        def __getitem__(self, index):
            counts[index] += 1
            return super().__getitem__(index)

    counted = BlockExamples(Counted(mine.data.calls), mine.data.goals)
    settings = FAST.model_copy(update={"epoch_tokens": 1440, "epochs": 2})
    report = refine_block(mine.layer, counted, mine.held, settings)
    assert report.steps == 2 * 15 and counts == [1] * 60  # two epochs of half the calls: each call once


def test_what_cannot_be_refined_is_said(block):
    mine = block()
    mine.held.goals[0][0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="held-out"):
        mine.refine(FAST)
    with pytest.raises(RequestError, match="bfloat16"):
        block(dtype=torch.float16).refine(FAST)
    with pytest.raises(ValueError, match="judge"):
        refine_block(mine.layer, mine.data, BlockExamples([], []), FAST)
    dense = nn.Linear(3, 3, bias=False)
    example = BlockExamples([Call((torch.ones(1, 2, 3),), {})], [torch.zeros(1, 2, 3)])
    assert refine_block(dense, example, example, FAST).stopped == "nothing to train"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_end_to_end_lowers_the_held_out_divergence(dtype, tiny_checkpoints, tiny_text_file, tmp_path):
    compress(tiny_checkpoints("llama"), tmp_path / "out", tiny_text_file, ratio=0.5)
    original = open_model(str(tiny_checkpoints("llama")))[0]
    model = open_model(str(tmp_path / "out"), dtype=dtype)[0]
    held = batches(2, 3)

    def divergence() -> float:
        with torch.no_grad():
            mine = torch.cat([model(ids).logits for ids in held]).double().log_softmax(-1)
            true = torch.cat([original(ids).logits for ids in held]).double().log_softmax(-1)
        return float(kl_div(mine, true, reduction="sum", log_target=True)) / sum(ids.numel() for ids in held)

    before, norms = divergence(), model.model.norm.weight.clone()
    calls: list[int] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    report = refine_end_to_end(
        model,
        model.model.layers,
        Teaching(batches(1, 40), held, lambda ids: original(ids).logits),
        EndToEndSettings(lr=5e-4, steps=40, batch_tokens=96, every=10),
    )
    assert report.start == pytest.approx(before, rel=2e-2) and report.best == pytest.approx(divergence(), rel=2e-2)
    assert divergence() < 0.9 * before
    assert report.steps == 40 and torch.equal(model.model.norm.weight, norms)
    # layers ran twice per training batch: once forward, once more in the backward pass
    assert sum(calls) == 40 * 2 * 2 * 3
    assert all("forward" not in vars(layer) for layer in model.model.layers)
    assert not any(p.requires_grad for p in model.parameters())


def test_end_to_end_that_only_gets_worse_changes_nothing(tiny_checkpoints, tiny_text_file, tmp_path):
    compress(tiny_checkpoints("llama"), tmp_path / "out", tiny_text_file, ratio=0.5)
    original, model = (open_model(str(folder))[0] for folder in (tiny_checkpoints("llama"), tmp_path / "out"))
    before = copy.deepcopy(model.state_dict())
    report = refine_end_to_end(
        model, model.model.layers, Teaching(batches(1, 4), batches(2, 2), lambda ids: original(ids).logits),
        EndToEndSettings(lr=1.0, steps=50, batch_tokens=96, every=2),
    )  # fmt: skip
    assert report.stopped == "early" and report.steps == 4 and report.best == report.start
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_checkpointing_gives_the_gradients_of_plain_autograd(tiny_checkpoints, tiny_text_file, tmp_path):
    compress(tiny_checkpoints("llama"), tmp_path / "out", tiny_text_file, ratio=0.5)
    original = open_model(str(tiny_checkpoints("llama")))[0]
    found = []
    for checkpointed in (True, False):
        model = open_model(str(tmp_path / "out"))[0]
        layers = model.model.layers if checkpointed else []
        teaching = Teaching(batches(1, 4), batches(2, 2), lambda ids: original(ids).logits)
        refine_end_to_end(model, layers, teaching, EndToEndSettings(lr=1e-3, steps=3))
        found.append(next(m for m in model.modules() if isinstance(m, LowRankLinear)).left)
    assert torch.allclose(*found, atol=1e-6)
