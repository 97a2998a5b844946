"""Calibration text from files: what is read, how it is cut, and what a person is told when it cannot be."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import time

import pyarrow
import pyarrow.parquet
import pydantic
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import decoded, numbered, write_jsonl
from tiny import tiny_text, tiny_tokenizer

from lrc.calibrate.data import CalibrationSpec, load_calibration
from lrc.calibrate.packing import divide, text_prefix, token_hash, token_ids, windows_of
from lrc.calibrate.readers import drawn
from lrc.errors import CalibrationError

BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def with_bos():
    return tiny_tokenizer(bos=True)


# Cutting


@given(tokens=st.integers(8, 400), samples=st.integers(1, 12), length=st.integers(1, 8), seed=st.integers(0, 2**32 - 1))
def test_windows_are_runs_of_the_stream_and_disjoint_where_it_is_long_enough(tokens, samples, length, seed):
    windows, overlap = windows_of(torch.arange(tokens), samples, length, seed)
    assert windows.shape == (samples, length)
    assert torch.equal(windows, windows[:, :1] + torch.arange(length))
    assert overlap == (tokens < samples * length)
    if not overlap:
        assert windows.flatten().unique().numel() == samples * length


def test_every_token_can_be_drawn():
    seen = torch.cat([windows_of(torch.arange(23), 3, 5, seed)[0].flatten() for seed in range(200)])
    assert seen.unique().numel() == 23


@given(count=st.integers(0, 60), seed=st.integers(0, 2**32 - 1))
def test_drawn_is_a_permutation(count, seed):
    order = list(drawn(count, seed))
    assert sorted(order) == list(range(count))
    assert list(itertools.islice(drawn(count, seed), 5)) == order[:5]
    assert list(drawn(count, None)) == list(range(count))


def test_drawn_puts_every_element_anywhere():
    counts = torch.zeros(4, 4)
    for seed in range(2000):
        for place, element in enumerate(drawn(4, seed)):
            counts[place, element] += 1
    assert ((counts - 500).abs() < 100).all()


@given(st.integers(1, 500), st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_samples_are_divided_by_weight(samples, weights):
    counts = divide(samples, weights)
    assert sum(counts) == samples
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - samples * weight / sum(weights)) < 1 + 1e-6


def test_largest_remainder_gets_the_rest():
    assert divide(10, [0.5, 0.25, 0.25]) == [5, 3, 2]
    assert divide(7, [0.1, 0.9]) == [1, 6]


# One long text


def test_text_is_cut_from_the_whole_file(plain, text_file):
    spec = CalibrationSpec(source=f"text:{text_file}", samples=5, length=33)
    calibration = load_calibration(spec, plain)
    assert calibration.tokens.shape == (5, 33)
    assert calibration.tokens.dtype == torch.int64
    stream = plain(text_file.read_text())["input_ids"]
    runs = {tuple(stream[i : i + 33]) for i in range(len(stream) - 32)}
    assert all(tuple(window) in runs for window in calibration.tokens.tolist())
    (record,) = calibration.provenance
    assert record["sha256"] == hashlib.sha256(text_file.read_bytes()).hexdigest()
    assert record["overlap"] is False


def test_result_depends_on_the_seed_and_not_on_the_files_name(plain, text_file, tmp_path):
    other = tmp_path / "moved.txt"
    other.write_bytes(text_file.read_bytes())
    first, again, moved = (
        load_calibration(CalibrationSpec(source=f"text:{path}", samples=4, length=20), plain)
        for path in (text_file, text_file, other)
    )
    assert first.hash == again.hash == moved.hash
    reseeded = load_calibration(CalibrationSpec(source=f"text:{text_file}", samples=4, length=20, seed=1), plain)
    assert reseeded.hash != first.hash


def test_hash_is_of_ids_and_shape():
    tokens = torch.arange(12)
    assert token_hash(tokens.view(3, 4)) != token_hash(tokens.view(4, 3))
    assert token_hash(tokens.view(4, 3)) == token_hash(tokens.view(4, 3).T.contiguous().T)


def test_short_text_overlaps_and_says_so(plain, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text(tiny_text(40))
    calibration = load_calibration(CalibrationSpec(source=f"text:{path}", samples=30, length=16), plain)
    assert calibration.tokens.shape == (30, 16)
    assert calibration.provenance[0]["overlap"] is True


def test_too_short_text_says_the_numbers(plain, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("the quick brown fox")
    held = len(plain("the quick brown fox")["input_ids"])
    with pytest.raises(CalibrationError, match=rf"holds {held} tokens.*length 64 needs 65"):
        load_calibration(CalibrationSpec(source=f"text:{path}", samples=1, length=64), plain)


def test_length_plus_one_tokens_are_enough(plain, tmp_path):
    path = tmp_path / "exact.txt"
    path.write_text("the quick brown fox")
    held = len(plain("the quick brown fox")["input_ids"])
    calibration = load_calibration(CalibrationSpec(source=f"text:{path}", samples=2, length=held - 1), plain)
    assert calibration.tokens.shape == (2, held - 1)


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_bos_opens_every_sample_and_appears_nowhere_else(with_bos, tmp_path, kind):
    words = f"{tiny_text(300)} a literal <s> in the text "
    path = tmp_path / "data"
    path.write_text(words * 3) if kind == "text" else write_jsonl(path, [{"text": words}] * 3)
    tokens = load_calibration(CalibrationSpec(source=f"{kind}:{path}", samples=6, length=31), with_bos).tokens
    assert tokens.shape == (6, 31)
    assert (tokens[:, 0] == BOS).all()
    assert not (tokens[:, 1:] == BOS).any()


def test_without_bos_of_the_tokenizers_own_none_is_added(plain, with_bos, text_file):
    tokens = load_calibration(CalibrationSpec(source=f"text:{text_file}", samples=6, length=31), plain).tokens
    assert not (tokens == BOS).any()
    assert text_prefix(plain) == []
    assert text_prefix(with_bos) == [BOS]


def test_long_text_is_tokenised_in_seconds_without_a_warning(plain, caplog, monkeypatch):
    monkeypatch.setattr(plain, "model_max_length", 64)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    text = "\n".join(tiny_text(2000, seed=i) for i in range(210))
    assert len(text) > 2_000_000
    start = time.monotonic()
    with caplog.at_level(logging.WARNING, logger="transformers"):
        ids = token_ids(plain, text)
    assert time.monotonic() - start < 20
    assert not caplog.records
    assert plain.decode(ids[:50].tolist()) == text[: len(plain.decode(ids[:50].tolist()))]


def test_pieces_of_a_very_long_text_meet_without_loss(plain, monkeypatch):
    monkeypatch.setattr("lrc.calibrate.packing.CHUNK", 100)
    lines = "\n".join(["short", "x" * 350, "", tiny_text(100)])
    assert plain.decode(token_ids(plain, lines).tolist()) == lines


# Documents


def test_documents_are_shuffled_and_parted_by_eos(plain, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in numbered(40)])
    orders = []
    for seed in (0, 0, 1):
        spec = CalibrationSpec(source=f"jsonl:{path}", samples=8, length=40, seed=seed)
        documents = decoded(plain, load_calibration(spec, plain)).split("</s>")
        orders.append([document.split()[0] for document in documents[:-1]])
        assert all(document in numbered(40) for document in documents[:-1])
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0], key=int)


def test_parquet_gives_what_jsonl_gives(plain, tmp_path):
    texts = numbered(50)
    write_jsonl(tmp_path / "rows.jsonl", [{"body": text} for text in texts])
    table = pyarrow.table({"id": list(range(50)), "body": texts})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=7)
    hashes = {
        load_calibration(CalibrationSpec(source=f"{kind}:{tmp_path}/rows.{kind}:body", samples=9, length=50), plain).hash
        for kind in ("jsonl", "parquet")
    }
    assert len(hashes) == 1


def test_few_documents_overlap_and_say_so(plain, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in numbered(3)])
    calibration = load_calibration(CalibrationSpec(source=f"jsonl:{path}", samples=50, length=20), plain)
    assert calibration.tokens.shape == (50, 20)
    assert calibration.provenance[0]["overlap"] is True
    assert calibration.provenance[0]["documents"] == 3


def test_empty_documents_and_blank_lines_are_passed_over(plain, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(['{"text": ""}', "", '{"text": null}', '{"text": "  "}', json.dumps({"text": tiny_text(50)})]))
    calibration = load_calibration(CalibrationSpec(source=f"jsonl:{path}", samples=1, length=20), plain)
    assert calibration.provenance[0]["documents"] == 1


@pytest.mark.parametrize(
    ("content", "source", "message"),
    [
        ('{"text": "a"}\n{"text": \n', "jsonl:{}", r"data:2: not a line of JSON"),
        ("[1]\n", "jsonl:{}", r"data:1: list, not an object"),
        ('{"body": "a", "id": 1}\n', "jsonl:{}", r"data:1: no field 'text'; there are: body, id"),
        ('{"body": "a", "id": 1}\n', "jsonl:{}:bodi", r"Did you mean 'body'"),
        ('{"text": 7}\n', "jsonl:{}", r"data:1: field 'text' holds int, not text"),
        ('{"text": " "}\n', "jsonl:{}", r"every document is empty"),
        ('{"text": [{"role": "user", "content": "hi"}]}\n', "jsonl:{}", r"holds conversations.*\n.*chat"),
        ("", "jsonl:{}", r"every document is empty"),
        ("", "text:{}", r"holds no text"),
        (" \n", "text:{}", r"holds no text"),
        ("PAR1", "parquet:{}", r"data cannot be read as parquet"),
    ],
)
def test_damaged_files_say_where(plain, tmp_path, content, source, message):
    (tmp_path / "data").write_text(content)
    with pytest.raises(CalibrationError, match=message):
        load_calibration(CalibrationSpec(source=source.format(tmp_path / "data"), samples=1, length=8), plain)


def test_binary_is_no_text(plain, tmp_path):
    (tmp_path / "data").write_bytes(b"abc\xff")
    with pytest.raises(CalibrationError, match=r"not UTF-8 text: byte 3 is 0xff"):
        load_calibration(CalibrationSpec(source=f"text:{tmp_path / 'data'}"), plain)


def test_missing_parquet_column_names_those_that_exist(plain, tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "id": [1]}), tmp_path / "rows.parquet")
    with pytest.raises(CalibrationError, match=r"no column 'text'; there are: body, id.*\n.*parquet:PATH:COLUMN"):
        load_calibration(CalibrationSpec(source=f"parquet:{tmp_path}/rows.parquet"), plain)


def test_missing_file_names_the_nearest(plain, text_file):
    with pytest.raises(CalibrationError, match=r"Did you mean '.*prose.txt'"):
        load_calibration(CalibrationSpec(source=f"text:{text_file.parent}/porse.txt"), plain)
    with pytest.raises(CalibrationError, match="is a folder"):
        load_calibration(CalibrationSpec(source=f"text:{text_file.parent}"), plain)
    with pytest.raises(CalibrationError, match="no folder"):
        load_calibration(CalibrationSpec(source="text:/nowhere/at/all.txt"), plain)


def test_pydoc_is_english_from_the_standard_library(plain):
    calibration = load_calibration(CalibrationSpec(source="pydoc", samples=4, length=256), plain)
    assert calibration.tokens.shape == (4, 256)
    assert "the" in decoded(plain, calibration).split()
    again = load_calibration(CalibrationSpec(source="pydoc", samples=4, length=256), plain)
    assert again.hash == calibration.hash


# Chat


def test_chat_wraps_documents_and_renders_conversations(plain, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ eos_token }}"
    turns = [{"role": "user", "content": "old owls " * 20}, {"role": "assistant", "content": "seven mill"}]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "quick foxes " * 20}, {"text": turns}])
    spec = CalibrationSpec(source=f"jsonl:{path}", samples=1, length=400, chat=True)
    with pytest.raises(CalibrationError, match="holds \\d+ tokens"):
        load_calibration(spec, tokenizer)
    text = decoded(tokenizer, load_calibration(spec.model_copy(update={"length": 64, "samples": 200}), tokenizer))
    assert "[user]quick" in text
    assert "[assistant]seven mill</s>" in text
    assert "</s></s>" not in text


def test_chat_without_a_template_or_without_documents_is_refused(plain, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a"}])
    with pytest.raises(CalibrationError, match="no chat template"):
        load_calibration(CalibrationSpec(source=f"jsonl:{path}", chat=True), plain)
    with pytest.raises(pydantic.ValidationError, match="wikitext2 is not made of documents"):
        CalibrationSpec(source="wikitext2", chat=True)


@settings(max_examples=20, deadline=None)
@given(samples=st.integers(1, 9), length=st.integers(4, 40), seed=st.integers(-(2**40), 2**40))
def test_shape_and_determinism_for_any_seed(tmp_path_factory, samples, length, seed):
    path = tmp_path_factory.getbasetemp() / "any-seed.txt"
    path.write_text(tiny_text(200))
    tokenizer = tiny_tokenizer(bos=True)
    spec = CalibrationSpec(source=f"text:{path}", samples=samples, length=length, seed=seed)
    first, second = load_calibration(spec, tokenizer), load_calibration(spec, tokenizer)
    assert first.tokens.shape == (samples, length)
    assert torch.equal(first.tokens, second.tokens)
    assert first.hash == second.hash == token_hash(first.tokens)
