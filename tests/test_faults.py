"""Kills, full disks, damaged checkpoints, hostile ones: what a long run meets, through the real command on tiny models."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from commandline import contents, lrc_ok, run_lrc, untouched
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import tiny_text

import lrc.artifact
import lrc.run
from lrc.artifact import JOURNAL, Artifact
from lrc.errors import CheckpointError
from lrc.report import Progress

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def model(tiny_checkpoints) -> Path:
    return tiny_checkpoints("llama", num_hidden_layers=2)


@pytest.fixture
def damaged(model, tmp_path) -> Path:
    """A copy of the model to damage."""
    return shutil.copytree(model, tmp_path / "damaged")


@pytest.fixture(scope="module")
def request_for(tiny_text_file) -> Callable[..., list[object]]:
    """The command line of one compression."""

    def request(model: Path, out: Path, *more: object, text: Path = tiny_text_file) -> list[object]:
        sizes = ["--samples", 8, "--length", 48]
        told = ["--recipe", "svd-llm", "--ratio", 0.3, "--calibration", f"text:{text}"]
        return ["compress", model, "--out", out, *told, *sizes, *more]

    return request


@pytest.fixture(scope="module")
def uninterrupted(model, request_for, tmp_path_factory) -> Callable[[str], dict[str, str]]:
    """The files of a run that nothing disturbed, by `propagate`."""
    made: dict[str, dict[str, str]] = {}

    def run(propagate: str = "original") -> dict[str, str]:
        if propagate not in made:
            out = tmp_path_factory.mktemp("uninterrupted") / "out"
            assert lrc_ok(*request_for(model, out, "--propagate", propagate))
            made[propagate] = contents(out)
        return made[propagate]

    return run


# ---- killed


def killed_before(operation: int, folder: Path, arguments: list[object]) -> bool:
    """Run the command in a child that kills itself before its n-th change to `folder`; False if it was done earlier.

    Every creation, renaming, shortening and removal of a file counts. SIGKILL leaves no room for clean-up.
    """
    child = os.fork()
    if child == 0:
        seen = 0

        def audit(event: str, args: tuple) -> None:
            nonlocal seen
            changes = event in ("os.rename", "os.remove", "os.truncate") or (
                event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            )
            if changes and str(args[0]).startswith(str(folder)):
                seen += 1
                if seen == operation:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(audit)
            os._exit(run_lrc(*arguments).code)
        except BaseException:  # noqa: BLE001 (a child of pytest must never return into it)
            traceback.print_exc()
            os._exit(70)
    deadline = time.monotonic() + 60
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail(f"the run hangs before operation {operation}")
        time.sleep(0.002)
    code = os.waitstatus_to_exitcode(ended[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def journalled(folder: Path) -> list[str]:
    """The shards whose line in the journal is complete."""
    if not (folder / JOURNAL).is_file():
        return []
    lines = (folder / JOURNAL).read_bytes().split(b"\n")[:-1]
    return [entry["file"] for line in lines if "file" in (entry := json.loads(line))]


@pytest.mark.parametrize("propagate", ["original", "compressed"])
def test_killed_before_any_change_to_the_disk_it_continues_to_the_same_bytes(
    propagate, model, request_for, uninterrupted, tmp_path
):
    expected = uninterrupted(propagate)
    operation = 1
    while True:
        out = tmp_path / str(operation)
        arguments = request_for(model, out, "--propagate", propagate)
        if not killed_before(operation, out, arguments):
            break
        if (out / "config.json").exists():  # whatever looks finished is finished
            assert set(expected) <= set(contents(out))
        done = journalled(out)
        before = untouched(out)
        lrc_ok(*arguments)
        assert contents(out) == expected, f"killed before change {operation}"
        assert {name: untouched(out)[name] for name in done} == {name: before[name] for name in done}
        shutil.rmtree(out)
        operation += 1
        if propagate == "compressed" and len(done) == 3:  # from here on there is nothing left to propagate
            break
    assert operation > (20 if propagate == "original" else 7), "the matrix has lost its points"


@pytest.mark.parametrize(
    ("moment", "propagate"), [("layer 1 is in the journal", "compressed"), ("lrc.json appears", "original")]
)
def test_sigkill_of_a_real_process(moment, propagate, request_for, tiny_checkpoints, tiny_text_file, tmp_path):
    deep = tiny_checkpoints("llama", num_hidden_layers=8)
    arguments = {name: request_for(deep, tmp_path / name, "--propagate", propagate) for name in ("killed", "whole")}
    out = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "lrc.cli", *map(str, arguments["killed"])],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        while process.poll() is None:
            if len(journalled(out)) >= 2 if moment.startswith("layer") else (out / "lrc.json").exists():
                process.kill()
                break
            time.sleep(0.0005)
    finally:
        process.kill()
        _, errors = process.communicate()
    assert process.returncode in (-signal.SIGKILL, 0), errors.decode()
    done, before = journalled(out), untouched(out)
    if moment.startswith("layer"):
        assert process.returncode == -signal.SIGKILL
        assert 2 <= len(done) < 9
        assert not (out / "config.json").exists()
    printed = lrc_ok(*arguments["killed"])
    lrc_ok(*arguments["whole"])
    assert contents(out) == contents(tmp_path / "whole")
    assert {name: untouched(out)[name] for name in done} == {name: before[name] for name in done}
    if len(done) < 9 and moment.startswith("layer"):
        assert printed.count("finished earlier, replayed") == len(done)


@pytest.fixture
def half_done(model, request_for, tmp_path) -> tuple[Path, list[object]]:
    """A run that was killed between its layers, and its command."""
    out = tmp_path / "half"
    arguments = request_for(model, out)
    operation = 1
    while len(journalled(out)) != 1:
        shutil.rmtree(out, ignore_errors=True)
        assert killed_before(operation, out, arguments)
        operation += 1
    return out, arguments


def test_half_a_journal_line_and_half_a_shard_are_thrown_away(half_done, uninterrupted):
    out, arguments = half_done
    with (out / JOURNAL).open("ab") as journal:
        journal.write(b'{"key": "model.layers.1", "file": "model-0000')
    (out / "model-00002-of-00003.safetensors.lrc-partial").write_bytes(b"\0" * 100)
    (out / "model-00002-of-00003.safetensors").write_bytes(b"\0" * 100)  # renamed, but never journalled
    operation = 3
    while len(journalled(out)) != 2:  # killed once more: what came after the half line counts
        assert killed_before(operation, out, arguments)
        operation += 1
    done = untouched(out)
    lrc_ok(*arguments)
    assert contents(out) == uninterrupted()
    finished = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2)]
    assert [untouched(out)[name] for name in finished] == [done[name] for name in finished]


def test_zeros_that_a_power_cut_left_in_the_journal_are_thrown_away(half_done, uninterrupted):
    out, arguments = half_done
    with (out / JOURNAL).open("ab") as journal:
        journal.write(b"\0" * 64 + b"\n")
    lrc_ok(*arguments)
    assert contents(out) == uninterrupted()


def test_a_finished_shard_that_was_damaged_since_is_made_again(half_done, uninterrupted):
    out, arguments = half_done
    shard = out / journalled(out)[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    lrc_ok(*arguments)
    assert contents(out) == uninterrupted()


def test_interrupted_by_ctrl_c_says_that_the_same_command_continues(model, request_for, uninterrupted, tmp_path, monkeypatch):
    arguments = request_for(model, tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(Progress, "layer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        result = run_lrc(*arguments)
    assert result.code == 130
    assert "the same command continues" in result.err
    lrc_ok(*arguments)
    assert contents(tmp_path / "out") == uninterrupted()


def test_an_interrupted_run_is_no_model(half_done):
    out, _ = half_done
    for command in (["verify", out], ["eval", out, "--tasks", "wikitext2"], ["plan", out, "--ratio", 0.3]):
        result = run_lrc(*command)
        assert result.code != 0
        assert f"{out} holds an interrupted run" in result.err


# ---- another request, another process, another's files


def test_a_changed_request_is_refused_with_every_difference(half_done, request_for, model, tmp_path, uninterrupted):
    out, _ = half_done
    (out / ".lrc.lock").unlink()
    before = untouched(out)
    other_text = tmp_path / "other.txt"
    other_text.write_text(tiny_text(20_000, seed=1))
    result = run_lrc(
        *request_for(model, out, "--seed", 7, "--set", "keep=['*.v_proj']", "--dtype", "bfloat16", text=other_text)
    )
    assert result.code == 2
    for difference in (
        "recipe.calibration.seed: it has 0, you asked for 7",
        'recipe.keep: it has [], you asked for ["*.v_proj"]',
        'dtype: it has "float32", you asked for "bfloat16"',
        "recipe.calibration.tokens: it has",
        "other.txt",
        "--restart",
    ):
        assert difference in result.err
    assert "recipe.ratio" not in result.err  # it is as it was
    assert untouched(out) == before
    lrc_ok(*request_for(model, out, "--restart"))
    assert contents(out) == uninterrupted()


def test_a_changed_model_is_refused(half_done, request_for, damaged, tiny_checkpoints):
    out, _ = half_done
    other = tiny_checkpoints("llama", num_hidden_layers=2, seed=5)
    result = run_lrc(*request_for(other, out))
    assert result.code == 2
    assert "model.fingerprint: it has" in result.err
    config = json.loads((damaged / "config.json").read_text())
    config["rms_norm_eps"] = 0.5
    (damaged / "config.json").write_text(json.dumps(config))
    result = run_lrc(*request_for(damaged, out))
    assert result.code == 2
    assert "model.config: it has" in result.err
    assert "fingerprint" not in result.err


def test_the_same_model_elsewhere_continues(half_done, request_for, damaged):
    out, _ = half_done
    assert "finished earlier, replayed" in lrc_ok(*request_for(damaged, out))


def test_a_finished_result_is_left_alone(model, request_for, uninterrupted, tmp_path):
    out = tmp_path / "out"
    lrc_ok(*request_for(model, out))
    before = untouched(out), out.stat().st_mtime_ns
    assert "nothing to do" in lrc_ok(*request_for(model, out))
    assert (untouched(out), out.stat().st_mtime_ns) == before
    result = run_lrc(*request_for(model, out, "--ratio", 0.5))
    assert result.code == 2
    assert "recipe.ratio: it has 0.3, you asked for 0.5" in result.err
    assert (untouched(out), out.stat().st_mtime_ns) == before
    shard = out / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    result = run_lrc(*request_for(model, out))
    assert result.code == 1
    assert str(shard) in result.err and "--restart" in result.err
    (out / "notes.txt").write_text("mine")
    lrc_ok(*request_for(model, out, "--restart"))
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    assert contents(out) == uninterrupted()


def test_two_at_once_on_one_folder(model, request_for, tmp_path):
    out = tmp_path / "out"
    with Artifact(out, {"recipe": "another run"}):
        result = run_lrc(*request_for(model, out, "--restart"))
        assert result.code == 2
        assert f"Another lrc is writing to {out}" in result.err
        assert (out / JOURNAL).exists()


@pytest.mark.parametrize("more", [[], ["--restart"]])
def test_files_of_others_are_neither_mixed_nor_deleted(more, model, request_for, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    result = run_lrc(*request_for(model, out, *more))
    assert result.code == 2
    assert "thesis.tex" in result.err
    assert contents(out).keys() == {"thesis.tex"}


@pytest.mark.parametrize("more", [[], ["--restart"]])
def test_the_model_is_never_overwritten_by_its_result(more, damaged, request_for):
    for path in damaged.iterdir():  # what is left could pass for lrc's own files by name
        if path.name not in ("config.json", INDEX) and path.suffix != ".safetensors":
            path.unlink()
    before = contents(damaged)
    result = run_lrc(*request_for(damaged, damaged, *more))
    assert result.code == 2
    assert "holds other files" in result.err
    assert contents(damaged) == before


# ---- disks


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[str], Path]]:
    """A function that mounts, or mounts anew, a memory disk with options such as 'size=300k'."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def mount(options: str) -> Path:
        nonlocal mounted
        wanted = f"remount,{options}" if mounted else options
        try:
            done = subprocess.run(["mount", "-t", "tmpfs", "-o", wanted, "tmpfs", folder], capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("there is no mount command to make a small disk with")
        if done.returncode:
            pytest.skip(f"no permission to mount a small disk: {done.stderr.strip()}")
        mounted = True
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", folder], check=True)


def test_too_small_a_disk_is_refused_before_any_work(small_disk, model, request_for):
    out = small_disk("size=64k") / "out"
    result = run_lrc(*request_for(model, out))
    assert result.code == 1
    assert "free; the result needs 0.2 MB" in result.err
    assert "layer" not in result.out
    assert not (out / "config.json").exists()


def test_a_disk_that_fills_up_under_way(small_disk, model, request_for, uninterrupted, monkeypatch):
    disk = small_disk("size=600k")
    out, ballast = disk / "out", disk / "ballast"
    printed = Progress.layer

    def fill(self, report) -> None:
        printed(self, report)
        with ballast.open("wb", buffering=0) as file:
            try:
                while file.write(b"\0" * 1000):
                    pass
            except OSError:
                return

    with monkeypatch.context() as patched:
        patched.setattr(Progress, "layer", fill)
        result = run_lrc(*request_for(model, out))
    assert result.code == 1
    assert f"Cannot write {out / 'model-00002-of-00003.safetensors'}" in result.err
    assert "Free some space and run the same command again" in result.err
    assert set(contents(out)) == {JOURNAL, "model-00001-of-00003.safetensors"}
    ballast.unlink()
    assert "finished earlier, replayed" in lrc_ok(*request_for(model, out))
    assert contents(out) == uninterrupted()


def test_a_disk_that_fills_up_at_the_very_end(small_disk, model, request_for, uninterrupted):
    shards = sum(path.stat().st_size for path in model.glob("*.safetensors")) * 0.78
    out = small_disk(f"size={int(shards) // 4096 * 4 + 8}k") / "out"
    result = run_lrc(*request_for(model, out))
    assert result.code == 1
    assert "Free some space" in result.err
    assert not (out / "config.json").exists()
    small_disk("size=2m")
    lrc_ok(*request_for(model, out))
    assert contents(out) == uninterrupted()


@pytest.mark.parametrize(
    "refusal",
    [
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_no_space_however_it_is_reported(refusal, model, request_for, uninterrupted, tmp_path, monkeypatch):
    real, calls = save_file, []

    def full(*args: object, **kwargs: object) -> None:
        calls.append(1)
        real(*args, **kwargs)
        if len(calls) == 2:
            raise refusal

    with monkeypatch.context() as patched:
        patched.setattr(lrc.artifact, "save_file", full)
        result = run_lrc(*request_for(model, tmp_path / "out"))
    assert result.code == 1
    assert "model-00002-of-00003.safetensors" in result.err and "Free some space" in result.err
    assert set(contents(tmp_path / "out")) == {JOURNAL, "model-00001-of-00003.safetensors"}
    lrc_ok(*request_for(model, tmp_path / "out"))
    assert contents(tmp_path / "out") == uninterrupted()


def test_a_read_only_disk(small_disk, model, request_for):
    out = small_disk("size=600k") / "out"
    small_disk("ro")
    result = run_lrc(*request_for(model, out))
    assert result.code == 1
    assert f"Cannot write {out}" in result.err and "may write to" in result.err
    assert "layer" not in result.out


def test_a_folder_without_permission(model, request_for, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere; test_a_read_only_disk covers it there")
    (tmp_path / "locked").mkdir(mode=0o555)
    result = run_lrc(*request_for(model, tmp_path / "locked" / "out"))
    assert result.code == 1
    assert "may write to" in result.err


@pytest.mark.parametrize("place", ["file", "file/out", "file/deep/out"])
def test_a_file_in_the_way_of_the_folder(place, model, request_for, tmp_path):
    (tmp_path / "file").write_text("a file")
    result = run_lrc(*request_for(model, tmp_path / place))
    assert result.code == 1
    assert f"Cannot write {tmp_path / place}" in result.err and "Give a folder" in result.err
    assert (tmp_path / "file").read_text() == "a file"


# ---- damaged checkpoints

TENSOR = "model.layers.1.mlp.up_proj.weight"


def shard_of(folder: Path, tensor: str = TENSOR) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def edit_index(folder: Path, edit: Callable[[dict], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def edit_tensor(folder: Path, edit: Callable[[torch.Tensor], torch.Tensor], name: str = TENSOR) -> None:
    path = shard_of(folder, name)
    tensors = load_file(path)
    save_file(tensors | {name: edit(tensors[name]).contiguous()}, path, metadata={"format": "pt"})


def truncate(folder: Path) -> str:
    os.truncate(shard_of(folder), shard_of(folder).stat().st_size - 100)
    return shard_of(folder).name


def empty(folder: Path) -> str:
    os.truncate(shard_of(folder), 0)
    return shard_of(folder).name


def corrupt_header(folder: Path) -> str:
    with shard_of(folder).open("r+b") as file:
        file.seek(8)
        file.write(b"\xfe" * 64)
    return shard_of(folder).name


def garbage(folder: Path) -> str:
    with shard_of(folder).open("r+b") as file:
        header = int.from_bytes(file.read(8), "little")
        start, _ = json.loads(file.read(header))[TENSOR]["data_offsets"]
        file.seek(8 + header + start + 512)
        file.write(b"\xff" * 64)
    return f"16 of 3840 values of '{TENSOR}' are NaN or infinite"


def missing_shard(folder: Path) -> str:
    name = shard_of(folder).name
    shard_of(folder).unlink()
    return name


def missing_tensor(folder: Path) -> str:
    edit_index(folder, lambda where: where.pop(TENSOR))
    return TENSOR


def promised_tensor(folder: Path) -> str:
    edit_index(folder, lambda where: where.update({"model.layers.9.norm.weight": shard_of(folder).name}))
    return "model.layers.9.norm.weight"


def wrong_shape(folder: Path) -> str:
    edit_tensor(folder, lambda weight: weight[:-1])
    return f"'{TENSOR}' has shape (79, 48), the model of config.json wants (80, 48)"


def transposed(folder: Path) -> str:
    edit_tensor(folder, lambda weight: weight.T)
    return f"'{TENSOR}' has shape (48, 80)"


def a_nan(folder: Path) -> str:
    edit_tensor(folder, lambda weight: weight.index_fill(0, torch.tensor(3), float("nan")))
    return f"48 of 3840 values of '{TENSOR}'"


def an_infinity_outside_the_layers(folder: Path) -> str:
    edit_tensor(folder, lambda weight: weight.fill_(float("inf")), "model.norm.weight")
    return "'model.norm.weight'"


def index_is_no_json(folder: Path) -> str:
    (folder / INDEX).write_text("<html>404</html>")
    return INDEX


def index_points_outside(folder: Path) -> str:
    edit_index(folder, lambda where: where.update({TENSOR: "../../etc/passwd"}))
    return "../../etc/passwd"


DAMAGES = [
    truncate, empty, corrupt_header, garbage, missing_shard, missing_tensor, promised_tensor, wrong_shape, transposed, a_nan,
    an_infinity_outside_the_layers, index_is_no_json, index_points_outside,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint(damage, damaged, request_for, tmp_path):
    named = damage(damaged)
    result = run_lrc(*request_for(damaged, tmp_path / "out"))
    assert result.code == 1, result.err
    assert named in result.err
    assert result.err.count("\n") == 2, "what happened, and the remedy"
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    "damage", [truncate, corrupt_header, missing_tensor, wrong_shape, transposed], ids=lambda d: d.__name__
)
def test_what_headers_tell_is_said_before_any_work(damage, damaged, request_for, tmp_path):
    named = damage(damaged)
    result = run_lrc("plan", damaged, "--ratio", 0.3)
    assert result.code == 1
    assert named in result.err


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_file_beside_the_weights_that_cannot_be_read(file, damaged, request_for, tmp_path):
    (damaged / file).write_text('{"half": ')
    result = run_lrc(*request_for(damaged, tmp_path / "out"))
    assert result.code == 2
    assert str(damaged) in result.err
    assert not (tmp_path / "out").exists()


def test_activations_that_overflow_float16(damaged, request_for, tmp_path):
    edit_tensor(damaged, lambda weight: weight * 1e5, "model.layers.1.mlp.down_proj.weight")
    edit_tensor(damaged, lambda weight: weight * 1e3, TENSOR)
    result = run_lrc(*request_for(damaged, tmp_path / "out", "--dtype", "float16"))
    assert result.code == 1
    assert "model.layers.1" in result.err and "--dtype bfloat16" in result.err
    assert not (tmp_path / "out" / "config.json").exists()
    lrc_ok(*request_for(damaged, tmp_path / "bfloat16", "--dtype", "bfloat16"))


def test_a_result_that_does_not_pass_its_check_never_looks_finished(model, request_for, tmp_path, monkeypatch):
    out = tmp_path / "out"
    seen = []

    def failing(folder: Path, **options: object) -> None:
        seen.append(sorted(contents(folder)))
        raise CheckpointError("The check failed.", "A remedy.")

    with monkeypatch.context() as patched:
        patched.setattr(lrc.run, "verify", failing)
        result = run_lrc(*request_for(model, out))
    assert result.code == 1
    assert "The check failed." in result.err
    assert "config.json" not in seen[0] and not (out / "config.json").exists()
    lrc_ok(*request_for(model, out))


# ---- hostile checkpoints


class Sting:
    """Unpickling it makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_not_opened(name, damaged, request_for, tmp_path):
    for path in [*damaged.glob("*.safetensors"), damaged / INDEX]:
        path.unlink()
    (damaged / name).write_bytes(pickle.dumps(Sting(tmp_path / "stung")))
    for command in (request_for(damaged, tmp_path / "out"), ["eval", damaged, "--tasks", f"text:{damaged / 'config.json'}"]):
        result = run_lrc(*command)
        assert result.code == 2
        assert not (tmp_path / "stung").exists()
        assert not (tmp_path / "out").exists()
    assert name in run_lrc(*request_for(damaged, tmp_path / "out")).err


@pytest.mark.parametrize("model_type", ["llama", "of_its_own"])
def test_code_in_the_checkpoint_is_not_run(model_type, damaged, request_for, tmp_path):
    stung = tmp_path / "stung"
    for part in ("configuration", "modeling", "tokenization"):
        (damaged / f"{part}_evil.py").write_text(f"from pathlib import Path\nPath({str(stung)!r}).touch()\n")
    config = json.loads((damaged / "config.json").read_text()) | {"model_type": model_type}
    config["auto_map"] = {"AutoConfig": "configuration_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    (damaged / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((damaged / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["tokenization_evil.Slow", "tokenization_evil.Fast"]}
    (damaged / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    result = run_lrc(*request_for(damaged, tmp_path / "out"))
    assert not stung.exists()
    if model_type == "of_its_own":
        assert result.code == 2
        assert "--trust-remote-code" in result.err
