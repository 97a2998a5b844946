"""Text from the hub, through a stand-in, and text for evaluation."""

from __future__ import annotations

import itertools
import socket
import time

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from texts import write_jsonl
from tiny import tiny_text

from lrc.calibrate.data import CalibrationSpec, evaluation_text, load_calibration, same_text
from lrc.errors import CalibrationError, RequestError


class Hub:
    """Stands in for `datasets.load_dataset`: hands out rows and notes what was asked for."""

    def __init__(self, rows):
        self.rows, self.asked, self.read = rows, [], 0

    def __reduce__(self):
        """`datasets` pickles what it is given to make a fingerprint; rows may be endless."""
        return Hub, ((),)

    def __call__(self, name, config=None, *, split, streaming, **others):
        self.asked.append({"name": name, "config": config, "split": split, "streaming": streaming, **others})

        def generate():
            for row in self.rows:
                self.read += 1
                yield row

        return datasets.IterableDataset.from_generator(generate) if streaming else datasets.Dataset.from_list(list(self.rows))


@pytest.fixture
def hub(monkeypatch):
    def install(rows):
        stand_in = Hub(rows)
        monkeypatch.setattr(datasets, "load_dataset", stand_in)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        return stand_in

    return install


def test_c4_is_streamed_and_never_read_to_its_end(plain, hub):
    stand_in = hub({"text": tiny_text(20, seed=i % 50)} for i in itertools.count())
    calibration = load_calibration(CalibrationSpec(source="c4", samples=4, length=64), plain)
    assert calibration.tokens.shape == (4, 64)
    assert stand_in.read < 3000
    (asked,) = stand_in.asked
    assert asked["name"] == "allenai/c4"
    assert asked["streaming"] is True
    assert "c4-train.00000-of-01024" in asked["data_files"]["train"]


@pytest.mark.parametrize(("source", "joiner", "column"), [("wikitext2", "\n\n", "text"), ("ptb", " ", "sentence")])
def test_named_streams_are_joined_as_the_papers_do(plain, hub, source, joiner, column):
    rows = ["", " = Title = \n", tiny_text(60), "", tiny_text(60, seed=1)]
    stand_in = hub([{column: row} for row in rows])
    text = evaluation_text(source)
    assert text.text == joiner.join(rows)
    assert "5 rows" in text.protocol
    assert stand_in.asked[0]["split"] == "test"
    load_calibration(CalibrationSpec(source=source, samples=2, length=16), plain)
    assert stand_in.asked[1]["split"] == "train"


def test_c4_is_evaluated_on_its_first_1100_validation_documents(hub):
    stand_in = hub({"text": f"document {i}"} for i in itertools.count())
    text = evaluation_text("c4")
    assert text.text == " ".join(f"document {i}" for i in range(1100))
    assert stand_in.asked[0]["split"] == "validation"
    assert text.provenance[0]["documents"] == 1100


def test_hf_names_configuration_split_and_column(plain, hub):
    stand_in = hub([{"body": tiny_text(200), "id": 1}])
    load_calibration(CalibrationSpec(source="hf:me/mine:en:validation:body", samples=1, length=16), plain)
    load_calibration(CalibrationSpec(source="hf:me/mine:::body", samples=1, length=16), plain)
    assert [(asked["config"], asked["split"]) for asked in stand_in.asked] == [("en", "validation"), (None, "train")]
    with pytest.raises(CalibrationError, match=r"no column 'boddy'; there are: body, id(.|\n)*Did you mean 'body'"):
        load_calibration(CalibrationSpec(source="hf:me/mine:::boddy"), plain)


def test_unknown_configuration_is_told_as_the_library_says_it(plain, monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("BuilderConfig 'eng' not found. Available: ['en', 'de']")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(CalibrationError, match=r"Available: \['en', 'de'\](.|\n)*Write hf:"):
        load_calibration(CalibrationSpec(source="hf:me/mine:eng"), plain)


def test_unreachable_hub_is_one_quick_error_that_names_the_offline_choices(plain, monkeypatch, caplog):
    with socket.socket() as closed:  # a port that nobody listens on
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        start = time.monotonic()
        with pytest.raises(CalibrationError) as caught:
            load_calibration(CalibrationSpec(source="wikitext2"), plain)
    assert time.monotonic() - start < 8
    assert "wikitext" in caught.value.what
    assert "efused" in caught.value.what
    for choice in ("text:", "jsonl:", "parquet:", "pydoc", "self"):
        assert choice in caught.value.remedy
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert datasets.config.HF_HUB_OFFLINE is False
    assert not any("Retrying" in record.message for record in caplog.records)


# Evaluation text and its difference from calibration text


def test_evaluation_text_of_files(tmp_path, text_file):
    assert evaluation_text(f"text:{text_file}").text == text_file.read_text()
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": "one"}, {"text": ""}, {"text": "two"}])
    assert evaluation_text(f"jsonl:{rows}").text == "one\n\n\n\ntwo"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["one", "two"]}), tmp_path / "rows.parquet")
    assert evaluation_text(f"parquet:{tmp_path}/rows.parquet:body").text == "one\n\ntwo"


@pytest.mark.parametrize(
    ("name", "message"),
    [("wikitxt2", "Did you mean 'wikitext2'"), ("pile", "no held-out text"), ("self", "no held-out"), ("text", "'text:'")],
)
def test_what_is_no_evaluation_text(name, message):
    with pytest.raises(RequestError, match=message):
        evaluation_text(name)


def test_evaluating_on_the_calibration_text_is_noticed(plain, text_file, tmp_path):
    copy = tmp_path / "other-name.txt"
    copy.write_bytes(text_file.read_bytes())
    calibration = load_calibration(CalibrationSpec(source=f"text:{text_file}", samples=2, length=16), plain)
    reason = same_text(calibration.provenance, evaluation_text(f"text:{copy}").provenance)
    assert reason is not None
    assert "prose.txt" in reason
    assert "other-name.txt" in reason
    copy.write_text(tiny_text(500, seed=9))
    assert same_text(calibration.provenance, evaluation_text(f"text:{copy}").provenance) is None


def test_same_split_of_the_same_data_set_is_noticed(plain, hub):
    hub([{"text": tiny_text(300)}])
    spec = {"samples": 2, "length": 16}
    evaluation = evaluation_text("wikitext2").provenance

    def reason(source: str) -> str | None:
        hub([{"text": tiny_text(300, seed=len(source))}])
        return same_text(load_calibration(CalibrationSpec(source=source, **spec), plain).provenance, evaluation)

    assert "split test" in (reason("hf:Salesforce/wikitext:wikitext-2-raw-v1:test") or "")
    assert "split test" in (reason("hf:wikitext:wikitext-2-raw-v1:test[:50%]") or "")
    assert reason("hf:Salesforce/wikitext:wikitext-2-raw-v1:train") is None
    assert reason("hf:Salesforce/wikitext:wikitext-103-raw-v1:test") is None
    assert reason("wikitext2") is None
