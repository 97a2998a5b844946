"""Local files of text in every format and with every fault: the same tokens, or an error that says what is wrong."""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from commandline import lrc_ok, run_lrc
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import decoded, numbered
from tiny import tiny_text, tiny_tokenizer

from lrc.calibrate.data import CalibrationSpec, evaluation_text, load_calibration, same_text
from lrc.calibrate.files import long_text, rows
from lrc.calibrate.files.columns import columns_of
from lrc.calibrate.sources import parse_source
from lrc.errors import CalibrationError, LrcError, RequestError

TEXTS = numbered(600)  # more than one handful of a file that can only be read from its beginning


COMPRESS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def put(path: Path, data: bytes) -> Path:
    if path.suffix == ".zst":
        with pyarrow.output_stream(str(path), compression="zstd") as out:
            out.write(data)
    else:
        path.write_bytes(COMPRESS.get(path.suffix, bytes)(data))
    return path


def csv_of(header: list[str], table: list[list[str]], delimiter: str = ",") -> bytes:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows([header, *table])
    return text.getvalue().encode()


JSONL = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)).encode()
FORMATS = {
    "a.jsonl": JSONL,
    "a.ndjson": JSONL,
    "a.jsonl.gz": JSONL,
    "a.jsonl.bz2": JSONL,
    "a.jsonl.xz": JSONL,
    "a.jsonl.zst": JSONL,
    "lines.json": JSONL,
    "marked.jsonl.gz": b"\xef\xbb\xbf" + JSONL,
    "texts.json": json.dumps(TEXTS).encode(),
    "objects.json.gz": json.dumps([{"text": text} for text in TEXTS], indent=1).encode(),
    "a.csv": csv_of(["id", "Text"], [[str(i), text] for i, text in enumerate(TEXTS)]),
    "marked.csv.zst": b"\xef\xbb\xbf" + csv_of(["text"], [[text] for text in TEXTS]),
    "a.tsv": csv_of(["text", "source"], [[text, "x"] for text in TEXTS], "\t"),
    "semicolons.csv": csv_of(["text", "source"], [[text, "x, y"] for text in TEXTS], ";"),
}


def calibration(path: Path | str, tokenizer, kind: str = "text", **more):
    return load_calibration(CalibrationSpec(source=f"{kind}:{path}", **{"samples": 9, "length": 50} | more), tokenizer)


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> str:
    return calibration(put(tmp_path_factory.mktemp("expected") / "a.jsonl", JSONL), tiny_tokenizer(), "jsonl").hash


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_tokens(name, expected, plain, tmp_path):
    path = put(tmp_path / name, FORMATS[name])
    assert calibration(path, plain).hash == expected
    many = calibration(path, plain, samples=200)
    assert many.tokens.shape == (200, 50) and not many.provenance[0]["overlap"]


def test_parquet_by_its_name(expected, plain, tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"content": TEXTS}), tmp_path / "a.parquet", row_group_size=7)
    assert calibration(tmp_path / "a.parquet", plain).hash == expected


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz", ".zst"])
def test_one_long_text(suffix, plain, tmp_path):
    text = tiny_text(3000)
    whole = calibration(put(tmp_path / "plain.txt", text.encode()), plain)
    packed = calibration(
        put(tmp_path / f"packed.txt{suffix}", b"\xef\xbb\xbf" + text.replace(" the ", " the\r\n").encode()), plain
    )
    broken = calibration(put(tmp_path / "lines.txt", text.replace(" the ", " the\n").encode()), plain)
    assert packed.hash == broken.hash != whole.hash
    assert packed.provenance[0]["sha256"] == broken.provenance[0]["sha256"]


def test_the_same_documents_compressed_are_the_same_text(plain, tmp_path):
    """Or a calibration text could be an evaluation text in another wrapping."""
    plain_file, packed = put(tmp_path / "a.jsonl", JSONL), put(tmp_path / "a.jsonl.zst", JSONL)
    one, other = calibration(plain_file, plain), calibration(packed, plain)
    assert one.provenance[0]["sha256"] == other.provenance[0]["sha256"]
    assert same_text(one.provenance, other.provenance)
    assert evaluation_text(f"text:{plain_file}").text == evaluation_text(f"text:{packed}").text == "\n\n".join(TEXTS)


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (["id", "text", "content"], ("text",)),
        (["TEXT", "label"], ("TEXT",)),
        (["content", "prompt"], ("content",)),
        (["messages", "source"], ("messages",)),
        (["prompt", "completion"], ("prompt", "completion")),
        (["output", "input", "instruction"], ("instruction", "input", "output")),
        (["question", "answer"], ("question", "answer")),
        (["body", "id"], ()),
    ],
)
def test_columns_by_their_usual_names(names, columns):
    assert columns_of(names) == columns


def test_prompts_stand_before_their_answers_and_conversations_are_rendered(plain, tmp_path):
    table = csv_of(["answer", "question"], [["seven owls", "the mill"], ["", "no answer"]])
    assert evaluation_text(f"text:{put(tmp_path / 'a.csv', table)}").text == "the mill\n\nseven owls\n\nno answer"
    turns = [{"from": "human", "value": "the river " * 30}, {"from": "gpt", "value": "an oak"}]
    path = put(tmp_path / "b.json.gz", json.dumps([{"conversations": turns}] * 3).encode())
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    with pytest.raises(CalibrationError, match="holds conversations"):
        calibration(path, tokenizer)
    assert "[assistant]an oak" in decoded(tokenizer, calibration(path, tokenizer, chat=True, samples=20, length=32))


FAULTS = [
    ("a.csv", b"id,body\n1,x\n", r"a\.csv: no column 'text'; there are: body, id.*\n.*csv:PATH:COLUMN"),
    ("a.csv", b"", "a.csv has no header"),
    ("a.csv", b"text\n", "every document is empty"),
    ("a.csv", b"text,n\na,b,c\n", r"a\.csv:2: 3 fields, and the header has 2"),
    ("a.csv", b'text\n"never closed\n', "damaged as CSV"),
    ("a.csv", b"text\nna\xefve\n", r"not UTF-8 text: byte 7 is 0xef.*\n.*iconv"),
    ("a.jsonl.gz", b'{"body": "x"}\n', r"jsonl\.gz:1: no field 'text'; there are: body"),
    ("a.jsonl.gz", b'{"text": "x"}\n{"body": "x"}\n', r"jsonl\.gz:2: no field 'text'"),
    ("a.jsonl.zst", b'{"text": "x"}\n{"text": \n', r"jsonl\.zst:2: not a line of JSON"),
    ("a.jsonl", b'[{"text": "x"}]\n', r"list, not an object.*\n.*json:PATH"),
    ("a.json", b'{\n "text": "x"\n}', "neither a list nor JSON lines"),
    ("a.json", b'[{"text": "x"}, {"text": ', "damaged as JSON"),
    ("a.json", b'[{"text": "x"} {"text": "y"}]', "in place of a comma"),
    ("a.json", b'["a"]\n["b"]\n', "more after the list"),
    ("a.json", b"[1, 2]", "element 0 is int"),
    ("a.json", b"[" * 200_000, "nested too deep"),
    ("a.json", b'["na\xefve"]', "not UTF-8 text: byte 4 is 0xef"),
    ("a.json", b"[]", "every document is empty"),
    ("a.txt", "the mill".encode("utf-16"), r"UTF-16 text.*\n.*iconv -f UTF-16"),
    ("a.txt", "the mill".encode("utf-32"), "UTF-32 text"),
    ("a.txt", "the mill".encode("utf-16-le"), "no text: byte 1 is 0"),
    ("a.jsonl", json.dumps({"text": "x"}).encode("utf-16"), "UTF-16 text"),
    ("a.txt", b"na\xefve", r"not UTF-8 text: byte 2 is 0xef"),
    ("a.txt", b"\x7fELF\x00\x01", "no text: byte 4 is 0"),
    ("a.txt", b"PAR1....", "is a parquet file"),
    ("a.txt", b"PK\x03\x04....", "is a zip archive"),
    ("a.txt.gz", b"", "holds no text"),
    ("a.txt.gz", b" \n", "holds no text"),
    ("a.parquet", b"text", "cannot be read as parquet"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), FAULTS, ids=[f"{name}-{message[:20]}" for name, _, message in FAULTS])
def test_faults_are_named(name, content, message, plain, tmp_path):
    path = put(tmp_path / name, content)
    with pytest.raises(CalibrationError, match=message):
        calibration(path, plain, samples=1, length=8)
    with pytest.raises(LrcError):
        evaluation_text(f"text:{path}")


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv"])
def test_a_compressed_file_that_is_cut_or_no_such_file(name, suffix, plain, tmp_path):
    path = put(tmp_path / (name + suffix), {"a.jsonl": JSONL, "a.txt": JSONL, "a.csv": FORMATS["a.csv"]}[name])
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-3]):
        path.write_bytes(damaged)
        with pytest.raises(CalibrationError, match=r"cannot be decompressed.*\n.*damaged or cut off"):
            calibration(path, plain)
    path.write_bytes(JSONL)
    with pytest.raises(CalibrationError, match=f"is named {suffix}, and its content is not compressed"):
        calibration(path, plain)
    (tmp_path / name).write_bytes(whole)
    with pytest.raises(CalibrationError, match=f"is compressed .*\n.*{name}{suffix}"):
        calibration(tmp_path / name, plain)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), name=st.sampled_from(["a.csv", "a.json", "a.jsonl", "a.jsonl.gz", "a.txt", "a.parquet", "a.jsonl.zst"]))
def test_any_bytes_are_text_or_an_error(data, name, tmp_path_factory):
    """No traceback from a file, whatever it holds."""
    path = tmp_path_factory.getbasetemp() / name
    good = FORMATS.get(name, JSONL)[:400]
    kind = data.draw(st.sampled_from(["raw", "changed", "stored"]))
    if kind == "raw":
        path.write_bytes(data.draw(st.binary(max_size=60)))
    else:
        place = data.draw(st.integers(0, len(good) - 1))
        changed = good[:place] + data.draw(st.binary(max_size=6)) + good[place + 1 :]
        put(path, changed)
        if kind == "stored":
            stored = bytearray(path.read_bytes())
            stored[data.draw(st.integers(0, len(stored) - 1))] ^= data.draw(st.integers(1, 255))
            path.write_bytes(bytes(stored))
    with contextlib.suppress(CalibrationError):
        assert calibration(path, tiny_tokenizer(), samples=1, length=4).tokens.shape == (1, 4)


def test_memory_does_not_grow_with_the_file(plain, tmp_path, monkeypatch):
    """Files of 16 MB here, with the limits of files of many GB."""
    monkeypatch.setattr(long_text, "WHOLE", 2 << 20)
    monkeypatch.setattr(long_text, "PIECES", 1)
    line = json.dumps({"text": "the mill " * 100}).encode() + b"\n"
    big = line * (16_000_000 // len(line))
    array = b"[" + line.replace(b"\n", b",\n") * (16_000_000 // len(line)) + line + b"]"
    files = {"a.jsonl.zst": big, "a.json.zst": array, "a.txt.zst": big}
    for name, content in files.items():
        put(tmp_path / name, content)
    del big, array, files
    for name in ("a.jsonl.zst", "a.json.zst", "a.txt.zst"):
        tracemalloc.start()
        found = calibration(tmp_path / name, plain, samples=2)
        assert tracemalloc.get_traced_memory()[1] < 14_000_000, name
        tracemalloc.stop()
    assert found.provenance[0]["pieces"] == 1 and found.provenance[0]["of"] > 12
    assert "the first 1 of" in evaluation_text(f"text:{tmp_path / 'a.txt.zst'}").protocol


def test_a_row_without_end_is_refused(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "LONGEST", 1000)
    path = put(tmp_path / "a.jsonl.gz", json.dumps({"text": "x" * 2000}).encode())
    with pytest.raises(CalibrationError, match="line is longer than"):
        calibration(path, plain)


def test_how_a_source_is_written(tmp_path):
    path = put(tmp_path / "a.jsonl.gz", JSONL)
    with pytest.raises(RequestError, match=f"Write jsonl:{path}"):
        parse_source(str(path))
    assert parse_source(f"csv:{path}:body").field == "body"
    assert [parse_source(f"text:x{suffix}").kind for suffix in (".txt", ".md.gz", ".csv.zst", "")] == [
        "text",
        "text",
        "csv",
        "text",
    ]


def test_the_commands_read_them(tiny_checkpoints, tmp_path):
    model = tiny_checkpoints("llama", num_hidden_layers=2)
    path = put(tmp_path / "a.jsonl.gz", JSONL)
    sizes = ["--recipe", "svd-llm", "--ratio", 0.3, "--samples", 4, "--length", 32]
    lrc_ok("compress", model, "--out", tmp_path / "out", "--calibration", f"text:{path}", *sizes)
    refused = run_lrc("eval", tmp_path / "out", "--tasks", f"text:{path}", "--length", 32, "--max-windows", 2)
    assert refused.code == 2 and "calibrated on the text" in refused.err
    other = put(tmp_path / "b.csv", csv_of(["text"], [[tiny_text(100, seed=9)]]))
    assert "text:b.csv-token-ppl@32" in lrc_ok("eval", tmp_path / "out", "--tasks", f"text:{other}", "--length", 32)
