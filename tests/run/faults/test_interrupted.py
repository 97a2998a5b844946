"""Runs that are killed, or whose files are damaged: the same bytes as undisturbed, or an error that names the file."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commandline import contents, lrc_ok, run_lrc
from faults import disk_full_before, killed_before

from lrc.checkpoint.folder import JOURNAL

REFINED = 'refine={"end-to-end": {"lr": 1e-3, "steps": 4, "every": 2, "batch_tokens": 96}}'
# Every kind of file that a run keeps: statistics, losses of options, gradients and spilled states, losses of ablations, a
# model's edit, perplexities of a search, the original's states and the state of a training.
RECIPES = {
    "svd-llm": ["--recipe", "svd-llm", "--ratio", 0.3],
    "sequential": ["--recipe", "svd-llm", "--ratio", 0.3, "--propagate", "compressed"],
    "lrc-fast": ["--recipe", "lrc-fast", "--ratio", 0.3],
    "zero-sum": ["--recipe", "zero-sum", "--ratio", 0.3],
    "sleb": ["--recipe", "sleb", "--set", "depth.drop=1"],
    "repaired": ["--recipe", "shortgpt+linear-patch", "--set", "depth.drop=1"],
    "refined": ["--recipe", "svd-llm", "--ratio", 0.3, "--set", "calibration.held_out=2", "--set", REFINED],
    "searched": ["--recipe", "svd-llm", "--max-ppl-increase", "1%", "--set", "calibration.held_out=2"],
}
DEEP = ("sleb", "repaired")
# Every change is tried, but of a search, which makes six hundred, one in seven: all of them take an hour.
STEPS = dict.fromkeys(RECIPES, 1) | {"searched": 7}
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def asked(tiny_checkpoints, tiny_text_file) -> Callable[[str, Path], list[object]]:
    def request(recipe: str, out: Path) -> list[object]:
        model = tiny_checkpoints("llama", num_hidden_layers=4 if recipe in DEEP else 2)
        sizes = ["--calibration", f"text:{tiny_text_file}", "--samples", 4, "--length", 32]
        return ["compress", model, "--out", out, *RECIPES[recipe], *sizes]

    return request


@pytest.fixture(scope="module")
def undisturbed(asked, tmp_path_factory) -> Callable[[str], dict[str, str]]:
    made: dict[str, dict[str, str]] = {}

    def run(recipe: str) -> dict[str, str]:
        if recipe not in made:
            out = tmp_path_factory.mktemp("undisturbed") / "out"
            lrc_ok(*asked(recipe, out))
            made[recipe] = contents(out)
        return made[recipe]

    return run


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def kills(recipe: str, out: Path, asked: Callable[..., list[object]], step: int) -> Iterator[int]:
    """Kill the run in a new folder before its changes number 1, 1 + step, ...; each time the folder is left as it is."""
    operation = 1
    while killed_before(operation, out, asked(recipe, out)):
        yield operation
        shutil.rmtree(out, ignore_errors=True)
        operation += step


@pytest.mark.parametrize(("recipe", "step"), [("lrc-fast", 31), *(pytest.param(*each, marks=slow) for each in STEPS.items())])
def test_killed_anywhere_the_folder_ends_as_it_would_have(recipe, step, asked, undisturbed, tmp_path):
    out = tmp_path / "out"
    expected, times = undisturbed(recipe), 0
    for operation in kills(recipe, out, asked, step):
        if (out / "config.json").exists():  # whatever looks finished is finished
            assert set(expected) <= set(contents(out))
        lrc_ok(*asked(recipe, out))
        assert contents(out) == expected, f"killed before change {operation}"
        assert names(out) == set(expected), f"killed before change {operation}"
        times += 1
    assert times * step > 60, "the matrix has lost its points"


def test_what_a_kill_at_the_very_end_leaves_is_cleared_by_verify_and_by_the_next_run(asked, undisturbed, tmp_path):
    out = tmp_path / "out"
    lrc_ok(*asked("svd-llm", out))
    left = [".lrc-statistics/trials/x.json", "config.json.unchecked", "lrc.json.7.lrc-partial/lrc.json"]
    for command in (["verify", out], asked("svd-llm", out)):
        for name in left:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text("left")
        (out / ".lrc.lock").touch()
        lrc_ok(*command)
        assert names(out) == set(undisturbed("svd-llm"))


def test_verify_deletes_nothing_of_a_model_that_is_not_lrcs(damaged):
    before = contents(damaged)
    assert len(list(damaged.glob("model-0*.safetensors"))) > 1
    assert run_lrc("verify", damaged).code != 0
    assert contents(damaged) == before


def flipped(path: Path, place: int) -> bytes:
    """Flip a bit in a file; what it held before."""
    held = path.read_bytes()
    data = bytearray(held)
    data[place] ^= 1 << (place % 8)
    path.write_bytes(data)
    return held


def places(size: int, count: int) -> list[int]:
    """Up to `count` bytes of a file, the first and the last among them."""
    return sorted({round(number * (size - 1) / max(1, count - 1)) for number in range(count)})


def interrupted(
    recipe: str, out: Path, asked: Callable[..., list[object]], marks: tuple[str, ...], step: int
) -> Iterator[Path]:
    """Folders of runs that were killed a few changes after a file with such a name was there."""
    seen = set[str]()
    for operation in kills(recipe, out, asked, step):
        for mark in marks:
            if mark not in seen and any(out.rglob(mark)):
                seen.add(mark)
                kept = out.with_name(f"{recipe}-{operation}")
                shutil.copytree(out, kept)
                yield kept
        if len(seen) == len(marks):
            return
    pytest.fail(f"a run of {recipe} never keeps {set(marks) - seen}")


@pytest.mark.parametrize(
    ("recipe", "marks", "count"),
    [
        ("svd-llm", ("lrc.part-00001*.safetensors",), 3),
        *(
            pytest.param(recipe, marks, 4, marks=slow)
            for recipe, marks in {
                "svd-llm": ("lrc.part-00002*.safetensors", "model.safetensors", "config.json"),
                "sequential": ("lrc.part-00002*.safetensors", "lrc.json"),
                "lrc-fast": ("statistics.json", "nats-*.json", "lrc.part-00002*.safetensors"),
                "zero-sum": (
                    "hidden-00001.safetensors",
                    "gradient.safetensors",
                    "*.curves-*.json",
                    "lrc.part-00001*.safetensors",
                ),
                "sleb": ("trials/*.json", "model_edit.json", "lrc.part-00001*.safetensors"),
                "repaired": ("model_edit.json", "lrc.part-00001*.safetensors"),
                "refined": ("teacher.safetensors", "state.safetensors", "lrc.json"),
                "searched": ("perplexities-*.json", "lrc.part-00002*.safetensors"),
            }.items()
        ),
    ],
)
def test_a_flipped_bit_in_any_file_of_an_interrupted_run(recipe, marks, count, asked, undisturbed, tmp_path):
    """Whatever files are there, so that a new kind of file is covered, too."""
    out, tried = tmp_path / "out", 0
    for kept in interrupted(recipe, out, asked, marks, 5 if count < 4 else 2):
        for path in sorted(kept.rglob("*")):
            if not path.is_file() or path.stat().st_size == 0:
                continue
            for place in places(path.stat().st_size, count):
                shutil.rmtree(out, ignore_errors=True)
                shutil.copytree(kept, out)
                damaged = out / path.relative_to(kept)
                flipped(damaged, place)
                result = run_lrc(*asked(recipe, out))
                where = f"{path.relative_to(kept)}, byte {place}"
                if result.code:
                    assert damaged.name in result.err, f"{where}: {result.err}"
                else:
                    assert contents(out) == undisturbed(recipe), where
                tried += 1
        shutil.rmtree(out, ignore_errors=True)
    assert tried >= 2 * count


@pytest.mark.parametrize(("recipe", "step"), [("lrc-fast", 37), *(pytest.param(*each, marks=slow) for each in STEPS.items())])
def test_a_disk_that_is_full_at_any_change(recipe, step, asked, undisturbed, tmp_path):
    """One message that says what to do, and with space the same command goes on to the same result."""
    out, operation, met = tmp_path / "out", 1, 0
    while True:
        code, said, full = disk_full_before(operation, out, asked(recipe, out))
        if not full:
            break
        assert code in (0, 1) and "Traceback" not in said, said
        met += code
        lrc_ok(*asked(recipe, out))
        assert contents(out) == undisturbed(recipe), f"full before change {operation}"
        assert names(out) == set(undisturbed(recipe)), f"full before change {operation}"
        shutil.rmtree(out)
        operation += step
    assert met > 1


def test_a_damaged_journal_names_its_line_and_the_shard_is_made_anew(asked, undisturbed, tmp_path):
    out = tmp_path / "out"
    (kept,) = interrupted("svd-llm", out, asked, ("lrc.part-00003*.safetensors",), 6)
    journal = kept / JOURNAL
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([lines[0], lines[1].replace(b'"nbytes": ', b'"nbytes": 1'), *lines[2:]]))
    command = asked("svd-llm", kept)
    printed = lrc_ok(*command)
    assert f"note: {journal}: line 2 is damaged" in printed
    assert contents(kept) == undisturbed("svd-llm")
    (kept / "config.json").unlink()
    journal.write_bytes(lines[0].replace(b"svd", b"SVD", 1))
    refused = run_lrc(*command)
    assert refused.code == 1 and f"{journal} is damaged: line 1" in refused.err and "--restart" in refused.err
    lrc_ok(*command, "--restart")
    assert contents(kept) == undisturbed("svd-llm")
