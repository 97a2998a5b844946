"""Every shipped recipe with every way to say a size: it is followed, or the first line says both numbers, or it is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from commandline import lrc_ok, run_lrc

from lrc.checkpoint.location import locate
from lrc.errors import RequestError
from lrc.model.view import ModelView
from lrc.plan.load_recipe import load_recipe, shipped
from lrc.plan.plan import Draft
from lrc.plan.planner import make_draft
from lrc.run import search

GRAIN = 0.01  # of the targets' bytes: a larger difference needs a reason
SHARES = (0.97, 0.45, 0.1)  # of the targets' bytes
WHOLE = [{"bits": bits} for bits in (3, 8)]


@pytest.fixture(scope="module")
def view(tiny_checkpoints):
    return ModelView(locate(str(tiny_checkpoints("llama", num_hidden_layers=6, dtype=torch.bfloat16))))


def requests(view: ModelView) -> list[dict]:
    """Sizes in every word, from nearly everything to nearly nothing, and those that no recipe can follow."""
    targets = sum(target.numel * 2 for target in view.targets)
    beside = view.nbytes - targets + 40_000  # with room for headers
    each = [{"ratio": 1 - share} for share in SHARES] + [{"bits": 16 * share} for share in SHARES]
    each += [{"size": f"{int(beside + share * targets)}B"} for share in SHARES]
    odd = [{"ratio": 0}, {"ratio": 0.01}, {"bits": 16}, {"size": "1GB"}, {"size": "1kB"}, {"max_ppl_increase": "5%"}]
    return [*each, *WHOLE, *odd]


def asked_bytes(budget: dict, draft: Draft) -> float:
    """The bytes of the targets that a budget asks for."""
    if "bits" in budget:
        return budget["bits"] * sum(step.target.numel for step in draft.steps) / 8
    if "size" in budget:
        return int(budget["size"][:-1]) - draft.header_bytes - (draft.whole_after - draft.targets_after)
    return (1 - budget["ratio"]) * draft.targets_before


@pytest.mark.parametrize("name", shipped())
def test_a_request_is_followed_or_both_numbers_are_said_or_it_is_refused(name, view):
    followed = 0
    for budget in requests(view):
        try:
            draft = make_draft(view, load_recipe(name, budget))
        except RequestError:
            continue
        followed += 1
        said = draft.request
        if "max_ppl_increase" in budget:
            assert said == "asked a perplexity of at most +5.00%"
            continue
        (value,) = budget.values()
        shown = f"{value:.5g}" if not isinstance(value, str) else r"[\d.]+ [kMG]?B of weight files"
        planned = re.match(rf"asked (?:ratio )?{shown}.*?, planned (?:at most )?([\d.]+)", said)
        assert planned, (budget, said)
        if "bits" in budget:
            assert float(planned[1]) == pytest.approx(draft.bits, rel=1e-3)
        elif "ratio" in budget:
            assert float(planned[1]) == pytest.approx(draft.ratio, rel=1e-3, abs=1e-4)
        missed = draft.targets_after - asked_bytes(budget, draft)
        assert said.endswith(")") == (abs(missed) > GRAIN * draft.targets_before), (budget, said)
        # a budget is the most that there may be, but for a ratio beside targets that stay, and for bits of codes
        codes = budget in WHOLE and name in ("rtn", "gptq", "trellis", "yaqa")
        assert missed <= 0.5 or codes or ("ratio" in budget and any(step.kept for step in draft.steps)), (budget, said)
    decides_itself = name in ("energy", "utilized-rank", "welore")
    assert followed if not decides_itself else not followed


@pytest.mark.parametrize("name", ["rtn", "gptq"])
@pytest.mark.parametrize(
    ("bits", "codes"), [(8.5, 8), (8.3, 6), (4, 4), (3, 3), (4.3, 3), (4.6, 4), (7, 6), (15, 8)], ids=lambda value: f"{value}"
)
def test_rounding_takes_the_bits_that_were_asked_for(name, bits, codes, tiny_checkpoints):
    """Groups of 64: scales of 16 bits, and zero points; a whole number of bits means the codes."""
    wide = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "dtype": torch.bfloat16}
    draft = make_draft(ModelView(locate(str(tiny_checkpoints("llama", **wide)))), load_recipe(name, {"bits": bits}))
    assert {step.choice.bits for step in draft.steps} == {codes}
    assert codes < draft.bits <= codes + 0.51


@pytest.mark.parametrize(("bits", "codes"), [(1, 1), (2, 2), (3, 3), (3.9, 3), (4.1, 4), (6, 6), (8, 6)])
def test_codes_without_scales_take_the_bits_that_were_asked_for(bits, codes, tiny_checkpoints):
    """There is no code of 8 bits: the largest that fits is taken."""
    wide = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "dtype": torch.bfloat16}
    draft = make_draft(ModelView(locate(str(tiny_checkpoints("llama", **wide)))), load_recipe("trellis", {"bits": bits}))
    assert {step.choice.bits for step in draft.steps} == {codes}
    assert codes < draft.bits < codes + 0.04


def test_the_command_line_replaces_the_size_in_a_file_and_not_what_it_sets_itself(view, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("method: rtn\nsettings: {bits: 3, group_size: 16}\n")
    assert {step.choice.bits for step in make_draft(view, load_recipe(str(own))).steps} == {3}
    recipe = load_recipe(str(own), {"ratio": 0.5})
    assert recipe.settings == {"bits": None, "group_size": 16}
    assert {step.choice.bits for step in make_draft(view, recipe).steps} == {6}
    both = make_draft(view, load_recipe("rtn", {"bits": 8.9}, ["settings.bits=4"]))
    assert {step.choice.bits for step in both.steps} == {4}
    assert re.fullmatch(r"asked 8.9 bits per weight, planned 4.\d+ \(the largest that rtn offers here\)", both.request)
    kept = make_draft(view, load_recipe("rtn", {"bits": 8, "keep": ["*.down_proj"]}))
    assert kept.bits <= 8, "beside dense targets, bits are the mean of all"


def test_a_correction_grows_with_the_budget(view):
    small, large = (make_draft(view, load_recipe("lqer", {"bits": bits})) for bits in (6, 9))
    assert max(step.choice.rank for step in small.steps) < min(step.choice.rank for step in large.steps)
    assert {step.choice.bits for step in (*small.steps, *large.steps)} == {4}
    with pytest.raises(RequestError, match=r"no form that is small enough.*\n.*a ratio up to 0\.7\d* can be reached.*bits"):
        make_draft(view, load_recipe("lqer", {"bits": 3}))


def test_nothing_to_remove(view):
    for more in (["settings.rank=48"], ["keep=['*']"]):
        with pytest.raises(RequestError, match="nothing to remove"):
            make_draft(view, load_recipe("lqer", {"ratio": 0.5}, more))
    assert make_draft(view, load_recipe("lqer", {}, ["settings.rank=48"])).request == "nothing gets smaller"


@pytest.mark.parametrize(
    ("recipe", "budget", "reason"),
    [
        ("rtn", ["--bits", 8.2], "the next larger size is"),
        ("gptq", ["--bits", 3], "codes of 3 bits"),
        ("svd-llm", ["--size", "240kB"], ""),
        ("block-influence", ["--ratio", 0.01], "1 of 6 layers go"),
        ("narrow", ["--ratio", 0.3], "some targets stay dense"),
        ("svd-llm+gptq", ["--ratio", 0.3], "the largest that svd-llm+gptq offers here"),
    ],
)  # fmt: skip
def test_what_is_made_is_what_the_first_lines_say(recipe, budget, reason, tiny_checkpoints, tiny_text_file, tmp_path):
    model = tiny_checkpoints("llama", num_hidden_layers=6, dtype=torch.bfloat16)
    text = ["--calibration", f"text:{tiny_text_file}", "--samples", 4, "--length", 32]
    printed = lrc_ok("compress", model, "--recipe", recipe, *budget, *text, "--out", tmp_path / "out").splitlines()
    asked = "240.0 kB" if budget[0] == "--size" else budget[1]
    assert re.search(rf"asked (?:ratio )?{asked}.*?, planned .*{re.escape(reason)}", printed[0]), printed[0]
    summary = next(line for line in printed if line.startswith(f"{tmp_path / 'out'}: asked"))
    assert printed.index(summary) > max(number for number, line in enumerate(printed) if line.startswith("layer "))
    record = json.loads((tmp_path / "out" / "lrc.json").read_text())
    made = {
        "--bits": 16 * record["bytes"]["targets_after"] / record["bytes"]["targets_before"],
        "--ratio": record["ratio"],
        "--size": weights_on_disk(tmp_path / "out") / 1000,
    }[budget[0]]
    planned = float(re.search(r"planned (?:at most )?([\d.]+)", summary)[1])
    assert made == pytest.approx(planned, rel=1e-3) if budget[0] != "--size" else made <= planned <= 240
    assert weights_on_disk(tmp_path / "out") >= record["bytes"]["model_after"]


def weights_on_disk(out: Path) -> int:
    return sum(path.stat().st_size for path in out.glob("*.safetensors"))


def test_a_search_over_far_sizes_says_what_it_tried(tiny_checkpoints, tiny_text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(search._Search, "_trial", lambda self, ratio: 1e9)
    refused = run_lrc(
        "compress", tiny_checkpoints("llama"), "--recipe", "rtn", "--max-ppl-increase", "0.0001%", "--out", tmp_path / "out",
        "--calibration", f"text:{tiny_text_file}", "--samples", 2, "--length", 24,
    )  # fmt: skip
    assert refused.code == 2
    tried = re.search(r"Removing ([\d.]+)% of the targets' bytes, the least that was tried", refused.err)
    assert tried and float(tried[1]) > 50, "8 of 32 bits, not one part in 128"
