"""Words for sources of calibration text: mixes, samples of every source, text that the model writes."""

from __future__ import annotations

import pydantic
import pytest
import torch
from texts import decoded, write_jsonl
from tiny import tiny_text

from lrc.calibrate.data import CalibrationSpec, load_calibration
from lrc.calibrate.sources import parse_mix, parse_source
from lrc.errors import CalibrationError, RequestError


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
