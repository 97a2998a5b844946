"""Evaluation by lm-eval: tasks of one's own on local data."""

from __future__ import annotations

import json
import math

import lm_eval.tasks
import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from lrc.errors import EvaluationError, NonFiniteError, RequestError
from lrc.evaluation.evaluate import evaluate
from lrc.evaluation.results import Evaluation, results_json

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
num_fewshot: {shots}
metric_list:
  - metric: acc
metadata:
  version: 3
"""

ROLLING = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: {split}
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""


@pytest.fixture
def own_tasks(tmp_path, monkeypatch):
    """A folder with a task of one's own on local data. lm-eval's own 14,000 tasks are left out: indexing them takes seconds."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = tmp_path / "animals.jsonl"
    questions = [
        {"question": "the quick brown", "choices": [" fox", " owls"], "answer": 0},
        {"question": "seven wise", "choices": [" miller", " owls"], "answer": 1},
        {"question": "the lazy", "choices": [" dog", " roof"], "answer": 0},
        {"question": "sacks of", "choices": [" rain", " grain"], "answer": 1},
        {"question": "near the", "choices": [" river", " jumps"], "answer": 0},
    ]
    data.write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")
    (folder / "animals.yaml").write_text(TASK.format(name="animals", data=data, shots=0), encoding="utf-8")
    (folder / "whole.yaml").write_text(ROLLING.format(name="whole", data=data, split="test"), encoding="utf-8")
    (folder / "typo.yaml").write_text(ROLLING.format(name="typo", data=data, split="tset"), encoding="utf-8")
    (folder / "gone.yaml").write_text(TASK.format(name="gone", data=tmp_path / "gone.jsonl", shots=0), encoding="utf-8")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    whole = lm_eval.tasks.TaskManager
    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", lambda include_path: whole(include_path=include_path, include_defaults=False)
    )
    return folder, questions


def test_an_lm_eval_task_of_ones_own_runs_beside_a_text(own_tasks, text):
    folder, questions = own_tasks
    tokenizer, model = tiny_tokenizer(), tiny_model("llama")
    accuracy, perplexity = evaluate(
        model, ["animals", text], tokenizer=tokenizer, length=16, include_path=folder, batch_size=2
    ).results
    right = 0
    for question in questions:
        prompt = tokenizer(question["question"])["input_ids"]
        scores = []
        for choice in question["choices"]:
            ids = tokenizer(question["question"] + choice)["input_ids"]
            log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(log_p[i - 1, ids[i]].item() for i in range(len(prompt), len(ids))))
        right += scores.index(max(scores)) == question["answer"]
    assert accuracy.metric == "animals-acc"
    assert accuracy.value == pytest.approx(right / len(questions))
    assert accuracy.stderr is not None and accuracy.tokens is None
    assert accuracy.protocol["num_fewshot"] == 0
    assert accuracy.protocol["documents"] == len(questions)
    assert accuracy.protocol["batch_size"] == 2
    assert "lm_eval" in accuracy.protocol["versions"]
    assert perplexity.metric == "text:notes.txt-token-ppl@16"
    json.dumps(results_json(Evaluation("m", [accuracy, perplexity])), allow_nan=False)


def test_perplexities_per_word_and_per_byte_say_so_in_their_names(own_tasks):
    folder, questions = own_tasks
    tokenizer, model = tiny_tokenizer(), tiny_model("llama")
    words, bits = evaluate(model, ["whole"], tokenizer=tokenizer, include_path=folder).results
    texts = [question["question"] for question in questions]
    nll = 0.0
    for text in texts:
        ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
        log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        nll -= sum(log_p[i - 1, ids[i]].item() for i in range(1, len(ids)))
    assert (words.metric, bits.metric) == ("whole-word-ppl", "whole-bits-per-byte")
    assert math.log(words.value) == pytest.approx(nll / sum(len(text.split()) for text in texts), rel=1e-4)
    assert bits.value == pytest.approx(nll / math.log(2) / sum(len(text) for text in texts), rel=1e-4)


def test_limit_reaches_lm_eval(own_tasks):
    folder, _ = own_tasks
    (result,) = evaluate(tiny_model("llama"), ["animals"], tokenizer=tiny_tokenizer(), include_path=folder, limit=2).results
    assert (result.protocol["documents"], result.protocol["limit"]) == (2, 2)


def test_lm_eval_does_not_change_the_tokenizer(own_tasks):
    folder, _ = own_tasks
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    evaluate(tiny_model("llama"), ["animals"], tokenizer=tokenizer, include_path=folder, limit=1)
    assert tokenizer.pad_token is None


def test_lm_eval_does_not_score_a_nan(own_tasks):
    folder, _ = own_tasks
    model = tiny_model("llama")
    model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(NonFiniteError, match="animals"):
        evaluate(model, ["animals"], tokenizer=tiny_tokenizer(), include_path=folder)


@pytest.mark.usefixtures("no_forward")
@pytest.mark.parametrize(
    ("tasks", "options", "error", "message"),
    [
        (["animal"], {}, RequestError, r"(?s)'animal'.*Did you mean 'animals'"),
        (["wikitext-2"], {}, RequestError, "Did you mean 'wikitext2'"),
        (["animals"], {"num_fewshot": 3}, RequestError, "defined with 0 examples"),
        (["whole"], {"num_fewshot": 3}, RequestError, "takes no examples"),
        (["typo"], {}, RequestError, "cannot set this up: KeyError: 'tset'"),
        (["animals"], {"bos": "always"}, RequestError, "leaves BOS to the tokenizer"),
        (["animals"], {"include_path": "nowhere"}, RequestError, "nowhere is not a folder"),
        (["animals", "gone"], {}, EvaluationError, r"(?s)gone: its data set cannot be had.*gone\.jsonl"),
    ],
)
def test_lm_eval_requests_are_checked_before_the_model_runs(own_tasks, tasks, options, error, message):
    with pytest.raises(error, match=message):
        evaluate(tiny_model("llama"), tasks, tokenizer=tiny_tokenizer(), **({"include_path": own_tasks[0]} | options))


@pytest.mark.usefixtures("no_forward")
def test_the_path_of_a_file_gets_the_hint_to_write_text(own_tasks, text):
    path = text.removeprefix("text:")
    with pytest.raises(RequestError, match=f"text:{path}"):
        evaluate(tiny_model("llama"), [path], tokenizer=tiny_tokenizer(), include_path=own_tasks[0])
