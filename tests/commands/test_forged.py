"""Forged and damaged files through the commands: one message that names the file, no traceback, soon, in little memory."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commandline import lrc_ok, run_lrc
from forgeries import DEEP, GGUFS, OF_MODELS, OF_RESULTS, fifo, resealed
from tiny_gguf import write_tiny_gguf
from transformers import AutoModelForCausalLM

from lrc.errors import LrcError

SECONDS = 10  # of the processor, more than a sound command takes
MEMORY = 1500 << 20

# forgeries that only a command that reads the tokenizer meets
_TOKENIZERS = {"tokenizer-null", "tokenizer-deep"}
# forgeries of the forms in config.json
_IN_FORMS = {"rank", "kind", "bias", "extra", "pruned", "modules", "format"}
# the evaluation has no need of these keys
_NOT_EVALUATED = {"record-bytes-1e18"}


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    """A command that waits for a FIFO would wait for ever."""

    def late(*_: object) -> None:
        raise TimeoutError("the command did not end in time")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(240)  # other processes may take most of the processor
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def sound(tiny_checkpoints, tiny_text_file, tmp_path_factory) -> dict[str, Path]:
    """A model with an index, and a result of lrc."""
    model, result = tiny_checkpoints("llama", num_hidden_layers=2), tmp_path_factory.mktemp("sound") / "result"
    lrc_ok(*compression(model, result, tiny_text_file))
    return {"model": model, "result": result}


def compression(model: Path, out: Path, text: Path) -> tuple[object, ...]:
    told = ("--recipe", "svd-llm", "--ratio", 0.3, "--calibration", f"text:{text}", "--samples", 4, "--length", 48)
    return ("compress", model, "--out", out, *told, "--max-shard-size", "60kB")


def evaluation(model: Path, text: Path) -> tuple[object, ...]:
    return ("eval", model, "--tasks", f"text:{text}", "--length", 32, "--max-windows", 1, "--allow-calibration-text")


def assert_refused(*command: object) -> str:
    """Run a command, which must refuse its input in a few lines; what it said."""
    result = run_lrc(*command)
    assert result.code in (1, 2), result.out
    assert "Traceback" not in result.err and result.told.startswith("lrc: ")
    assert len(result.told) < 3000 and result.told.count("\n") <= 4, result.err
    return result.told


@pytest.mark.parametrize("name", OF_MODELS)
def test_a_forged_model(name, sound, tiny_text_file, tmp_path):
    folder = shutil.copytree(sound["model"], tmp_path / "model")
    OF_MODELS[name](folder)
    if name in _TOKENIZERS:
        said = assert_refused(*compression(folder, tmp_path / "out", tiny_text_file))
    else:
        said = assert_refused("plan", folder, "--ratio", 0.3)
    assert "model" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", OF_RESULTS)
def test_a_forged_result(name, sound, tiny_text_file, tmp_path):
    folder = shutil.copytree(sound["result"], tmp_path / "result")
    forgery = OF_RESULTS[name]
    (forgery if name.startswith("record") else resealed(forgery))(folder)
    assert_refused("verify", folder)
    if name not in _NOT_EVALUATED:
        assert_refused(*evaluation(folder, tiny_text_file))


@pytest.mark.parametrize("name", [name for name in OF_RESULTS if name.partition("-")[0] in _IN_FORMS and name != "rank-other"])
def test_forged_forms_in_transformers(name, sound, tmp_path):
    """Without any command of lrc: what people write in their own scripts."""
    folder = shutil.copytree(sound["result"], tmp_path / "result")
    OF_RESULTS[name](folder)
    with pytest.raises(LrcError, match="quantization_config|format 99"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_header_of_a_million_tensors(sound, tmp_path):
    folder = shutil.copytree(sound["model"], tmp_path / "model")
    header = b"{" + b",".join(b'"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % n for n in range(400_000)) + b"}"
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert "its header has" in assert_refused("plan", folder, "--ratio", 0.3)


@pytest.mark.parametrize("name", GGUFS)
def test_a_forged_gguf(name, tmp_path):
    (tmp_path / "model.gguf").write_bytes(GGUFS[name])
    assert "model.gguf" in assert_refused("plan", tmp_path / "model.gguf", "--ratio", 0.3)


def test_a_sound_gguf_is_still_read(tmp_path):
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    assert "kept: " in lrc_ok("plan", file, "--ratio", 0.3)
    shutil.copy(file, tmp_path / "tiny-00001-of-00003.gguf")
    said = assert_refused("plan", tmp_path / "tiny-00001-of-00003.gguf", "--ratio", 0.3)
    assert "one part of" in said and "llama-gguf-split --merge" in said


def test_scales_of_a_gguf_that_are_not_finite(tmp_path, tiny_text_file):
    """Weights in blocks carry their own scales; one that is no number spoils 32 weights."""
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    data = bytearray(file.read_bytes())
    data[-64:] = b"\xff" * 64
    file.write_bytes(data)
    result = run_lrc(*compression(file, tmp_path / "out", tiny_text_file))
    assert result.code != 0 and "Traceback" not in result.err
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_recipe_whose_aliases_explode(tmp_path, sound):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]" for n in range(1, 9))]
    for key in ("keep", "method", "limits", "calibration", "depth"):
        (tmp_path / "bomb.yaml").write_text("\n".join([*lines, f"{key}: *a8"]))
        said = assert_refused("plan", sound["model"], "--recipe", tmp_path / "bomb.yaml", "--ratio", 0.3)
        assert "with its aliases written out" in said
    (tmp_path / "bomb.yaml").write_text(
        "\n".join(["m0: &m0 {a: 1}", *(f"m{n}: &m{n} {{<<: [*m{n - 1}, *m{n - 1}]}}" for n in range(1, 40))])
    )
    assert_refused("plan", sound["model"], "--recipe", tmp_path / "bomb.yaml", "--ratio", 0.3)


@pytest.mark.parametrize(
    "content",
    ["method: &a [*a]", "[" * DEEP, "ratio: 0x" + "f" * 5000, "keep: " + "[" * 40 + "]" * 40, "a: b\n" * 300_000, "\ud800"],
    ids=["circle", "deep", "huge-number", "nested", "large", "surrogate"],
)
def test_a_recipe_that_nobody_writes(content, tmp_path, sound):
    (tmp_path / "odd.yaml").write_bytes(content.encode("utf-8", "surrogatepass"))
    assert_refused("plan", sound["model"], "--recipe", tmp_path / "odd.yaml")


def test_aliases_of_a_recipe_are_still_read(tmp_path, sound):
    (tmp_path / "fine.yaml").write_text('method: svd\nratio: 0.3\nkeep: &kept ["*k_proj"]\ncalibration: {source: pydoc}\n')
    assert lrc_ok("plan", sound["model"], "--recipe", tmp_path / "fine.yaml")


@pytest.mark.parametrize("what", ["recipe", "calibration", "task", "model"])
def test_a_fifo_is_never_waited_for(what, tmp_path, sound, tiny_text_file):
    fifo("pipe.gguf")(tmp_path)
    pipe = tmp_path / "pipe.gguf"
    command = {
        "recipe": ("plan", sound["model"], "--recipe", pipe, "--ratio", 0.3),
        "calibration": compression(sound["model"], tmp_path / "out", pipe),
        "task": evaluation(sound["model"], pipe),
        "model": ("plan", pipe, "--ratio", 0.3),
    }[what]
    assert "is a FIFO" in assert_refused(*command)


def test_names_that_no_file_can_have(tmp_path, sound, tiny_text_file):
    long = "n" * 5000
    for command in (
        ("plan", long, "--ratio", 0.3),
        ("plan", sound["model"], "--recipe", long, "--ratio", 0.3),
        ("verify", long),
        compression(sound["model"], tmp_path / "out", Path(long)),
        evaluation(sound["model"], Path(long)),
    ):
        assert_refused(*command)


# ---- whole processes: what a person sees, with time and memory

END_TO_END = [
    "config-deep", "config-500-mb", "config-fifo", "config-device", "layers-1e5", "layers-1e18", "heads-zero", "vocab-1e12",
    "head-dim-1e10", "rope-nan", "labels-1e9", "surrogate", "quantized-list", "index-list", "index-deep", "index-parent",
    "index-long", "shard-fifo", "header-2^63", "header-shape-1e18", "tokenizer-deep", "tokenizer-fifo", "generation-deep",
]  # fmt: skip
OF_RESULTS_END_TO_END = [
    "rank-negative",
    "rank-1e18",
    "pruned-deep",
    "modules-null",
    "record-deep",
    "record-large",
    "record-fifo",
]


def process(*command: object) -> tuple[int, str, float, int]:
    """Exit code, stderr, seconds of the processor and peak bytes of `lrc` in a process of its own."""
    package = Path(__file__).resolve().parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", "from lrc.cli import main; main()", *map(str, command)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=package.parent,
    ) as running:
        assert running.stderr is not None
        said = running.stderr.read()
        _, status, usage = os.wait4(running.pid, 0)
        running.returncode = os.waitstatus_to_exitcode(status)
    return running.returncode, said, usage.ru_utime + usage.ru_stime, usage.ru_maxrss << 10


@pytest.fixture(scope="module")
def usual(sound, tiny_text_file) -> float:
    """Seconds of the processor that a sound evaluation takes here, most of them for importing libraries."""
    code, said, seconds, _ = process(*evaluation(sound["model"], tiny_text_file))
    assert code == 0, said
    return seconds


def assert_refused_by_process(usual: float, *command: object) -> None:
    code, said, seconds, peak = process(*command)
    assert code in (1, 2), said
    assert "Traceback" not in said
    assert seconds < usual + SECONDS
    assert peak < MEMORY


@pytest.mark.slow
@pytest.mark.parametrize("name", END_TO_END)
def test_forged_models_in_processes_of_their_own(name, sound, usual, tiny_text_file, tmp_path):
    folder = shutil.copytree(sound["model"], tmp_path / "model")
    OF_MODELS[name](folder)
    if name not in _TOKENIZERS:
        assert_refused_by_process(usual, "plan", folder, "--ratio", 0.3)
    assert_refused_by_process(usual, *compression(folder, tmp_path / "out", tiny_text_file))
    assert_refused_by_process(usual, *evaluation(folder, tiny_text_file))


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_RESULTS_END_TO_END)
def test_forged_results_in_processes_of_their_own(name, sound, usual, tiny_text_file, tmp_path):
    folder = shutil.copytree(sound["result"], tmp_path / "result")
    OF_RESULTS[name](folder)
    assert_refused_by_process(usual, "verify", folder)
    assert_refused_by_process(usual, *evaluation(folder, tiny_text_file))
