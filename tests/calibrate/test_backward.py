"""Gradient statistics of the streamed pass against autograd through whole models."""

from __future__ import annotations

import shutil
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from lrc.calibrate import backward
from lrc.calibrate.backward import GradientPass, collect_gradients, draw, uniforms
from lrc.calibrate.gradients import GradientCollector, GradientSettings, gradient_bytes
from lrc.calibrate.store import StatsStore
from lrc.checkpoint.location import locate
from lrc.compress.forms import experts
from lrc.compress.forms.base import linear_shape, linear_weight
from lrc.errors import CheckpointError, ModelError, NonFiniteError, OutputError
from lrc.model.events import Event
from lrc.model.view import ModelView
from lrc.plan.load_recipe import load_recipe
from lrc.plan.planner import make_draft

SAMPLES, LENGTH = 5, 24
NEEDS = frozenset({"grad_gram", "fisher_in"})
PLAIN = GradientSettings(labels="data", clip=None)
CPU = torch.device("cpu")


def token_ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 320, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(seed))


def view_of(folder: Path, dtype: torch.dtype = torch.float64) -> ModelView:
    return ModelView(locate(str(folder)), dtype)


def run_back(view: ModelView, out: Path, settings=PLAIN, batch=2, needs=NEEDS, devices=(CPU,), **options) -> StatsStore:
    """The statistics of these tokens' gradients, on disk."""
    return collect_gradients(GradientPass(view, token_ids(), batch, needs, settings, devices), out, **options)


def read_all(view: ModelView, store: StatsStore):
    """All layers' statistics, read back from disk: target -> TargetStats."""
    found = {}
    for index, layer in enumerate(view.layer_names):
        found |= store.read(layer, [target.name for target in view.targets if target.layer == index])
    return found


def collect(folder: Path, out: Path, settings=PLAIN, dtype=torch.float64, **options):
    view = view_of(folder, dtype)
    return read_all(view, run_back(view, out, settings, **options))


class Whole:
    """Autograd through a whole model, a sample at a time: each target's token gradients and its weight's gradient."""

    def __init__(self, folder: Path, dtype: torch.dtype, monkeypatch, seed: int | None = None) -> None:
        experts.register()
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation=experts.IMPLEMENTATION)
        view = view_of(folder, dtype)
        self.tokens: dict[str, list[torch.Tensor]] = defaultdict(list)  # target -> per sample (tokens, out)
        self.weights: dict[str, list[torch.Tensor]] = defaultdict(list)  # target -> per sample (out, in)
        self._seen: dict[str, torch.Tensor] = {}
        for target in view.targets:
            if target.expert is None:
                module = self.model.get_submodule(target.module)
                module.register_forward_hook(lambda _m, _a, y, name=target.name: self._see(name, y))
        paths = {module: path for path, module in self.model.named_modules()}
        plain = experts._multiply

        def multiply(module, parameter, expert, x):
            y = plain(module, parameter, expert, x)
            self._see(f"{paths[module]}.{parameter}.{expert}", y)
            return y

        monkeypatch.setattr(experts, "_multiply", multiply)
        for number, ids in enumerate(token_ids()):
            self._seen.clear()
            self.model.zero_grad()
            logits = self.model(ids[None], use_cache=False).logits[0]
            if seed is None:
                loss = cross_entropy(logits[:-1], ids[1:], reduction="sum")
            else:
                labels = draw(logits.detach().softmax(-1), uniforms(seed, number, LENGTH))
                loss = cross_entropy(logits, labels, reduction="sum")
            loss.backward()
            for target in view.targets:
                self._keep(target)
        monkeypatch.undo()

    def _see(self, name: str, y: torch.Tensor) -> None:
        y.retain_grad()
        self._seen[name] = y

    def _keep(self, target) -> None:
        if target.expert is None:
            module = self.model.get_submodule(target.module)
            gradient = module.weight.grad
            gradient = gradient if isinstance(module, torch.nn.Linear) else gradient.T
            assert gradient.shape == linear_shape(module) == linear_weight(module).shape
        else:
            parameter = self.model.get_parameter(target.name.rpartition(".")[0])
            gradient = parameter.grad[target.expert]
        self.weights[target.name].append(gradient.clone())
        y = self._seen.get(target.name)
        rows = torch.zeros(0, target.out_features, dtype=gradient.dtype) if y is None else y.grad
        self.tokens[target.name].append(rows.reshape(-1, target.out_features))

    def grad_gram(self, name: str) -> torch.Tensor:
        rows = torch.cat(self.tokens[name])
        return rows.T @ rows / max(1, len(rows))

    def fisher_in(self, name: str) -> torch.Tensor:
        return torch.stack([gradient.square().sum(0) for gradient in self.weights[name]]).mean(0)


def close(mine: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((mine.double() - theirs.double()).norm() <= tolerance * theirs.double().norm())


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, torch.float64) for family in ("llama", "gpt2", "gemma3_text", "mixtral", "opt", "phi3")]
    + [("llama", torch.float32), ("mixtral", torch.float32)],
)
def test_streamed_statistics_are_those_of_autograd_through_the_whole_model(
    family, dtype, tiny_checkpoints, tmp_path, monkeypatch
):
    whole = Whole(tiny_checkpoints(family), dtype, monkeypatch)
    stats = collect(tiny_checkpoints(family), tmp_path / "out", dtype=dtype)
    assert set(stats) == set(whole.tokens) and len(stats) >= 12
    for name, mine in stats.items():
        assert mine.group.tokens == sum(len(rows) for rows in whole.tokens[name])
        assert float(whole.grad_gram(name).norm()) > 0
        assert close(mine.grad_gram, whole.grad_gram(name)), name
        assert close(mine.fisher_in, whole.fisher_in(name)), name


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_mean_gradient_of_a_weight_is_that_of_autograd_per_token(family, tiny_checkpoints, tmp_path, monkeypatch):
    whole = Whole(tiny_checkpoints(family), torch.float64, monkeypatch)
    stats = collect(tiny_checkpoints(family), tmp_path / "out", needs=frozenset({"weight_grad"}))
    two = collect(tiny_checkpoints(family), tmp_path / "two", needs=frozenset({"weight_grad"}), devices=[CPU, CPU])
    for name, mine in stats.items():
        expected = torch.stack(whole.weights[name]).sum(0) / (SAMPLES * LENGTH)
        assert mine.weight_grad.shape == expected.shape and close(mine.weight_grad, expected), name
        assert close(two[name].weight_grad, expected), name


def test_labels_drawn_from_the_model_are_a_seeds_and_a_samples_own(tiny_checkpoints, tmp_path, monkeypatch):
    whole = Whole(tiny_checkpoints("llama"), torch.float64, monkeypatch, seed=7)
    settings = GradientSettings(labels="sampled", clip=None, seed=7)
    stats = collect(tiny_checkpoints("llama"), tmp_path / "out", settings)
    for name, mine in stats.items():
        assert close(mine.grad_gram, whole.grad_gram(name)), name
    other = collect(tiny_checkpoints("llama"), tmp_path / "other", settings.model_copy(update={"seed": 8}))
    assert not close(other[name].grad_gram, stats[name].grad_gram, 0.01)


def test_labels_follow_the_distribution_and_never_leave_it():
    p = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    labels = draw(p.expand(20_000, -1), uniforms(0, 0, 20_000))
    shares = torch.bincount(labels, minlength=6) / 20_000
    assert torch.allclose(shares, p, atol=0.015)
    assert shares[[0, 2, 5]].sum() == 0
    edges = draw(p.expand(2, -1), torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert edges.tolist() == [1, 4]


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_clipping_is_a_band_around_each_samples_mean_and_trimming_cuts_both_ends(
    family, tiny_checkpoints, tmp_path, monkeypatch
):
    whole = Whole(tiny_checkpoints(family), torch.float64, monkeypatch)
    clipped = collect(tiny_checkpoints(family), tmp_path / "a", GradientSettings(labels="data", clip=(0.8, 1.2)))
    for name, mine in clipped.items():
        parts = []
        for rows in whole.tokens[name]:
            norm = rows.norm(dim=1)
            wanted = norm.clamp(0.8 * norm.mean(), 1.2 * norm.mean()) if len(rows) else norm
            parts.append(torch.where(norm[:, None] > 0, rows * (wanted / norm)[:, None], 0.0))
        rows = torch.cat(parts)
        assert close(mine.grad_gram, rows.T @ rows / max(1, len(rows))), name
        assert close(mine.fisher_in, whole.fisher_in(name)), name
    trimmed = collect(tiny_checkpoints(family), tmp_path / "b", GradientSettings(labels="data", clip=None, trim=0.25))
    for name, mine in trimmed.items():
        if name.startswith("model.layers.1.self_attn"):
            rows = torch.cat([rows[6:-6] for rows in whole.tokens[name]])
            assert close(mine.grad_gram, rows.T @ rows / len(rows)), name
            assert mine.group.tokens == SAMPLES * (LENGTH - 12)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_neither_batches_nor_devices_change_the_result(family, tiny_checkpoints, tmp_path):
    settings = GradientSettings(clip=(0.5, 2.0), trim=0.1)
    one = collect(tiny_checkpoints(family), tmp_path / "1", settings, batch=1)
    for number, options in enumerate(({"batch": 3}, {"batch": 5}, {"batch": 2, "devices": (CPU, CPU)})):
        other = collect(tiny_checkpoints(family), tmp_path / f"o{number}", settings, **options)
        for name, mine in other.items():
            assert mine.group.tokens == one[name].group.tokens
            assert close(mine.grad_gram, one[name].grad_gram) and close(mine.fisher_in, one[name].fisher_in)


def test_gradients_that_are_collected_one_target_at_a_time_are_the_same(tiny_checkpoints, tmp_path, monkeypatch):
    """One forward and backward of the layer for each target, and the same numbers to the last bit."""
    folder, needs = tiny_checkpoints("mixtral"), NEEDS | {"weight_grad"}
    whole = collect(folder, tmp_path / "whole", GradientSettings(), torch.float32, needs=needs)
    largest = max(gradient_bytes([target], needs) for target in view_of(folder).targets)
    monkeypatch.setattr("lrc.calibrate.stats.STATISTICS_AT_ONCE", 1)
    seen = []

    class Counted(GradientCollector):
        def __init__(self, layer, prefix, targets, *more) -> None:
            seen.append((len(targets), gradient_bytes(targets, needs)))
            super().__init__(layer, prefix, targets, *more)

    monkeypatch.setattr(backward, "GradientCollector", Counted)
    single = collect(folder, tmp_path / "single", GradientSettings(), torch.float32, needs=needs)
    assert {count for count, _ in seen if count > 1} <= {2, 3}, "targets that read one input stay together"
    assert max(nbytes for _, nbytes in seen) <= 3 * largest
    assert single.keys() == whole.keys()
    for name, mine in single.items():
        assert mine.group.tokens == whole[name].group.tokens
        for statistic in needs:
            assert torch.equal(getattr(mine, statistic), getattr(whole[name], statistic)), f"{name} {statistic}"


def test_only_what_is_asked_for_is_collected_and_only_of_the_targets_named(tiny_checkpoints, tmp_path):
    view = view_of(tiny_checkpoints("llama"))
    view.targets = [target for target in view.targets if target.role == "mlp.down_proj" and target.layer > 0]
    found = read_all(view, run_back(view, tmp_path, needs=frozenset({"fisher_in"})))
    assert list(found) == ["model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"]
    for stats in found.values():
        assert stats.grad_gram is None and stats.fisher_in.shape == (80,)
    with pytest.raises(ValueError, match="gram"):
        run_back(view, tmp_path, needs=frozenset({"gram"}))


class PowerCutError(Exception):
    """What a test throws in the place of a power cut."""


def test_a_killed_pass_goes_on_at_its_layer_and_ends_the_same(tiny_checkpoints, tmp_path):
    folder, settings = tiny_checkpoints("gemma3_text"), GradientSettings()
    expected = collect(folder, tmp_path / "whole", settings)

    def die(event: Event) -> None:
        if event.done == 2:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        collect(folder, tmp_path / "out", settings, notify=die)
    view = view_of(folder)
    loaded: list[str] = []
    load = view.load
    view.load = lambda name: (loaded.append(name), load(name))[1]
    finished: list[int] = []
    # the batches of the second try need not be those of the first
    store = run_back(view, tmp_path / "out", settings, batch=3, notify=lambda event: finished.append(event.done))
    assert finished == [3] and loaded == ["model.layers.0"]
    for name, stats in read_all(view, store).items():
        assert close(stats.grad_gram, expected[name].grad_gram) and close(stats.fisher_in, expected[name].fisher_in)
    assert not (tmp_path / "out" / backward.SPILL).exists()
    loaded.clear()
    run_back(view, tmp_path / "out", settings, batch=3)
    assert loaded == []


def test_statistics_that_were_deleted_meanwhile_are_an_error(tiny_checkpoints, tmp_path):
    store = run_back(view_of(tiny_checkpoints("llama")), tmp_path)
    (tmp_path / "model.layers.0.safetensors").unlink()
    with pytest.raises(CheckpointError, match="collected anew"):
        store.read("model.layers.0", ["model.layers.0.mlp.down_proj"])


def test_a_finished_layer_whose_file_is_gone_is_made_again(tiny_checkpoints, tmp_path):
    expected = collect(tiny_checkpoints("llama"), tmp_path / "whole", PLAIN)

    def die(event: Event) -> None:
        if event.done == 2:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        collect(tiny_checkpoints("llama"), tmp_path / "out", PLAIN, notify=die)
    (tmp_path / "out" / "model.layers.2.safetensors").unlink()
    again = collect(tiny_checkpoints("llama"), tmp_path / "out", PLAIN)
    assert set(again) == set(expected)
    assert all(torch.equal(again[name].grad_gram, expected[name].grad_gram) for name in expected)


def test_a_pass_of_something_else_starts_over(tiny_checkpoints, tmp_path):
    def die(event: Event) -> None:
        raise PowerCutError

    with pytest.raises(PowerCutError):
        collect(tiny_checkpoints("llama"), tmp_path / "out", PLAIN, notify=die)
    sampled = GradientSettings(clip=None)
    expected = collect(tiny_checkpoints("llama"), tmp_path / "whole", sampled)
    for name, stats in collect(tiny_checkpoints("llama"), tmp_path / "out", sampled).items():
        assert torch.equal(stats.grad_gram, expected[name].grad_gram)
    # a layer's file that was deleted is made again
    (tmp_path / "out" / "model.layers.2.safetensors").unlink()
    for name, stats in collect(tiny_checkpoints("llama"), tmp_path / "out", sampled).items():
        assert torch.equal(stats.grad_gram, expected[name].grad_gram)


def test_never_two_layers_are_in_memory_and_nothing_stays_behind(tiny_checkpoints, tmp_path):
    view = view_of(tiny_checkpoints("mixtral"))
    load, most = view.load, []

    def counted(name):
        layer = load(name)
        most.append(sum(not p.is_meta for each in view.layers for p in each.parameters()) - len(list(layer.parameters())))
        assert all(p.is_meta for p in view.model.get_input_embeddings().parameters())
        return layer

    view.load = counted
    before = {name for name, _ in view.model.named_modules()}
    run_back(view, tmp_path)
    assert most == [0] * 6
    assert all(p.is_meta for p in view.model.parameters())
    assert {name for name, _ in view.model.named_modules()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in view.model.modules())


def test_overflow_and_a_full_disk_are_said(tiny_checkpoints, tmp_path, monkeypatch):
    view = view_of(tiny_checkpoints("llama"), torch.float32)
    load = view.load

    def huge(name):
        layer = load(name)
        if name.endswith("2"):
            layer.mlp.down_proj.weight.fill_(3e38)
        return layer

    view.load = huge
    with pytest.raises(NonFiniteError, match="model.layers.2"):
        run_back(view, tmp_path / "a")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("lrc.calibrate.spill.shutil.disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OutputError, match="GB free"):
        collect(tiny_checkpoints("llama"), tmp_path / "b")


def test_a_target_whose_rows_are_not_tokens_is_refused(tiny_checkpoints, tmp_path):
    view = view_of(tiny_checkpoints("llama"))
    load = view.load

    def halved(name):
        mlp = load(name).mlp
        mlp.forward = lambda x: torch.cat([type(mlp).forward(mlp, x[:, :12]), x[:, 12:]], 1)
        return view.model.get_submodule(name)

    view.load = halved
    with pytest.raises(ModelError, match="12 rows for 24 tokens"):
        run_back(view, tmp_path, batch=1)
    with pytest.raises(ValueError, match="clip"):
        GradientSettings(clip=(2.0, 3.0))


def test_a_plan_counts_the_logits_of_a_backward_pass(tiny_checkpoints):
    """Of one batch: the logits and their gradient, both whole."""
    view = ModelView(locate(str(tiny_checkpoints("llama"))), None)
    settings = {"ratio": 0.3, "calibration.samples": 8, "calibration.length": 48}
    plain, back = (make_draft(view, load_recipe(name, settings)) for name in ("svd-llm", "kfac"))
    logits = back.batch * 48 * view.config.vocab_size * view.dtype.itemsize
    assert "backward" not in plain.memory.moments and back.memory.moments["backward"] > 2 * logits
    assert plain.memory.peak - plain.memory.process < back.memory.peak - back.memory.process
