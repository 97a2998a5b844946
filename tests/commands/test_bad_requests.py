"""A slip at sweep, verify, export, bench and the others: one message with the remedy, and nothing is changed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from commandline import contents, run_lrc
from tiny import tiny_text

from lrc.checkpoint.location import Location


@pytest.fixture(scope="module")
def prepared(tiny_checkpoints, tmp_path_factory) -> Path:
    """A folder with a model, a result, a text, and things that are none of these."""
    here = tmp_path_factory.mktemp("prepared")
    (here / "model").symlink_to(tiny_checkpoints("llama", num_hidden_layers=2))
    (here / "text.txt").write_text(tiny_text(3000))
    (here / "binary.txt").write_bytes(bytes(range(256)) * 400)
    (here / "file").write_text("method: svd")
    (here / "empty").mkdir()
    (here / "thesis").mkdir()
    (here / "thesis" / "chapter.tex").write_text("years of work")
    assert run_lrc("compress", here / "model", "--recipe", "svd", "--ratio", 0.3, "--out", here / "result").code == 0
    return here


@pytest.fixture
def here(prepared, tmp_path, monkeypatch) -> Path:
    shutil.copytree(prepared, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


SWEEP = ["sweep", "model", "--recipes", "svd", "--tasks", "text:text.txt", "--out", "new"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        # sweep: several at once, before a model is read
        (["sweep", "model", "--recipes", "svd-lm,rtn", "--tasks", "text:none.txt", "--out", "new"], ["'svd-llm'", "none.txt"]),
        ([*SWEEP, "--ratios", "2"], ["must lie in [0, 1)"]),
        ([*SWEEP, "--ratios", ""], ["--ratios is empty", "--ratios 0.2"]),
        ([*SWEEP, "--eval-length", "1"], ["--eval-length 1"]),
        ([*SWEEP, "--eval-length", "4096"], ["--eval-length 4096 is more than the 256 positions"]),
        ([*SWEEP, "--dtype", "int3", "--device", "gpu"], ["'int3'", "'gpu'"]),
        (["sweep", "model", "--recipes", "svd-llm", "--calibration", "text:binary.txt", *SWEEP[4:]], ["is no text"]),
        (["sweep", "model", "--recipes", "svd", "--tasks", "text:text.txt", "--out", "thesis"], ["chapter.tex"]),
        (["sweep", "./gone", *SWEEP[2:]], ["There is no folder ./gone"]),
        # what is no result
        (["verify", "gone"], ["gone does not exist", "finished `lrc compress`"]),
        (["verify", "empty"], ["holds no lrc.json"]),
        (["verify", "file"], ["file is a file"]),
        (["verify", "model"], ["holds no lrc.json"]),
        (["export", "gone"], ["gone does not exist"]),
        (["export", "model", "--to", "dens", "--dtype", "int7"], ["holds no lrc.json", "'dense'", "'int7'"]),
        (["export", "result", "--to", "dense", "--out", "thesis"], ["thesis exists"]),
        (["export", "result", "--to", "dense", "--max-shard-size", "5 GX"], ["unknown unit 'GX'"]),
        (["sweep", "model", "--recipes", "empty", *SWEEP[4:]], ["it is a folder, not a recipe", "Name a YAML file"]),
        (["sweep", "model", "--recipes", "svd", "--tasks", "text:binary.txt", "--out", "new"], ["is no text"]),
        ([*SWEEP[:-1], "file/new"], ["file is not a folder", "--out"]),
        # report
        (["report", "gone"], ["gone does not exist", "finished `lrc compress`"]),
        (["report", "model"], ["holds no lrc.json"]),
        (["report", "empty", "--eval", "none.json", "--json", "no/x.json"], ["lrc.json", "none.json", "no/x.json"]),
        (["report", "result", "--eval", "binary.txt"], ["no file of lrc eval --json", "lrc eval OUT --json"]),
        (["report", "result", "--out", "file"], ["file is not a folder", "--out"]),
        (["report", "result", "--out", "new", "--json", "thesis"], ["--json thesis is a folder"]),
        (["export", "result", "--to", "dense", "--out", "file/new"], ["file is not a folder", "--out"]),
        (["verify", "result", "--json", "thesis"], ["--json thesis is a folder"]),
        (["bench", "empty"], ["empty"]),
        # bench, generate, compare, doctor
        (["bench", "./gone", "--device", "gpu", "--dtype", "flota16"], ["./gone", "'gpu'", "'float16'"]),
        (["bench", "result", "--decode", "0", "--json", "no/x.json"], ["--decode '0'", "no/x.json"]),
        (["generate", "./gone", "--prompt", "x", "--dtype", "int7"], ["./gone", "'int7'"]),
        (["generate", "model", "--prompt", ""], ["The prompt has no token"]),
        (["compare", "model"], ["one model"]),
        (["compare", "model", "./gone", "--text", "none.txt"], ["./gone", "none.txt"]),
        (["doctor", "--json", "no/x.json"], ["no/x.json"]),
        # inspect
        (["inspect", "./gone", "--map", "enrgy-0.4", "--device", "gpu"], ["./gone", "'energy-0.4'", "'gpu'"]),
        (["inspect", "thesis"], ["thesis"]),
        (["inspect", "result"], ["result"]),
        (
            ["inspect", "model", "--map", "input", "--html", "no/x.html", "--json", "no/x.json"],
            ["--map input", "no/x.html", "no/x.json"],
        ),
        (["inspect", "model", "--calibration", "text:none.txt"], ["none.txt"]),
        (["inspect", "model", "--calibration", "pydoo"], ["--calibration pydoo", "'pydoc'"]),
        (["inspect", "model", "--calibration", "self"], ["Take pydoc"]),
        (["inspect", "model", "--calibration", "text:text.txt", "--length", "4096"], ["--length 4096 is more than the 256"]),
        # advise
        (["advise", "./gone", "--recipes", "svd-lm"], ["./gone", "'svd-llm'", "How small shall it be?"]),
        (["advise", "model", "--ratio", "40", "--device", "gpu"], ["Did you mean 0.4?", "'gpu'"]),
        (["advise", "model", "--ratio", "0.4", "--size", "4GB"], ["2 of --size, --ratio and --memory"]),
        (["advise", "model", "--size", "4 GX", "--calibration", "text:none.txt"], ["unknown unit 'GX'", "none.txt"]),
        (["advise", "model", "--memory", "6"], ["has no unit", "6GB"]),
        (["advise", "model", "--size", "4GB", "--length", "48"], ["None of 5 recipes reaches it", "is no compression"]),
        (["advise", "model", "--ratio", "0.4", "--json", "no/x.json", "--recipes", ","], ["no/x.json", "--recipes is empty"]),
        (["advise", "result", "--ratio", "0.4"], ["result"]),
        # recipes and statistics
        (["recipe", "check", "empty"], ["it is a folder"]),
        (["recipe", "new", "no/x.yaml"], ["The folder of no/x.yaml"]),
        (["recipe", "new", "file"], ["file exists"]),
        (["compress", "model", "--recipe", "result", "--out", "new"], ["result/lrc.json repeats"]),
        (
            ["compress", "model", "--ratio", 0.3, "--calibration", "text:text.txt", "--statistics", "thesis", "--out", "new"],
            ["chapter.tex", "--statistics"],
        ),
        (["compress", "model", "--ratio", 0.3, "--calibration", "text:binary.txt", "--out", "new"], ["is no text"]),
        (["compress", "model", "--recipe", "empty", "--ratio", 0.3, "--out", "new"], ["it is a folder, not a recipe"]),
        (["compress", "model", "--recipe", "svd", "--ratio", 0.3, "--out", "file/new"], ["file"]),
        (["eval", "model", "--tasks", "text:binary.txt"], ["is no text"]),
    ],
)
def test_a_slip_is_one_message_with_its_remedy_and_changes_nothing(words, said, here):
    before = contents(here)
    result = run_lrc(*words)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("lrc: ") and "Traceback" not in result.err
    for each in said:
        assert each in result.err, result.err
    assert contents(here) == before
    assert not (here / "new").exists()


def test_a_model_without_a_tokenizer_is_refused_before_it_is_read(here, monkeypatch):
    bare = here / "bare"
    shutil.copytree((here / "model").resolve(), bare, ignore=shutil.ignore_patterns("*token*"))
    monkeypatch.setattr(Location, "config", lambda *_: pytest.fail("a model was read"))
    result = run_lrc("compress", "bare", "--recipe", "svd-llm", "--ratio", 0.3, "--calibration", "text:text.txt")
    assert result.code == 2 and "bare holds no tokenizer" in result.err and "Copy the tokenizer's files" in result.err


@pytest.mark.parametrize(
    "words",
    [
        [*SWEEP[:1], "bare", *SWEEP[2:]],
        ["eval", "bare", "--tasks", "text:text.txt", "--length", 32],
        ["generate", "bare", "--prompt", "x"],
    ],
    ids=lambda words: words[0],
)
def test_what_reads_text_names_the_tokenizer_that_is_missing(words, here):
    shutil.copytree((here / "model").resolve(), here / "bare", ignore=shutil.ignore_patterns("*token*"))
    before = contents(here)
    result = run_lrc(*words)
    assert result.code == 2 and "holds no tokenizer" in result.err and "Copy the tokenizer's files" in result.err
    assert contents(here) == before


def test_what_reads_no_text_needs_no_tokenizer(here):
    """Of a result whose tokenizer was deleted, a report is made, and a check names the file."""
    for file in (here / "result").glob("token*"):
        file.unlink()
    assert run_lrc("report", "result", "--out", "page").code == 0
    refused = run_lrc("verify", "result")
    assert refused.code != 0 and "tokenizer" in refused.err


@pytest.fixture
def read_only(here, tmp_path):
    """A disk that nobody may write to, not even root; it holds a finished result."""
    disk = tmp_path / "disk"
    disk.mkdir()
    shutil.copytree(here / "result", disk / "result")
    for flags in (["--bind"], ["-o", "remount,ro,bind"]):
        try:
            done = subprocess.run(["mount", *flags, disk, disk], capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("there is no mount command to make a read-only disk with")
        if done.returncode:
            subprocess.run(["umount", disk], capture_output=True)
            pytest.skip(f"no permission to mount a read-only disk: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_read_only_disk_is_told_before_any_work(here, read_only):
    new, model = read_only / "new", "model"
    for words in (
        ["compress", model, "--recipe", "svd", "--ratio", 0.3, "--out", new],
        [*SWEEP[:-1], new],
        ["export", "result", "--to", "dense", "--out", new],
        ["report", "result", "--out", new],
        ["report", read_only / "result"],  # the page would go beside the result
        ["export", read_only / "result", "--to", "dense"],
        ["verify", "result", "--json", read_only / "x.json"],
        ["bench", "result", "--json", read_only / "x.json"],
        ["eval", model, "--tasks", "text:text.txt", "--length", 32, "--json", read_only / "x.json"],
    ):
        before = contents(here)
        result = run_lrc(*words)
        assert (result.code, result.out) == (2, ""), (words, result.err)
        assert "Cannot write" in result.err and str(read_only) in result.err, (words, result.err)
        assert contents(here) == before, words
    assert run_lrc("verify", read_only / "result").code == 0
    assert run_lrc("report", read_only / "result", "--out", "page").code == 0


def test_a_run_continued_from_another_working_directory_says_where_paths_start(here, monkeypatch):
    request = ["--recipe", "svd-llm", "--ratio", 0.3, "--samples", 4, "--length", 48, "--calibration", "text:text.txt"]
    assert run_lrc("compress", "model", *request, "--out", "out").code == 0
    before = contents(here)
    (here.parent / "elsewhere").mkdir()
    monkeypatch.chdir(here.parent / "elsewhere")
    result = run_lrc("compress", here / "model", *request, "--out", here / "out")
    assert result.code == 2 and f"Relative paths start at {here.parent / 'elsewhere'}" in result.err
    assert contents(here) == before and list(Path().iterdir()) == []
