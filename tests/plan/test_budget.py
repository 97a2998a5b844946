"""Ways of saying the budget: what they mean in bytes, what is refused, and that the files on disk keep to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commandline import lrc_ok, run_lrc
from hypothesis import given
from hypothesis import strategies as st
from pipeline import compress

from lrc.checkpoint.location import locate
from lrc.errors import BudgetError, RecipeError
from lrc.model.view import ModelView
from lrc.plan.budget import Footprint, bytes_of, rise_of, share_of, targets_bytes
from lrc.plan.load_recipe import load_recipe
from lrc.plan.planner import make_draft
from lrc.run.verify import verify

KL = {"allocation": "kl"}


def weights_on_disk(out: Path) -> int:
    return sum(path.stat().st_size for path in out.glob("*.safetensors"))


def told(overrides: dict, recipe: str = "svd-llm") -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, overrides)
    return "\n".join(caught.value.problems)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("300MB", 300_000_000), ("300 mb", 300_000_000), ("1.5GiB", 3 * 2**29), ("0.3GB", 300_000_000), ("286MiB", 286 * 2**20),
        ("12kB", 12_000), ("7B", 7), ("2TB", 2 * 10**12), (".5MB", 500_000),
    ],
)  # fmt: skip
def test_sizes_are_read_in_decimal_and_binary_units(text, nbytes):
    assert bytes_of(text) == nbytes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("300", "Did you mean 300MB or 300GB?"),
        ("300M", "Did you mean 300MB?"),
        ("3Gi", "Did you mean 3GB?"),
        ("300MBit", "unknown unit 'MBit'"),
        ("much", "is no size"),
        ("-3MB", "is no size"),
        ("0MB", "is nothing"),
        ("0.1B", "is nothing"),
    ],
)
def test_what_is_no_size_says_what_was_meant(text, said):
    assert said in told({"size": text})


@pytest.mark.parametrize(
    ("value", "rise"), [("5%", 0.05), ("0.05", 0.05), (0.05, 0.05), ("150%", 1.5), (" 5 % ".strip(), 0.05)]
)
def test_rises_of_perplexity(value, rise):
    assert rise_of(value) == pytest.approx(rise)


@pytest.mark.parametrize(
    ("value", "said"), [("5", "Did you mean 5%?"), ("0%", "above 0"), ("-1%", "above 0"), ("some", "Write 5%")]
)
def test_what_is_no_rise_of_perplexity(value, said):
    assert said in told({"max_ppl_increase": value})


def test_a_budget_is_said_once_and_the_command_line_takes_the_place_of_the_file(tmp_path):
    assert "ratio and bits say the budget 2 times" in told({"ratio": 0.2, "bits": 4})
    assert "bits: must lie above 0" in told({"bits": 0}) and "at most 32" in told({"bits": 40})
    assert "Did you mean 0.04? (Bits per weight are said as bits: 4.)" in told({"ratio": 4})
    own = tmp_path / "own.yaml"
    own.write_text("method: svd-llm\nratio: 0.3\n")
    recipe = load_recipe(str(own), {"bits": 5})
    assert recipe.ratio is None and recipe.bits == 5
    recipe = load_recipe(str(own), settings=["size=3MB"])
    assert recipe.ratio is None and recipe.size == "3000000B"
    assert load_recipe(str(own)).ratio == 0.3
    assert "allocation: own lets" in told({"bits": 4}, "energy")


@given(
    targets=st.integers(1, 10**9),
    beside=st.integers(0, 10**9),
    kept=st.floats(0, 0.5),
    ratio=st.floats(0.01, 0.99),
)
def test_every_way_of_saying_it_comes_to_the_same_bytes(targets, beside, kept, ratio):
    model = Footprint(2 * targets, targets, 2, 2 * targets + beside, kept=int(kept * 2 * targets))
    by_ratio = targets_bytes({"ratio": ratio}, model)
    assert by_ratio == int((1 - ratio) * 2 * targets + 1e-6)
    for amounts in ({"bits": 16 * (1 - ratio)}, {"size": beside + by_ratio}):
        if by_ratio <= model.kept:
            with pytest.raises(BudgetError):
                targets_bytes(amounts, model)
        else:
            budget = targets_bytes(amounts, model)
            assert abs(budget - by_ratio) <= 1
            share = share_of(budget, model)
            assert (1 - share) * model.open + model.kept == pytest.approx(budget, rel=1e-9) or budget > model.kept + model.open


@pytest.fixture
def view(tiny_checkpoints):
    return ModelView(locate(str(tiny_checkpoints("llama"))), torch.bfloat16)


@pytest.mark.parametrize(
    ("amounts", "said"),
    [
        ({"size": "20kB"}, "less than what stays as it is"),
        ({"size": "300MB"}, "is no compression: the model takes"),
        ({"bits": 16}, "is no compression: the checkpoint has 16"),
        ({"bits": 0.1}, "no form that is small enough"),
        ({"bits": 3, "keep": ["*_proj"]}, "less than what the recipe keeps dense"),
        ({}, "Add --ratio 0.2 (removes 20 % of the targets' bytes), --bits 4 or --size 300MB."),
    ],
)
def test_a_budget_that_cannot_be_is_refused_with_the_numbers(amounts, said, view):
    with pytest.raises(BudgetError) as caught:
        make_draft(view, load_recipe("svd-llm", amounts))
    assert said in str(caught.value)


@pytest.mark.parametrize("allocation", ["uniform", "spectrum", "kl"])
def test_files_on_disk_keep_to_a_size(allocation, view, tiny_checkpoints, tiny_text_file, tmp_path):
    model = tiny_checkpoints("llama")
    size = int(0.8 * view.nbytes)
    plan = compress(model, tmp_path / "out", tiny_text_file, dtype=torch.bfloat16, size=f"{size}B", allocation=allocation)
    verify(tmp_path / "out")
    # what is left is the reserve for headers, and less than one rank of each target
    ranks = sum(2 * (s.target.out_features + s.target.in_features) for s in plan.steps)
    reserve = size - weights_on_disk(tmp_path / "out")
    assert 0 <= reserve <= ranks + 30_000
    assert 0.1 < plan.ratio < 0.9


@pytest.mark.parametrize("allocation", ["uniform", "kl"])
def test_bits_are_the_mean_over_all_targets_those_that_are_kept_included(
    allocation, tiny_checkpoints, tiny_text_file, tmp_path
):
    plan = compress(
        tiny_checkpoints("llama"), tmp_path / "out", tiny_text_file, dtype=torch.bfloat16, bits=10, keep=["*.v_proj"],
        allocation=allocation,
    )  # fmt: skip
    numel = sum(step.target.numel for step in plan.steps)
    assert 9.3 <= 8 * plan.targets_after / numel <= 10
    assert all(step.choice.dense for step in plan.steps if step.target.role.endswith("v_proj"))


@pytest.mark.parametrize("way", ["bits", "size", "ratio"])
def test_whole_layers_go_until_the_budget_is_met(way, tiny_checkpoints, tiny_text_file, tmp_path):
    model = tiny_checkpoints("llama", num_hidden_layers=6)
    whole = ModelView(locate(str(model)), torch.bfloat16).nbytes
    amounts = {"bits": {"bits": 11}, "size": {"size": f"{int(0.8 * whole)}B"}, "ratio": {"ratio": 0.3}}[way]
    plan = compress(model, tmp_path / "out", tiny_text_file, "block-influence", dtype=torch.bfloat16, **amounts)
    # a third of six is enough, a sixth is not; of so small a model the headers' reserve is a layer
    assert len(plan.dropped) == 2 or (way == "size" and len(plan.dropped) == 3)
    assert all(step.choice.dense for step in plan.steps)
    if way == "size":
        assert weights_on_disk(tmp_path / "out") <= 0.8 * whole


def test_layers_and_ranks_share_a_size(view, tiny_checkpoints, tiny_text_file, tmp_path):
    size = int(0.65 * view.nbytes)
    plan = compress(
        tiny_checkpoints("llama"), tmp_path / "out", tiny_text_file, dtype=torch.bfloat16, size=f"{size}B",
        depth={"score": "last", "drop": 1},
    )  # fmt: skip
    assert weights_on_disk(tmp_path / "out") <= size
    assert len(plan.dropped) == 1 and any(not step.choice.dense for step in plan.steps)


def test_the_command_line_says_it_in_each_way(tiny_checkpoints):
    model = tiny_checkpoints("llama", dtype=torch.bfloat16)
    for flags in (["--bits", 9], ["--size", "120kB"], ["--ratio", 0.4]):
        printed = lrc_ok("plan", model, *flags)
        assert "by nystrom" in printed and "allocation kl" in printed, "lrc-fast is what nobody names"
    refused = run_lrc("plan", model, "--bits", 4, "--ratio", 0.2)
    assert refused.code == 2 and "ratio and bits" in refused.err
    refused = run_lrc("plan", model, "--size", "300")
    assert refused.code == 2 and "Did you mean 300MB" in refused.err
