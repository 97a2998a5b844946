"""Evaluation: token perplexity against an independent computation, and the requests that are refused."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commandline import lrc_ok
from faults import killed_before
from pipeline import compress
from tiny import CONFIGS, tiny_model, tiny_text, tiny_tokenizer

from lrc.calibrate.data import evaluation_text, same_text
from lrc.checkpoint.hf_quantizer import open_model
from lrc.commands.evaluate import EvalOptions
from lrc.errors import EvaluationError, NonFiniteError, RequestError
from lrc.evaluation.evaluate import evaluate, measure
from lrc.evaluation.request import Settings, prepare
from lrc.evaluation.results import Evaluation, compare, results_json
from lrc.model import likelihood


def read(task: str) -> str:
    with open(task.removeprefix("text:"), encoding="utf-8") as file:
        return file.read()


def reference(model, windows: list[list[int]]) -> tuple[float, np.ndarray]:
    """Perplexity and mean nll per window from the plain forward in float64, one window at a time, softmax in numpy."""
    model = model.double()
    model.set_experts_implementation("eager")  # the grouped kernel has no float64
    means = []
    for window in windows:
        with torch.no_grad():
            logits = model(torch.tensor([window])).logits[0].numpy()
        assert logits.dtype == np.float64
        peak = logits.max(axis=1, keepdims=True)
        log_p = logits - peak - np.log(np.exp(logits - peak).sum(axis=1, keepdims=True))
        means.append(np.mean([-log_p[i, window[i + 1]] for i in range(len(window) - 1)]))
    return math.exp(np.mean(means)), np.array(means)


def cut(tokenizer, text: str, step: int) -> list[list[int]]:
    ids = tokenizer(read(text), add_special_tokens=False)["input_ids"]
    return [ids[i : i + step] for i in range(0, len(ids) - step + 1, step)]


def test_perplexity_is_that_of_an_independent_float64_computation(text):
    tokenizer = tiny_tokenizer()
    evaluation = evaluate(tiny_model("llama"), [text], tokenizer=tokenizer, length=32)
    (result,) = evaluation.results
    windows = cut(tokenizer, text, 32)
    perplexity, means = reference(tiny_model("llama"), windows)
    assert evaluation.metrics == {"text:notes.txt-token-ppl@32": result}
    assert result.metric == "text:notes.txt-token-ppl@32"
    assert result.task == text
    assert result.value == pytest.approx(perplexity, rel=1e-5)
    assert result.tokens == len(windows) * 31
    assert result.stderr == pytest.approx(perplexity * means.std(ddof=1) / math.sqrt(len(windows)), rel=1e-3)
    assert result.protocol["windows"] == len(windows) > 10
    assert result.protocol["bos"] == "none"
    assert result.protocol["dtype"] == "float32"
    assert result.protocol["unused_tail_tokens"] == result.protocol["stream_tokens"] - 32 * len(windows)


def test_a_model_by_name_gives_what_the_loaded_one_gives_and_what_the_command_prints(text, tiny_checkpoints, tmp_path):
    folder = tiny_checkpoints("llama")
    by_name = evaluate(folder, [text], length=32, max_windows=3)
    assert by_name.model == str(folder)
    model, tokenizer = open_model(str(folder))
    loaded = evaluate(model, [text], tokenizer=tokenizer, length=32, max_windows=3)
    lrc_ok("eval", folder, "--tasks", text, "--length", 32, "--max-windows", 3, "--json", tmp_path / "r.json")
    command = json.loads((tmp_path / "r.json").read_text())["results"]
    assert by_name.metrics.keys() == loaded.metrics.keys() == command.keys()
    for name, result in by_name.metrics.items():
        assert result.value == loaded.metrics[name].value == command[name]["value"]
    with pytest.raises(TypeError, match="tokenizer"):
        evaluate(model, [text])


def test_a_killed_evaluation_leaves_the_old_results_or_the_new_ones_and_the_next_one_clears_up(
    text, tiny_checkpoints, tmp_path
):
    folder, results = tiny_checkpoints("llama"), tmp_path / "results" / "r.json"
    results.parent.mkdir()
    results.write_text("{}")
    command = ["eval", folder, "--tasks", text, "--length", 32, "--max-windows", 1, "--json", results]
    operation = 1
    while killed_before(operation, results.parent, command):
        assert results.read_text() == "{}" or json.loads(results.read_text())["results"]
        operation += 1
    assert operation > 3
    assert json.loads(results.read_text())["results"]
    assert list(results.parent.iterdir()) == [results]


def test_the_defaults_are_those_of_the_command():
    command = {field.name: field.default for field in fields(EvalOptions)}
    for field in fields(Settings):
        if field.name not in ("tasks", "length"):  # which the command chooses by what is reachable, and by the model
            assert field.default == command[field.name], field.name


def test_a_compressed_model_by_name_is_not_measured_on_its_calibration_set(text, tiny_checkpoints, tmp_path):
    compress(tiny_checkpoints("llama"), tmp_path / "out", Path(text.removeprefix("text:")), samples=4, length=32, ratio=0.3)
    with pytest.raises(RequestError, match="calibrated on the text"):
        evaluate(tmp_path / "out", [text], length=32, max_windows=1)
    allowed = evaluate(tmp_path / "out", [text], length=32, max_windows=1, allow_calibration_text=True)
    assert allowed.results[0].protocol["calibration_text"] != "not the calibration text"


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_family_and_logits_a_few_positions_at_a_time(family, text, monkeypatch):
    monkeypatch.setattr(likelihood, "_LOGITS_AT_ONCE", 2 * 320 * 5)  # 5 positions of 2 windows, of 320 words
    monkeypatch.setattr(likelihood, "_IN_CACHE", 320 * 4)  # 4 of these 10 at a time
    tokenizer = tiny_tokenizer()
    model = tiny_model(family)
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda _m, _i, out: seen.append(out.numel()))
    (result,) = evaluate(model, [text], tokenizer=tokenizer, length=24, max_windows=4, batch_size=2).results
    perplexity, _ = reference(tiny_model(family), cut(tokenizer, text, 24)[:4])
    assert result.value == pytest.approx(perplexity, rel=2e-5)
    assert max(seen) <= 2 * 320 * 5
    again = model(torch.tensor([[5, 6, 7]])).logits
    assert torch.equal(again, tiny_model(family)(torch.tensor([[5, 6, 7]])).logits), "the model was left changed"


def test_final_soft_capping_is_part_of_the_logits(text):
    changes = {"final_logit_softcapping": 0.5}
    tokenizer = tiny_tokenizer()
    (capped,) = evaluate(
        tiny_model("gemma3_text", **changes), [text], tokenizer=tokenizer, length=24, max_windows=3, bos="never"
    ).results
    (plain,) = evaluate(tiny_model("gemma3_text"), [text], tokenizer=tokenizer, length=24, max_windows=3, bos="never").results
    perplexity, _ = reference(tiny_model("gemma3_text", **changes), cut(tokenizer, text, 24)[:3])
    assert capped.value == pytest.approx(perplexity, rel=1e-5)
    assert abs(capped.value - plain.value) > 1


def test_a_tokenizer_that_prepends_bos_gets_it_in_every_window(text):
    tokenizer = tiny_tokenizer(bos=True)
    (auto,) = evaluate(tiny_model("gemma3_text"), [text], tokenizer=tokenizer, length=32).results
    windows = [[1, *window] for window in cut(tokenizer, text, 31)]
    perplexity, _ = reference(tiny_model("gemma3_text"), windows)
    assert auto.value == pytest.approx(perplexity, rel=1e-5)
    assert auto.tokens == len(windows) * 31
    assert auto.protocol["bos"] == "prepended to each window"
    (never,) = evaluate(tiny_model("gemma3_text"), [text], tokenizer=tokenizer, length=32, bos="never").results
    assert never.protocol["bos"] == "none"
    assert never.value != pytest.approx(auto.value, rel=1e-3)
    (always,) = evaluate(tiny_model("gemma3_text"), [text], tokenizer=tiny_tokenizer(), length=32, bos="always").results
    assert always.value == auto.value
    with pytest.raises(EvaluationError, match="bos none against prepended"):
        compare(Evaluation("one", [never]), Evaluation("other", [auto]))


def test_batch_size_does_not_change_the_result(text):
    # 7 does not divide the number of windows: the last batch is smaller.
    one, several = (
        evaluate(tiny_model("qwen3"), [text], tokenizer=tiny_tokenizer(), length=16, max_windows=24, batch_size=size).results[0]
        for size in (1, 7)
    )
    assert several.value == pytest.approx(one.value, rel=1e-6)
    assert several.stderr == pytest.approx(one.stderr, rel=1e-4)
    assert several.tokens == one.tokens == 24 * 15


def test_half_precision_loses_nothing_in_the_loss(text):
    (result,) = evaluate(tiny_model("llama", torch.bfloat16), [text], tokenizer=tiny_tokenizer(), length=32).results
    perplexity, _ = reference(tiny_model("llama", torch.bfloat16), cut(tiny_tokenizer(), text, 32))
    assert result.protocol["dtype"] == "bfloat16"
    assert result.value == pytest.approx(perplexity, rel=5e-3)


def test_one_window_has_no_standard_error_and_progress_is_told(text):
    calls = []
    request = prepare(Settings([text], length=16, max_windows=1))
    (result,) = measure(
        tiny_model("llama"),
        tiny_tokenizer(),
        request,
        notify=lambda event: calls.append((event.stage, event.done, event.total)),
    )
    assert result.stderr is None
    assert calls == [(text, 1, 1)]


def test_the_training_mode_is_put_back(text):
    model = tiny_model("llama").train()
    model.model.norm.eval()
    evaluate(model, [text], tokenizer=tiny_tokenizer(), length=16, max_windows=1)
    assert model.training and model.model.layers[0].training and not model.model.norm.training


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_logit_is_an_error_that_names_task_and_window(text, bad):
    tokenizer = tiny_tokenizer()
    model = tiny_model("opt")
    windows = cut(tokenizer, text, 16)
    first = next(i for i, window in enumerate(windows) if i > 2 and set(window) - set(sum(windows[:i], [])))
    new = next(token for token in windows[first] if token not in sum(windows[:first], []))
    untied = model.get_input_embeddings().weight.detach().clone()
    untied[new, 0] = bad
    model.lm_head.weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    model.get_input_embeddings().weight = torch.nn.Parameter(untied)
    with pytest.raises(NonFiniteError, match=rf"notes\.txt.* window {first + 1} .*float32"):
        evaluate(model, [text], tokenizer=tokenizer, length=16, batch_size=2)


@pytest.mark.usefixtures("no_forward")
@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        ([], {}, "--tasks"),
        (["TEXT", "TEXT"], {}, "more than once"),
        (["TEXT"], {"length": 1}, "--length 1"),
        (["TEXT"], {"length": 257}, r"(?s)257.*256 positions.*--length 256"),
        (["TEXT"], {"bos": "yes"}, "auto, always, never"),
        (["TEXT"], {"batch_size": 0}, "--batch-size 0"),
        (["TEXT"], {"max_windows": 0}, "--max-windows 0"),
        (["TEXT"], {"limit": 10}, r"(?s)--limit 10.*--max-windows"),
        (["TEXT"], {"num_fewshot": 2}, "--num-fewshot 2"),
        (["anything"], {"max_windows": 4}, r"(?s)--max-windows 4.*--limit"),
    ],
)
def test_wrong_requests_are_refused_before_the_model_runs(text, tasks, options, message):
    with pytest.raises(RequestError, match=message):
        evaluate(
            tiny_model("llama"), [text if task == "TEXT" else task for task in tasks], tokenizer=tiny_tokenizer(), **options
        )


@pytest.mark.usefixtures("no_forward")
def test_a_text_shorter_than_a_window_says_which_length_would_do(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("the quick brown fox", encoding="utf-8")
    tokens = len(tiny_tokenizer()("the quick brown fox")["input_ids"])
    with pytest.raises(RequestError, match=rf"(?s)has {tokens} tokens.*--length {tokens} or less"):
        evaluate(tiny_model("llama"), [f"text:{path}"], tokenizer=tiny_tokenizer(), length=128)


@pytest.mark.usefixtures("no_forward")
def test_a_tokenizer_of_another_model_is_refused(text):
    with pytest.raises(RequestError, match="do not belong together"):
        evaluate(tiny_model("llama", vocab_size=64), [text], tokenizer=tiny_tokenizer(), length=16)


@pytest.mark.usefixtures("no_forward")
def test_bos_always_without_a_bos_token_is_refused(text):
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(RequestError, match="no BOS token"):
        evaluate(tiny_model("llama"), [text], tokenizer=tokenizer, length=16, bos="always")


@pytest.mark.usefixtures("no_forward")
def test_two_files_of_one_name_are_refused(text, tmp_path):
    other = tmp_path / "notes.txt"
    other.write_text(tiny_text(words=300, seed=1), encoding="utf-8")
    with pytest.raises(RequestError, match="both be reported as text:notes.txt-token-ppl@16"):
        evaluate(tiny_model("llama"), [text, f"text:{other}"], tokenizer=tiny_tokenizer(), length=16)


def test_the_calibration_text_is_refused_unless_allowed(text):
    provenance = evaluation_text(text).provenance
    settings = Settings([text], length=16, max_windows=2)
    with pytest.raises(RequestError, match=r"(?s)calibrated on.*--allow-calibration-text"):
        measure(tiny_model("llama"), tiny_tokenizer(), prepare(settings), calibration_provenance=provenance)
    allowed = prepare(replace(settings, allow_calibration_text=True))
    (result,) = measure(tiny_model("llama"), tiny_tokenizer(), allowed, calibration_provenance=provenance)
    assert result.protocol["calibration_text"] == same_text(provenance, provenance)
    assert result.protocol["text"] == [dict(record) for record in provenance]


def test_other_calibration_text_is_no_obstacle(text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(tiny_text(words=300, seed=1), encoding="utf-8")
    provenance = evaluation_text(f"text:{other}").provenance
    request = prepare(Settings([text], length=16, max_windows=2))
    (result,) = measure(tiny_model("llama"), tiny_tokenizer(), request, calibration_provenance=provenance)
    assert result.protocol["calibration_text"] == "not the calibration text"


def test_json_has_every_number_with_its_protocol_and_the_differences(text):
    small = evaluate(tiny_model("llama"), [text], tokenizer=tiny_tokenizer(), length=16, max_windows=3)
    large = evaluate(tiny_model("llama", seed=1), [text], tokenizer=tiny_tokenizer(), length=16, max_windows=3)
    document = json.loads(
        json.dumps(results_json(replace(small, model="small"), replace(large, model="large")), allow_nan=False)
    )
    entry = document["results"]["text:notes.txt-token-ppl@16"]
    assert (document["model"], document["baseline"]["model"]) == ("small", "large")
    assert entry["value"] == small.results[0].value
    assert entry["stderr"] == small.results[0].stderr > 0
    assert entry["tokens"] == 45
    assert {"windows", "length", "bos", "device", "dtype", "seconds", "tokens_per_second", "text"} <= entry["protocol"].keys()
    assert entry["protocol"]["versions"].keys() == {"lrc", "torch", "transformers"}
    (row,) = document["differences"]
    assert row["difference"] == pytest.approx(small.results[0].value - large.results[0].value)
    assert row["relative"] == pytest.approx(small.results[0].value / large.results[0].value - 1)
    assert "baseline" not in results_json(small)


def test_measurements_of_different_windows_are_not_compared(text):
    three, four = (evaluate(tiny_model("llama"), [text], tokenizer=tiny_tokenizer(), length=16, max_windows=n) for n in (3, 4))
    with pytest.raises(EvaluationError, match="windows 3 against 4"):
        compare(three, four)
    with pytest.raises(EvaluationError, match="baseline has no"):
        compare(three, Evaluation("none"))


def test_another_text_of_the_same_name_is_not_compared_but_the_same_text_elsewhere_is(text, tmp_path):
    moved, changed = tmp_path / "a" / "notes.txt", tmp_path / "b" / "notes.txt"
    for path, content in ((moved, read(text)), (changed, tiny_text(words=400, seed=1))):
        path.parent.mkdir()
        path.write_text(content, encoding="utf-8")
    here, there, other = (
        evaluate(tiny_model("llama"), [task], tokenizer=tiny_tokenizer(), length=16, max_windows=3)
        for task in (text, f"text:{moved}", f"text:{changed}")
    )
    assert compare(here, there)[0]["difference"] == 0
    with pytest.raises(EvaluationError, match="different texts"):
        compare(here, other)


def test_metric_names_say_how_they_were_measured():
    from lrc.evaluation.lm_eval import _readable

    assert _readable("wikitext", "word_perplexity", "none", 0) == "wikitext-word-ppl"
    assert _readable("wikitext", "bits_per_byte", "none", 0) == "wikitext-bits-per-byte"
    assert _readable("gsm8k", "exact_match", "strict-match", 5) == "gsm8k-exact_match,strict-match@5-shot"
