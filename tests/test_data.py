"""Calibration and evaluation text: what is read, how it is cut, and what a person is told when it cannot be."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import socket
import time
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pydantic
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_text, tiny_tokenizer

from lrc.calibrate.data import CalibrationSpec, evaluation_text, load_calibration, same_text
from lrc.calibrate.packing import divide, text_prefix, token_hash, token_ids, windows_of
from lrc.calibrate.readers import drawn
from lrc.calibrate.sources import parse_mix, parse_source
from lrc.errors import CalibrationError, RequestError

BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def plain():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def with_bos():
    return tiny_tokenizer(bos=True)


@pytest.fixture
def text_file(tmp_path) -> Path:
    path = tmp_path / "prose.txt"
    path.write_text(tiny_text(3000))
    return path


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def numbered(count: int) -> list[str]:
    return [f"{i} {tiny_text(20, seed=i)}" for i in range(count)]


def decoded(tokenizer, calibration) -> str:
    return tokenizer.decode(calibration.tokens.flatten().tolist())


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
    pyarrow.parquet.write_table(pyarrow.table({"content": ["a"], "id": [1]}), tmp_path / "rows.parquet")
    with pytest.raises(CalibrationError, match=r"no column 'text'; there are: content, id"):
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


# Mixes and the words for sources


def test_a_mix_divides_and_shuffles_the_samples(plain, tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 3000)
    mark = {name: plain(f" {name}")["input_ids"] for name in ("one", "two")}
    spec = CalibrationSpec(source=f"text:{tmp_path}/one.txt*0.25+text:{tmp_path}/two.txt*0.75", samples=12, length=24)
    calibration = load_calibration(spec, plain)
    kinds = [set(mark["one"]) - set(mark["two"]) <= set(row) for row in calibration.tokens.tolist()]
    assert sum(kinds) == 3
    assert kinds != sorted(kinds, reverse=True)
    assert [(record["samples"], record["weight"]) for record in calibration.provenance] == [(3, 0.25), (9, 0.75)]
    listed = [{"source": f"text:{tmp_path}/one.txt", "weight": 1}, {"source": f"text:{tmp_path}/two.txt", "weight": 3}]
    assert load_calibration(CalibrationSpec(source=listed, samples=12, length=24), plain).hash == calibration.hash


def test_a_few_samples_are_of_every_source(plain, tmp_path):
    """One source's share may be small: what is measured on a few samples must see it all the same."""
    paths = [tmp_path / f"{name}.txt" for name in "abc"]
    for path in paths:
        path.write_text(path.stem * 4000)
    source = "+".join(f"text:{path}*{weight}" for path, weight in zip(paths, (0.75, 0.125, 0.125), strict=True))
    calibration = load_calibration(CalibrationSpec(source=source, samples=16, length=8), plain)
    texts = [decoded(plain, calibration)[i * 8 :][:8] for i in range(16)]
    assert [text[0] for text in texts] == ["abc"[number] for number in calibration.source]
    for samples, each in ((1, (1, 1, 1)), (3, (1, 1, 1)), (6, (3, 2, 1)), (40, (12, 2, 2))):
        found = [plain.decode(row)[0] for row in calibration.few(samples, 4)]
        assert tuple(found.count(name) for name in "abc") == each
    assert calibration.few(6, 4).shape == (6, 4)


def test_a_few_samples_of_one_source_are_evenly_spread(plain, text_file):
    calibration = load_calibration(CalibrationSpec(source=f"text:{text_file}", samples=8, length=16), plain)
    assert calibration.few(4, 5).equal(calibration.tokens[::2, :5])


def test_a_source_that_gets_no_sample_is_refused(plain, text_file):
    spec = CalibrationSpec(source=f"text:{text_file}*0.9+pydoc*0.1", samples=4, length=8)
    with pytest.raises(RequestError, match=r"none falls to pydoc(.|\n)*at least 10 samples"):
        load_calibration(spec, plain)


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("wikitext2", [("wikitext2", 1)]),
        ("wikitext2*0.5+pydoc*0.5", [("wikitext2", 0.5), ("pydoc", 0.5)]),
        ("c4 + text:a+b.txt", [("c4", 1), ("text:a+b.txt", 1)]),
        ("text:c++.txt", [("text:c++.txt", 1)]),
        ("text:c++.txt*2+jsonl:a.jsonl:body*.5", [("text:c++.txt", 2), ("jsonl:a.jsonl:body", 0.5)]),
        ("text:a.txt+pydoc", [("text:a.txt", 1), ("pydoc", 1)]),
    ],
)
def test_a_mix_is_written_in_one_word(text, pairs):
    assert parse_mix(text) == pairs


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("wikitex2", "Did you mean 'wikitext2'"),
        ("txt:a", "Did you mean 'text:'"),
        ("wikitext2+pydcos", "Did you mean 'pydoc'"),
        ("c4*0.5+pydoc", "pydoc has no weight"),
        ("pydoc*0+c4*1", "weight of pydoc is zero"),
        ("pydoc+pydoc", "pydoc twice"),
        ("pile:train", "pile takes nothing after it"),
        ("text:", "Write text:PATH"),
        ("hf:a:b:c:d:e", "Write hf:NAME"),
        ([], "list of calibration sources is empty"),
        ([{"source": "pydoc", "weight": -1}], "greater than 0"),
    ],
)
def test_what_cannot_be_a_source_is_refused_before_anything_is_read(source, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        CalibrationSpec(source=source)


def test_a_bare_path_is_told_how_to_write_it(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [])
    with pytest.raises(RequestError, match=f"Write jsonl:{path}"):
        parse_source(str(path))


def test_unknown_keys_are_refused():
    with pytest.raises(pydantic.ValidationError, match="sample"):
        CalibrationSpec(source="pydoc", sample=3)


def test_a_path_may_hold_a_colon(tmp_path, plain):
    path = write_jsonl(tmp_path / "a:b", [{"text": tiny_text(50), "body": "x"}])
    assert parse_source(f"jsonl:{path}").path == path
    assert parse_source(f"jsonl:{path}:body").field == "body"


# Text that the model writes


def test_self_takes_the_models_tokens(plain):
    seeds = []

    def generate(samples: int, length: int, seed: int) -> torch.Tensor:
        seeds.append(seed)
        return torch.full((samples, length), 7, dtype=torch.int32)

    calibration = load_calibration(CalibrationSpec(source="self", samples=3, length=9), plain, generate)
    assert torch.equal(calibration.tokens, torch.full((3, 9), 7))
    load_calibration(CalibrationSpec(source="self", samples=3, length=9, seed=1), plain, generate)
    assert seeds[0] != seeds[1]
    with pytest.raises(CalibrationError, match="self"):
        load_calibration(CalibrationSpec(source="self"), plain)


# The hub


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
