"""Statistics of activations against their definitions, written anew in float64 over what plain transformers shows."""

from __future__ import annotations

import shutil
from collections import defaultdict

import numpy as np
import pytest
import torch
from pipeline import compress
from torch import nn
from transformers import AutoModelForCausalLM

from lrc.calibrate import collect, layerwise
from lrc.calibrate.data import Calibration
from lrc.calibrate.gradients import GradientSettings
from lrc.calibrate.stats import LayerCollector, MeanOuter, MeanVector, PeakMean, chunks_of, wanted
from lrc.checkpoint.location import locate
from lrc.compress.base import FORWARD_NEEDS
from lrc.compress.forms.base import linear_weight
from lrc.errors import NonFiniteError
from lrc.model.lockstep import run_layer
from lrc.model.machine.precision import full_precision
from lrc.model.view import ModelView, Target
from lrc.plan.load_recipe import load_recipe
from lrc.plan.planner import make_draft
from lrc.run.verify import verify

CPU = torch.device("cpu")
SAMPLES, LENGTH = 12, 24
TOKENS = torch.randint(3, 320, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(7))
VECTORS = FORWARD_NEEDS - {"gram", "output_gram"}


def collected(checkpoint, folder, needs=FORWARD_NEEDS, devices=(CPU,), tokens=TOKENS):
    """Target -> its statistics, by lrc."""
    view = ModelView(locate(str(checkpoint)))
    calibration = Calibration(tokens, "these tokens", ())
    asked = {target.name: frozenset(needs) for target in view.targets}
    found = collect.collect(view, calibration, asked, folder, list(devices), GradientSettings())
    return {target.name: found.read(view.layer_names[target.layer], [target.name])[target.name] for target in view.targets}


def seen(checkpoint, tokens=TOKENS):
    """Module path -> (samples, length, in) float64 that it reads, by transformers alone, all samples in one forward."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    inputs = {}

    def keep(path):
        def hook(module, args):
            inputs[path] = args[0].reshape(*tokens.shape, -1).double().numpy()

        return hook

    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            module.register_forward_pre_hook(keep(path))
    with torch.no_grad(), full_precision:  # the same products, so that the last digit of an activation is the same
        model(tokens)
    return model, inputs


def definitions(x: np.ndarray) -> dict[str, np.ndarray]:
    """The statistics of (samples, length, in) float64 activations, straight from what they are called."""
    rows = x.reshape(-1, x.shape[-1])
    return {
        "gram": sum(np.outer(row, row) for row in rows) / len(rows),
        "mean": rows.mean(0),
        "abs_mean": np.abs(rows).mean(0),
        "mean_square": (rows**2).mean(0),
        "peak_abs_mean": np.abs(x).mean(1).max(0),
    }


def assert_close(found: torch.Tensor, expected: np.ndarray, relative: float, what: str) -> None:
    assert found.dtype == torch.float32 and tuple(found.shape) == expected.shape, what
    gap = np.abs(found.double().numpy() - expected).max() / np.abs(expected).max()
    assert gap < relative, f"{what}: off by {gap:.1e} of its largest entry"


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3", "opt", "gpt2", "gpt_neox"])
def test_statistics_are_what_they_are_called(family, tiny_checkpoints, tmp_path):
    found = collected(tiny_checkpoints(family), tmp_path / "statistics")
    _, inputs = seen(tiny_checkpoints(family))
    for name, stats in found.items():
        assert stats.group.tokens == SAMPLES * LENGTH
        for statistic, expected in definitions(inputs[name]).items():
            if (family, statistic) != ("opt", "peak_abs_mean"):
                assert_close(getattr(stats.group, statistic), expected, 2e-5, f"{name} {statistic}")
        assert torch.equal(stats.group.gram, stats.group.gram.T), "half of a gram is computed, the other half mirrored"


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_the_second_moment_of_the_outputs_leaves_the_bias_out(family, tiny_checkpoints, tmp_path):
    """Asked for on its own it comes from whichever side is cheaper; both answer the same question."""
    found = collected(tiny_checkpoints(family), tmp_path / "statistics", {"output_gram"})
    model, inputs = seen(tiny_checkpoints(family))
    sides = set()
    for name, stats in found.items():
        stored = model.get_submodule(name).weight.detach().double().numpy()
        weight = stored.T if type(model.get_submodule(name)).__name__ == "Conv1D" else stored
        expected = weight @ definitions(inputs[name])["gram"] @ weight.T
        if stats.output_gram is None:
            gram = stats.group.gram.double().numpy()
            assert_close(torch.from_numpy(weight @ gram @ weight.T).float(), expected, 2e-5, name)
            sides.add("input")
        else:
            assert stats.group.gram is None, "never both"
            assert_close(stats.output_gram, expected, 2e-5, name)
            sides.add("output")
    assert sides == {"input", "output"}


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_large_bias_costs_the_second_moment_of_the_outputs_no_digits(family, tiny_checkpoints, tmp_path):
    """In 16 bits, what rounding leaves of W x + b is little where b is large."""
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoints(family), dtype=torch.bfloat16)
    biased = [module for name, module in model.named_modules() if name.endswith(("mlp.c_proj", "fc2"))]
    for module in biased:
        module.bias.data.normal_(generator=torch.Generator().manual_seed(3)).mul_(100)
    assert len(biased) == 3
    model.save_pretrained(tmp_path / "model")
    for file in tiny_checkpoints(family).glob("tokenizer*"):
        shutil.copy(file, tmp_path / "model")
    both = collected(tmp_path / "model", tmp_path / "both", {"gram", "output_gram"})
    checked = 0
    for name, stats in collected(tmp_path / "model", tmp_path / "one", {"output_gram"}).items():
        if stats.output_gram is not None:
            weight = linear_weight(model.get_submodule(name)).double()
            assert_close(stats.output_gram, (weight @ both[name].group.gram.double() @ weight.T).detach().numpy(), 0.02, name)
            checked += 1
    assert checked >= 3


def test_experts_are_told_by_the_tokens_that_the_router_sent_them(tiny_checkpoints, tmp_path):
    found = collected(tiny_checkpoints("mixtral"), tmp_path / "statistics")
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoints("mixtral")).eval()
    routed = defaultdict(list)
    for path, module in model.named_modules():
        if path.endswith("mlp.experts"):
            module.register_forward_pre_hook(lambda m, args, path=path: routed[path].extend(args[:2]))
    with torch.no_grad():
        model(TOKENS)
    checked = 0
    for path, (hidden, chosen) in routed.items():
        fused = model.get_submodule(path).gate_up_proj.detach().double().numpy()
        for expert in range(4):
            x = hidden[(chosen == expert).any(-1)].double().numpy()
            gate, up = np.split(x @ fused[expert].T, 2, axis=1)
            between = gate / (1 + np.exp(-gate)) * up
            for parameter, rows in (("gate_up_proj", x), ("down_proj", between)):
                stats = found[f"{path}.{parameter}.{expert}"].group
                assert 0 < stats.tokens == len(rows) < SAMPLES * LENGTH
                for statistic in ("gram", "mean", "abs_mean", "mean_square"):
                    assert_close(getattr(stats, statistic), definitions(rows[None])[statistic], 2e-5, f"{path} {statistic}")
                checked += 1
    assert checked == 3 * 4 * 2


@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
@pytest.mark.parametrize("batch", [1, 5])
def test_batches_and_workers_do_not_matter(family, batch, tiny_checkpoints, tmp_path, monkeypatch):
    """5 does not divide 12 samples, and two workers get unequal shares: a mean of means would be another number."""
    whole = collected(tiny_checkpoints(family), tmp_path / "whole")
    monkeypatch.setattr(collect, "TOKENS_PER_BATCH", batch * LENGTH)
    split = collected(tiny_checkpoints(family), tmp_path / "split")
    shared = collected(tiny_checkpoints(family), tmp_path / "shared", devices=(CPU, CPU))
    for name, stats in whole.items():
        for other in (split[name].group, shared[name].group):
            assert other.tokens == stats.group.tokens
            for statistic in ("gram", *sorted(VECTORS)):
                if statistic == "peak_abs_mean" and family == "mixtral":
                    continue  # routing hides which sample a token came from
                one, two = getattr(stats.group, statistic), getattr(other, statistic)
                assert_close(two, one.double().numpy(), 2e-5, f"{name} {statistic}")


def test_peaks_where_samples_are_flattened(tiny_checkpoints, tmp_path):
    """OPT hands (samples x tokens, n) to fc1; the sample's mean is meant all the same."""
    found = collected(tiny_checkpoints("opt"), tmp_path / "statistics", {"peak_abs_mean"})
    _, inputs = seen(tiny_checkpoints("opt"))
    for name, stats in found.items():
        assert_close(stats.group.peak_abs_mean, definitions(inputs[name])["peak_abs_mean"], 2e-5, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_activations_are_summed_in_float32(dtype, tiny_checkpoints, tmp_path):
    checkpoint = tiny_checkpoints("llama", dtype=dtype)
    found = collected(checkpoint, tmp_path / "statistics")
    _, inputs = seen(checkpoint)
    # the very same 16-bit activations, so the difference is the accumulation's own: far below 16-bit rounding (1e-3)
    for name, stats in found.items():
        for statistic, expected in definitions(inputs[name]).items():
            assert_close(getattr(stats.group, statistic), expected, 2e-5, f"{name} {statistic}")


def test_float16_activations_whose_squares_overflow_float16():
    layer, target = nn.ModuleDict({"up": nn.Linear(6, 4, bias=False).half()}), up_target(6, 4)
    x = torch.full((2, 3, 6), 60_000.0, dtype=torch.float16)
    with LayerCollector(layer, "layers.0", [target], wanted([target], {target.name: FORWARD_NEEDS}), CPU) as collector:
        layer["up"].weight.data.zero_()
        layer["up"](x)
    stats = collector.result()[target.name].group
    for statistic, expected in definitions(x.double().numpy()).items():
        assert_close(getattr(stats, statistic), expected, 1e-6, statistic)


def up_target(in_features: int, out_features: int) -> Target:
    return Target("layers.0.up", "layers.0.up", 0, "up", "layers.0.up", out_features, in_features, False)


def test_many_small_batches_lose_no_digits():
    """Thousands of updates, as for a seldom chosen expert; constant activations, because then every rounding has one sign."""
    x = torch.tensor([[0.1, 1 / 3, 1e-3, 7.7]])
    accumulators = {
        "gram": MeanOuter(4, CPU),
        "mean": MeanVector(4, CPU, lambda x: x),
        "mean_square": MeanVector(4, CPU, torch.square),
        "peak_abs_mean": PeakMean(4, CPU),
    }
    count = 4_000
    for _ in range(count):
        for mean in accumulators.values():
            mean.add(x)
    expected = definitions(x[None].double().numpy())
    for name, mean in accumulators.items():
        assert mean.tokens == count
        gap = (np.abs(mean.result().double().numpy() - expected[name]) / expected[name]).max()
        assert gap < 1e-5, f"{name}: {gap:.1e}"


def test_a_large_batch_and_a_small_one_weigh_by_their_tokens():
    """Widths on both sides of the one from which a gram is computed in blocks, and one that no block divides."""
    rng = np.random.default_rng(0)
    for width in (5, 256, 331):
        x = rng.normal(3.0, 1.0, (700, width)).astype(np.float32)  # a mean far from zero, where cancellation would show
        mean = MeanOuter(width, CPU)
        for part in np.split(x, [1, 650]):
            mean.add(torch.from_numpy(part))
        wide = x.astype(np.float64)
        assert_close(mean.result(), wide.T @ wide / len(x), 1e-6, f"width {width}")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("statistic", sorted(FORWARD_NEEDS))
def test_one_activation_that_is_not_finite_is_an_error_with_a_name(bad, statistic):
    layer, target = nn.ModuleDict({"up": nn.Linear(9, 4, bias=False)}), up_target(9, 4)
    x = torch.randn(2, 5, 9)
    with LayerCollector(layer, "layers.0", [target], wanted([target], {target.name: frozenset({statistic})}), CPU) as collector:
        layer["up"](x)
        x[1, 2, 3] = bad
        layer["up"](x)
        layer["up"](torch.randn(2, 5, 9))  # what comes later does not hide it
    with pytest.raises(NonFiniteError, match=rf"layers\.0\.up: its {statistic} over 30 tokens is not finite") as caught:
        collector.result()
    assert "--dtype" in caught.value.remedy


def test_no_hook_is_left_behind(tiny_checkpoints):
    view = ModelView(locate(str(tiny_checkpoints("llama"))))
    targets = [target for target in view.targets if target.layer == 0]
    layer = view.load("model.layers.0")
    what = wanted(targets, {target.name: FORWARD_NEEDS for target in targets})
    with pytest.raises(KeyboardInterrupt), LayerCollector(layer, "model.layers.0", targets, what, CPU):
        raise KeyboardInterrupt
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in layer.modules())


@pytest.mark.parametrize("keep", ["*.gate_proj", "*.up_proj"])
def test_a_target_whose_partner_stays_dense_has_its_statistics_all_the_same(keep, tiny_checkpoints, tiny_text_file, tmp_path):
    """Gate and up read one input; whichever of them is compressed alone must have seen every token."""
    compress(tiny_checkpoints("llama"), tmp_path / "out", tiny_text_file, ratio=0.3, keep=[keep])
    solved = [target for target in verify(tmp_path / "out")["targets"] if target["form"]["kind"] != "dense"]
    assert solved and {target["tokens"] for target in solved} == {8 * 48}
    assert all(target["error"] > 0 for target in solved)


def targets_like(*described: tuple[str, str, int]) -> list[Target]:
    """Square targets of a layer: (name, group, width)."""
    return [Target(name, name, 0, name, group, width, width, False) for name, group, width in described]


def names(chunks) -> list[str]:
    return ["".join(target.name for target in chunk) for chunk in chunks]


def test_chunks_keep_groups_and_units_whole_and_stay_within_the_budget():
    targets = targets_like(("a", "a", 2), ("b", "b", 2), ("c", "a", 2), ("d", "d", 4), ("e", "e", 2))
    gram = wanted(targets, {target.name: frozenset({"gram"}) for target in targets}).nbytes
    assert gram(targets) == 4 * (4 + 4 + 16 + 4)
    assert names(chunks_of(targets, gram)) == ["abcde"], "one chunk where all fit"
    assert names(chunks_of(targets, gram, budget=1)) == ["ac", "b", "d", "e"]
    assert names(chunks_of(targets, gram, budget=32)) == ["abc", "d", "e"], "d alone takes more than the budget"
    assert names(chunks_of(targets, gram, [["b", "e"], ["of another layer", "d"]], budget=1)) == ["ac", "be", "d"]
    assert names(chunks_of(targets, gram, [["c", "e"], ["e", "d"]], budget=1)) == ["acde", "b"], "what is shared joins both"
    assert names(chunks_of([], gram, budget=1)) == [""], "a layer without targets runs once all the same"


@pytest.fixture
def watched(monkeypatch):
    """What is allocated for statistics, and how often a layer runs: (bytes of each collector, forwards)."""
    allocated: list[int] = []
    forwards: list[nn.Module] = []

    class Counted(LayerCollector):
        def __init__(self, layer, prefix, targets, what, device) -> None:
            super().__init__(layer, prefix, targets, what, device)
            allocated.append(sum(mean.value.nbytes for mean in self._means.values()))
            assert allocated[-1] == what.nbytes(targets)

    def run(layer, call):
        forwards.append(layer)
        return run_layer(layer, call)

    monkeypatch.setattr(layerwise, "LayerCollector", Counted)
    monkeypatch.setattr(layerwise, "run_layer", run)
    return allocated, forwards


@pytest.mark.parametrize("family", ["mixtral", "llama", "opt"])
@pytest.mark.parametrize("needs", [FORWARD_NEEDS, {"output_gram"}])
def test_chunks_do_not_change_a_bit(family, needs, tiny_checkpoints, tmp_path, monkeypatch, watched):
    allocated, forwards = watched
    monkeypatch.setattr(collect, "TOKENS_PER_BATCH", 5 * LENGTH)  # three batches, of which the last is smaller
    whole = collected(tiny_checkpoints(family), tmp_path / "whole", needs)
    assert len(allocated) == 3 and len(forwards) == 3 * 3, "one forward of every batch through every layer"
    largest = max(allocated)
    allocated.clear()
    forwards.clear()
    monkeypatch.setattr("lrc.calibrate.stats.STATISTICS_AT_ONCE", 1)
    split = collected(tiny_checkpoints(family), tmp_path / "split", needs)
    groups = {target.group for target in ModelView(locate(str(tiny_checkpoints(family)))).targets}
    assert len(forwards) == 3 * len(groups), "one forward of every batch for every group"
    assert max(allocated) < largest / (2 if family == "mixtral" else 1)
    assert split.keys() == whole.keys()
    for name, one in whole.items():
        two = split[name]
        assert two.group.tokens == one.group.tokens
        for statistic in FORWARD_NEEDS:
            value, same = (getattr(x if statistic == "output_gram" else x.group, statistic) for x in (one, two))
            assert (value is None) == (same is None), f"{name} {statistic}"
            assert value is None or torch.equal(value, same), f"{name} {statistic}"


def test_chunks_over_two_devices(tiny_checkpoints, tmp_path, monkeypatch):
    """Two threads round in an order of their own from run to run, with or without chunks."""
    whole = collected(tiny_checkpoints("mixtral"), tmp_path / "whole", devices=(CPU, CPU))
    monkeypatch.setattr("lrc.calibrate.stats.STATISTICS_AT_ONCE", 1)
    for name, stats in collected(tiny_checkpoints("mixtral"), tmp_path / "split", devices=(CPU, CPU)).items():
        assert stats.group.tokens == whole[name].group.tokens
        for statistic in ("gram", *sorted(VECTORS)):
            assert_close(getattr(stats.group, statistic), getattr(whole[name].group, statistic).double().numpy(), 2e-6, name)


def test_a_layer_that_is_interrupted_between_chunks_is_collected_anew(tiny_checkpoints, tmp_path, monkeypatch):
    whole = collected(tiny_checkpoints("mixtral"), tmp_path / "whole", {"gram"})
    monkeypatch.setattr("lrc.calibrate.stats.STATISTICS_AT_ONCE", 1)
    collect, count = layerwise._collect, 0

    def stop(*arguments):
        nonlocal count
        count += 1
        if count == 15:
            raise KeyboardInterrupt
        return collect(*arguments)

    monkeypatch.setattr(layerwise, "_collect", stop)
    with pytest.raises(KeyboardInterrupt):
        collected(tiny_checkpoints("mixtral"), tmp_path / "split", {"gram"})
    left = {path.name for path in (tmp_path / "split").glob("*.safetensors")}
    assert "model.layers.0.safetensors" in left and "model.layers.1.part-0.safetensors" in left
    assert "model.layers.1.safetensors" not in left
    split = collected(tiny_checkpoints("mixtral"), tmp_path / "split", {"gram"})
    assert all(torch.equal(split[name].group.gram, stats.group.gram) for name, stats in whole.items())


def test_a_plan_counts_the_largest_chunk_and_keeps_units_whole(tiny_checkpoints, monkeypatch):
    view = ModelView(locate(str(tiny_checkpoints("mixtral"))))
    recipe = load_recipe("nystrom", {"ratio": 0.3, "calibration.samples": 8, "calibration.length": 48})
    plan = make_draft(view, recipe)
    assert [len(plan.chunks(layer)) for layer in range(3)] == [1, 1, 1]
    monkeypatch.setattr("lrc.calibrate.stats.STATISTICS_AT_ONCE", 1)
    split = make_draft(view, recipe)
    chunks = [{target.name for target in chunk} for chunk in split.chunks(0)]
    assert set().union(*chunks) == {target.name for target in split.solved(0)} and len(chunks) >= 4
    for unit in split.units:
        members = {target.name for target in unit.targets if target.layer == 0} & set().union(*chunks)
        assert not members or sum(bool(members & chunk) for chunk in chunks) == 1
    whole, largest = split.wanted(0).nbytes(split.solved(0)), max(split.wanted(0).nbytes(chunk) for chunk in split.chunks(0))
    for moment in ("forward", "solve"):
        assert plan.memory.moments[moment] - split.memory.moments[moment] == 2 * (whole - largest) > 0
