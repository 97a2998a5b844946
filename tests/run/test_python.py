"""lrc from Python: the same results as the command's, as values."""

from __future__ import annotations

import pytest
import torch
from commandline import contents, lrc_ok

import lrc
from lrc.errors import ModelError, RecipeError
from lrc.plan.plan import Draft, Plan
from lrc.run.layer_loop import LayerDone
from lrc.run.run import PlanMade


@pytest.fixture
def wanted(tiny_text_file):
    return {"ratio": 0.3, "calibration": {"source": f"text:{tiny_text_file}", "samples": 8, "length": 48}}


def test_compress_writes_the_bytes_of_the_command(wanted, tiny_checkpoints, tiny_text_file, tmp_path):
    model, seen = tiny_checkpoints("llama", num_hidden_layers=2), []
    result = lrc.compress(model, "svd-llm", out=tmp_path / "python", notify=seen.append, **wanted)
    lrc_ok("compress", model, "--out", tmp_path / "command", "--recipe", "svd-llm", "--ratio", 0.3,
           "--calibration", f"text:{tiny_text_file}", "--samples", 8, "--length", 48)  # fmt: skip
    assert contents(tmp_path / "python") == contents(tmp_path / "command")
    assert [event.done for event in seen if isinstance(event, LayerDone)] == [1, 2]
    assert isinstance(result.plan, Plan) and result.made
    assert (
        sum(target.bytes_before - target.bytes_after for target in result.targets) == result.bytes_before - result.bytes_after
    )
    assert result.ratio >= 0.3 > result.whole_ratio > 0
    assert all(path.is_file() for path in result.shards)


def test_a_finished_result_is_read_and_not_made_again(wanted, tiny_checkpoints, tmp_path):
    model = tiny_checkpoints("llama", num_hidden_layers=2)
    first = lrc.compress(model, "svd-llm", out=tmp_path / "out", **wanted)
    again = lrc.compress(model, "svd-llm", out=str(tmp_path / "out"), **wanted)
    assert first.made and not again.made and again.plan is None
    assert again.targets == first.targets and again.bytes_after == first.bytes_after


def test_the_final_plan_is_told_where_the_budget_looks_at_losses(wanted, tiny_checkpoints, tmp_path):
    plans = []

    def notify(event):
        if isinstance(event, PlanMade):
            plans.append(event.plan)

    lrc.compress(tiny_checkpoints("llama"), "svd-llm", out=tmp_path / "out", allocation="spectrum", notify=notify, **wanted)
    assert [type(plan) for plan in plans] == [Draft, Plan]
    assert [step.choice for step in plans[0].steps] != [step.choice for step in plans[1].steps]


def test_plan_takes_what_compress_takes_and_writes_nothing(wanted, tiny_checkpoints):
    draft = lrc.plan(tiny_checkpoints("llama"), "svd-llm", dtype="bfloat16", keep=["*.v_proj"], **wanted)
    assert isinstance(draft, Draft) and draft.dtype == torch.bfloat16
    assert {step.target.role for step in draft.steps if step.kept} == {"self_attn.v_proj"}


def test_evaluate_measures_what_compress_wrote(wanted, tiny_checkpoints, text_file, tmp_path):
    result = lrc.compress(tiny_checkpoints("llama", num_hidden_layers=2), "svd-llm", out=tmp_path / "out", **wanted)
    evaluation = lrc.evaluate(result.folder, f"text:{text_file}", length=32, max_windows=4, dtype="float32")
    (metric,) = evaluation.metrics.values()
    assert metric.value > 1 and metric.tokens == 4 * 31


def test_mistakes_are_the_command_s(tiny_checkpoints, tmp_path):
    with pytest.raises(RecipeError, match="Did you mean 'bits'"):
        lrc.compress(tiny_checkpoints("llama"), out=tmp_path / "out", bitz=4)
    with pytest.raises(ModelError, match="nowhere"):
        lrc.plan("./nowhere", "svd-llm", ratio=0.3)
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        lrc.compres  # noqa: B018
