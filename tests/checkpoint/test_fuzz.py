"""Changed files: whatever bytes a reader meets, it answers or says what is wrong, soon and in bounded memory.

The quick tests draw the same inputs every time; the slow ones draw 100,000 others at each run.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commandline import lrc_ok
from fuzzing import Watch, changed_bytes, changed_json
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tiny import write_tiny
from tiny_gguf import write_tiny_gguf

from lrc.checkpoint.atomic import read_json, signed_json
from lrc.checkpoint.folder import read_record
from lrc.checkpoint.hf_quantizer import install_stored
from lrc.checkpoint.location import Location
from lrc.checkpoint.reading.weights import SafetensorsSource
from lrc.checkpoint.untrusted.gguf_header import require_sound
from lrc.commands.sweep_rows import _Table
from lrc.model.view import ModelView
from lrc.plan.load_recipe import load_recipe, shipped

INDEX = "model.safetensors.index.json"
Reader = Callable[[bytes], object]


class Case:
    """A reader, the strategy of its inputs, and how many of them are drawn.

    Args:
        inputs: of the changed bytes.
        read: reads them.
        quick, slow: numbers of inputs.
    """

    def __init__(self, inputs: st.SearchStrategy[bytes], read: Reader, quick: int, slow: int) -> None:
        self.inputs, self.read, self.quick, self.slow = inputs, read, quick, slow

    def run(self, count: int, same: bool) -> int:
        """Draw so many inputs (`same`: those of every run); how many were refused."""
        watch = Watch()

        @settings(
            max_examples=count, derandomize=same, database=None, deadline=None, suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )  # fmt: skip
        @given(self.inputs)
        def drawn(data: bytes) -> None:
            watch(lambda: self.read(data))

        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            drawn()
        watch.require_bounded()
        return watch.refused


@pytest.fixture(scope="module")
def cases(tmp_path_factory, tiny_text_file) -> dict[str, Case]:
    """The readers, each of a folder of its own that is sound but for the file that it reads."""
    base = tmp_path_factory.mktemp("fuzz")
    write_tiny(base / "model", "llama", num_hidden_layers=1, hidden_size=16, intermediate_size=24, head_dim=4)
    told = ("--recipe", "svd-llm", "--ratio", 0.3, "--calibration", f"text:{tiny_text_file}", "--samples", 2, "--length", 32)
    lrc_ok("compress", base / "model", "--out", base / "result", *told)
    sound_gguf = write_tiny_gguf(base / "sound.gguf").read_bytes()
    return (
        _of_weights(base)
        | _of_configurations(base)
        | {
            "gguf": Case(_gguf_bytes(sound_gguf), _in_file(base / "x.gguf", lambda path: require_sound(path)), 600, 26_000),
            "gguf-model": Case(
                _gguf_bytes(sound_gguf),
                _in_file(base / "y.gguf", lambda path: ModelView(Location("y", base, path.name))),
                10,
                1_000,
            ),
            "recipe": Case(_recipes(), _in_file(base / "recipe.yaml", lambda path: load_recipe(str(path))), 150, 5_000),
            "sweep": Case(
                changed_json({"asked": {"model": "a"}, "rows": [{"name": "svd-0.2", "metrics": {"ppl": 2.0}, "nbytes": 3}]}),
                _in_file(base / "sweep.json", lambda path: read_json(path, _Table)), 200, 5_000,
            ),
        }
    )  # fmt: skip


def _of_weights(base: Path) -> dict[str, Case]:
    """Readers of the index, of a header, and of the record of a result."""
    whole, split = (shutil.copytree(base / "model", base / name) for name in ("whole", "split"))
    single = split / "model-00001-of-00001.safetensors"  # beside model.safetensors the index would not be read
    names = SafetensorsSource(split).names()
    (split / "model.safetensors").rename(single)
    index = {"metadata": {"total_size": single.stat().st_size}, "weight_map": dict.fromkeys(names, single.name)}
    for path in [*whole.glob("*.safetensors"), whole / INDEX]:
        path.unlink(missing_ok=True)
    shard = single.read_bytes()
    length = 8 + int.from_bytes(shard[:8], "little")
    result = shutil.copytree(base / "result", base / "record")
    record = json.loads((result / "lrc.json").read_text())

    def of_header(data: bytes) -> object:
        (whole / "model.safetensors").write_bytes(data + shard[length:])
        return SafetensorsSource(whole)

    header = json.loads(shard[8:length])
    with_length = changed_json(header).map(lambda text: len(text).to_bytes(8, "little") + text)
    either = st.one_of(changed_bytes(json.dumps(index).encode()), changed_json(index))
    return {
        "header": Case(st.one_of(changed_bytes(shard[:length]), with_length), of_header, 300, 20_000),
        "index": Case(either, _in_file(split / INDEX, lambda path: SafetensorsSource(split)), 400, 15_000),
        "record": Case(
            st.one_of(changed_bytes(json.dumps(record).encode()), changed_json(record).map(_signed)),
            _in_file(result / "lrc.json", lambda path: read_record(result)), 400, 15_000,
        ),
    }  # fmt: skip


def _of_configurations(base: Path) -> dict[str, Case]:
    """Readers of config.json, of the forms in it, and of the tokenizer's files."""
    plain, forms, tokens = (shutil.copytree(base / name, base / new) for name, new in
                            (("model", "plain"), ("result", "forms"), ("model", "tokens")))  # fmt: skip
    config = json.loads((plain / "config.json").read_text())
    compressed = json.loads((forms / "config.json").read_text())
    tokenizer = json.loads((tokens / "tokenizer.json").read_text())

    def of_forms(path: Path) -> object:
        return ModelView(Location("forms", forms), prepare=install_stored)

    either = st.one_of(changed_bytes(json.dumps(config).encode()), changed_json(config), changed_json(config))
    return {
        "config": Case(
            either, _in_file(plain / "config.json", lambda path: ModelView(Location("plain", plain)).targets), 80, 8_000
        ),
        "forms": Case(
            changed_json(compressed, ("quantization_config",)), _in_file(forms / "config.json", of_forms), 70, 5_000
        ),
        "tokenizer": Case(
            st.one_of(changed_bytes(json.dumps(tokenizer).encode()), changed_json(tokenizer)),
            _in_file(tokens / "tokenizer.json", lambda path: Location("tokens", tokens).tokenizer()), 40, 2_000,
        ),
    }  # fmt: skip


def _signed(data: bytes) -> bytes:
    """A changed record with a digest that fits it, so that the change gets past the digest."""
    try:
        held = json.loads(data)
    except (ValueError, RecursionError):
        return data
    return signed_json(held) if isinstance(held, dict) else data


def _gguf_bytes(sound: bytes) -> st.SearchStrategy[bytes]:
    """Changes of the header, most of which are not in the long middle of the file."""
    return changed_bytes(sound[:4000]).map(lambda start: start + sound[4000:])


def _recipes() -> st.SearchStrategy[bytes]:
    bombs = [
        b"a: &a [x, x]\nb: &b [*a, *a]\nmethod: *b",
        b"method: &a [*a]",
        b"method: svd\nkeep: [!!binary aGk=, .nan, 0x" + b"f" * 5000 + b"]",
    ]
    sound = [text.encode() for name, text in sorted(shipped().items())[:6]]
    return st.one_of(st.sampled_from(bombs), st.sampled_from(sound).flatmap(changed_bytes))


def _in_file(path: Path, read: Callable[[Path], object]) -> Reader:
    def reader(data: bytes) -> object:
        path.write_bytes(data)
        return read(path)

    return reader


NAMES = ("header", "index", "record", "config", "forms", "tokenizer", "gguf", "gguf-model", "recipe", "sweep")


@pytest.mark.parametrize("name", NAMES)
def test_changed_files_are_read_or_refused(name, cases):
    torch.set_num_threads(1)
    assert cases[name].run(cases[name].quick, same=True) > 0, "the changes do not reach the reader"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_many_changed_files_are_read_or_refused(name, cases):
    assert cases[name].run(cases[name].slow, same=False) > 0, "the changes do not reach the reader"


def test_the_slow_tier_draws_a_hundred_thousand(cases):
    assert sum(case.slow for case in cases.values()) >= 100_000
    assert sum(case.quick for case in cases.values()) >= 2_000
