"""`lrc sweep`: rows that are what a person would type, one table, and a command that goes on."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commandline import lrc_ok, run_lrc
from safetensors.torch import load_file

from lrc.calibrate.gradients import GradientSettings, backward_passes
from lrc.checkpoint.atomic import read_json, write_json
from lrc.commands import row_process
from lrc.commands.sweep_rows import Job, Row, Sweep, run_sweep
from lrc.errors import CheckpointError, RequestError, SweepError
from lrc.plan.load_recipe import load_recipe


@pytest.fixture(params=[False, True], ids=["forked", "begun anew"])
def a_process_each(request, monkeypatch):
    """A row's process is forked, or begun anew as with an accelerator."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: request.param)


def test_a_table_of_recipes_and_ratios_and_the_same_command_goes_on(tiny_checkpoints, tiny_text_file, tmp_path):
    model, out, other = tiny_checkpoints("llama", max_position_embeddings=2048), tmp_path / "out", tmp_path / "other.txt"
    other.write_text(tiny_text_file.read_text()[::-1] * 4)
    command = (
        "sweep", model, "--out", out, "--recipes", "svd-llm", "--ratios", "0.2,0.5", "--tasks", f"text:{other}",
        "--parallel", 2, "--max-windows", 1,
        "--calibration", f"text:{tiny_text_file}*0.5+pydoc*0.5", "--samples", 4, "--length", 32,
    )  # fmt: skip
    said = lrc_ok(*command)
    rows = {row["name"]: row for row in json.loads((out / "sweep.json").read_text())["rows"]}
    assert set(rows) == {"original", "svd-llm-0.2", "svd-llm-0.5"}
    assert rows["svd-llm-0.5"]["nbytes"] < rows["svd-llm-0.2"]["nbytes"]
    assert 0.2 <= rows["svd-llm-0.2"]["removed"] < 0.5 <= rows["svd-llm-0.5"]["removed"]
    assert all(row["metrics"] for row in rows.values()) and rows["svd-llm-0.2"]["peak_bytes"] > 10**8
    assert all(name in said and name in (out / "sweep.md").read_text() for name in rows)
    assert not list(out.glob("svd*/*")), "checkpoints go unless --keep"
    page = (out / "sweep.html").read_text()
    assert str(out / "sweep.html") in said and all(name in page for name in rows)
    assert all(speed > 0 for row in rows.values() for speed in row["speeds"].values()) and "Speed and" in page
    assert ("note: no pictures" in said) != bool(list(out.glob("sweep-*.png")))
    # the same command with a row missing makes that row alone, and it comes out the same
    held = read_json(out / "sweep.json", dict[str, Any])
    held["rows"] = [row for row in held["rows"] if row["name"] != "svd-llm-0.5"]
    write_json(out / "sweep.json", held)
    made = [line for line in lrc_ok(*command).splitlines() if line.endswith(" s")]
    assert [line.split(":")[0] for line in made] == ["svd-llm-0.5"]
    again = {row["name"]: row for row in json.loads((out / "sweep.json").read_text())["rows"]}
    assert again["svd-llm-0.5"]["metrics"] == rows["svd-llm-0.5"]["metrics"]
    refused = run_lrc(*command, "--seed", 7)
    assert refused.code == 2 and "another sweep" in refused.err


def test_a_sweep_reads_rounded_activations_where_it_is_asked_to(tiny_checkpoints, tiny_text_file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(tiny_text_file.read_text()[::-1] * 4)
    command = (
        "sweep", tiny_checkpoints("llama"), "--out", tmp_path / "out", "--recipes", "rtn", "--tasks", f"text:{other}",
        "--max-windows", 1, "--eval-length", 32, "--calibration", f"text:{tiny_text_file}", "--samples", 2, "--length", 32,
    )  # fmt: skip
    refused = run_lrc(*command, "--activations", "mxint9")
    assert refused.code == 2 and "Did you mean 'mxint8'?" in refused.err
    lrc_ok(*command, "--activations", "mxint8")
    for name in ("original", "rtn"):
        (entry,) = json.loads((tmp_path / "out" / f"{name}.json").read_text())["results"].values()
        assert entry["protocol"]["activations"].startswith("mxint8")


def test_a_row_that_fails_is_named_with_its_last_words_and_the_others_stay(a_process_each, tmp_path):
    """The model is no model: both rows fail in processes of their own."""
    with pytest.raises(SweepError) as failed:
        run_sweep(Sweep("nobody/nothing", tmp_path, evaluate=["--tasks", "c4"]), [Job(None), Job("svd", 0.2)])
    assert "original" in str(failed.value) and "- svd-0.2: " in str(failed.value)
    assert "nobody/nothing" in str(failed.value) and "Traceback" not in str(failed.value)


def test_a_rows_memory_is_its_own(a_process_each, tmp_path):
    """Linux hands on to a child, as its peak, what its parent held when it was started."""
    ballast = bytearray(700 << 20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    seconds, peak = row_process.run(["hold", str(200 << 20)], tmp_path / "log", module="processes")
    assert seconds > 1 and 200 << 20 < peak < 900 << 20  # with the libraries


def test_a_process_that_is_killed_fails_its_row(a_process_each, tmp_path):
    with pytest.raises(SweepError, match="ended by signal 9"):
        row_process.run(["die"], tmp_path / "log", module="processes")


@pytest.mark.parametrize("name", row_process.IMPORTS)
def test_what_rows_import_is_there(name):
    assert importlib.import_module(name).__name__ == name


def test_recipes_that_want_other_gradients_share_a_folder_and_no_pass_is_made_twice(tiny_checkpoints, tiny_text_file, tmp_path):
    """zero-sum and fwsvd read what the text's own labels give, the true Fisher what drawn ones give: two passes for three."""
    model, out, other = tiny_checkpoints("llama", max_position_embeddings=2048), tmp_path / "out", tmp_path / "other.txt"
    other.write_text(tiny_text_file.read_text()[::-1] * 4)
    drawn = tmp_path / "drawn.yaml"
    drawn.write_text(yaml.safe_dump(load_recipe("kfac", {"gradients.labels": "sampled"}).resolved()))
    recipes = ("svd-llm", "fwsvd", str(drawn), "zero-sum")
    common = ("--calibration", f"text:{tiny_text_file}", "--samples", 4, "--length", 32)
    common += ("--set", "calibration.held_out=0")
    lrc_ok("sweep", model, "--out", out, "--recipes", ",".join(recipes), "--ratios", "0.4", "--tasks", f"text:{other}",
           "--keep", "--parallel", 2, "--max-windows", 1, *common)  # fmt: skip
    held = [json.loads(path.read_text())["needs"] for path in sorted((out / "statistics").glob("gradients-*/statistics.json"))]
    # a row that had made a pass of its own would have left what it alone needs
    assert [set(map(tuple, needs.values())) for needs in held] == [{("fisher_in", "weight_grad")}, {("grad_gram",)}]
    for recipe in recipes:
        name = Path(recipe).stem
        alone = tmp_path / f"{name}-alone"
        lrc_ok("compress", model, "--recipe", recipe, "--ratio", 0.4, "--out", alone, *common)
        for path in alone.glob("*.safetensors"):
            mine, theirs = load_file(path), load_file(out / f"{name}-0.4" / path.name)
            assert mine.keys() == theirs.keys()
            assert all((mine[key] - theirs[key]).norm() <= 1e-3 * mine[key].norm() for key in mine), recipe


def test_the_shipped_recipes_need_one_backward_pass():
    recipes = [load_recipe(name) for name in ("fwsvd", "kfac", "lems", "zero-sum", "svd-llm")]
    needs = [
        frozenset({"fisher_in"}),
        frozenset({"grad_gram"}),
        frozenset({"grad_gram"}),
        frozenset({"weight_grad"}),
        frozenset(),
    ]
    passes = backward_passes(zip((recipe.gradients for recipe in recipes), needs, strict=True))
    assert [(settings.labels, sorted(each)) for settings, each in passes.items()] == [
        ("data", ["fisher_in", "grad_gram", "weight_grad"])
    ]


def test_settings_that_make_a_difference_are_passes_of_their_own():
    gram, weights = frozenset({"grad_gram"}), frozenset({"weight_grad"})
    one, other = GradientSettings(trim=0.125), GradientSettings(clip=None)
    assert len(backward_passes([(one, gram), (other, gram)])) == 2
    assert len(backward_passes([(one, weights), (other, weights), (one, gram)])) == 1
    seeds = [GradientSettings(seed=seed) for seed in (0, 1)]
    assert len(backward_passes([(each, weights) for each in seeds])) == 2
    assert len(backward_passes([(each.model_copy(update={"labels": "data"}), gram) for each in seeds])) == 1


def test_rows_that_end_at_one_moment_are_all_kept(tmp_path, monkeypatch):
    together, jobs = threading.Barrier(4), [Job(f"recipe-{number}", 0.2) for number in range(16)]

    def row(sweep: Sweep, job: Job) -> Row:
        together.wait(timeout=60)
        return Row(job.name, {"ppl": 1.0}, 1)

    monkeypatch.setattr("lrc.commands.sweep_rows._row", row)
    assert len(run_sweep(Sweep("model", tmp_path, parallel=4), jobs)) == 16
    assert {row["name"] for row in json.loads((tmp_path / "sweep.json").read_text())["rows"]} == {job.name for job in jobs}


def test_rows_of_one_recipe_do_not_run_beside_each_other(tmp_path, monkeypatch):
    """Both would measure the losses that the second finds where the first left them."""
    asked = []
    monkeypatch.setattr("lrc.commands.sweep_rows._row", lambda _, job: asked.append(job.name) or Row(job.name, {}, 0))
    jobs = [Job(None), Job("lrc-fast", 0.2), Job("lrc-fast", 0.4), Job("svd", 0.2), Job("svd", 0.4), Job("energy")]
    rows = run_sweep(Sweep("model", tmp_path), jobs)
    assert asked == ["original", "lrc-fast-0.2", "svd-0.2", "energy", "lrc-fast-0.4", "svd-0.4"]
    assert [row.name for row in rows] == [job.name for job in jobs]


def checkpoint(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "lrc.json", "model-00001-of-00001.safetensors"):
        (out / name).write_text("{}")


def test_a_sweep_that_is_killed_while_it_deletes_a_checkpoint_goes_on_without_it(tmp_path, monkeypatch):
    """A checkpoint that is half gone would be somebody's files to the next `lrc compress`."""
    jobs, made = [Job("svd", 0.2), Job("svd", 0.4)], []

    def row(sweep: Sweep, job: Job) -> Row:
        made.append(job.name)
        assert not (sweep.folder / job.name).exists()
        checkpoint(sweep.folder / job.name)
        return Row(job.name, {"ppl": 1.0}, 1)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lrc.commands.sweep_rows._row", row)
    with monkeypatch.context() as patched:
        patched.setattr("lrc.checkpoint.atomic.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(Sweep("model", tmp_path), jobs)
    assert [row.name for row in run_sweep(Sweep("model", tmp_path), jobs)] == ["svd-0.2", "svd-0.4"]
    assert made[0] == "svd-0.2" and made[-2:] == ["svd-0.2", "svd-0.4"]
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.json"]


def test_checkpoints_that_were_kept_stay_where_a_later_sweep_keeps_none(tmp_path, monkeypatch):
    def row(sweep: Sweep, job: Job) -> Row:
        checkpoint(sweep.folder / job.name)
        return Row(job.name, {}, 1)

    monkeypatch.setattr("lrc.commands.sweep_rows._row", row)
    run_sweep(Sweep("model", tmp_path, keep=True), [Job("svd", 0.2)])
    run_sweep(Sweep("model", tmp_path), [Job("svd", 0.2), Job("svd", 0.4)])
    assert {path.name for path in tmp_path.iterdir()} == {"sweep.json", "svd-0.2"}


def test_two_sweeps_at_once_in_one_folder(tmp_path, monkeypatch):
    def row(sweep: Sweep, job: Job) -> Row:
        with pytest.raises(RequestError, match="Another lrc is writing to"):
            run_sweep(sweep, [job])
        return Row(job.name, {}, 1)

    monkeypatch.setattr("lrc.commands.sweep_rows._row", row)
    assert len(run_sweep(Sweep("model", tmp_path), [Job("svd", 0.2)])) == 1


def test_rows_of_a_model_or_a_text_that_changed_are_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("lrc.commands.sweep_rows._row", lambda _, job: Row(job.name, {}, 1))
    run_sweep(Sweep("model", tmp_path, read={"model's fingerprint": "a", "text of text:x": "b"}), [Job("svd", 0.2)])
    with pytest.raises(RequestError, match="model's fingerprint: it has a, you asked for c"):
        run_sweep(Sweep("model", tmp_path, read={"model's fingerprint": "c", "text of text:x": "b"}), [Job("svd", 0.2)])


def test_a_flipped_bit_in_the_table_is_not_a_result(tmp_path, monkeypatch):
    monkeypatch.setattr("lrc.commands.sweep_rows._row", lambda _, job: Row(job.name, {"ppl": 12.5}, 1))
    run_sweep(Sweep("model", tmp_path), [Job("svd", 0.2)])
    table = tmp_path / "sweep.json"
    table.write_bytes(table.read_bytes().replace(b"12.5", b"13.5"))
    with pytest.raises(CheckpointError, match=r"sweep.json cannot be read: its content has changed"):
        run_sweep(Sweep("model", tmp_path), [Job("svd", 0.2)])


def test_a_rows_process_ends_with_the_sweep_that_began_it(tmp_path):
    """It would go on in a folder that the same command needs."""
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from lrc.commands import row_process\n"
        "row_process.IMPORTS = ()\n"
        "if __name__ == '__main__':\n"
        "    row_process.run(['sleep', sys.argv[1]], Path(sys.argv[2]), module='processes')\n"
    )
    program, mark = tmp_path / "program.py", tmp_path / "mark"
    program.write_text(script)
    tests = str(Path(__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])}
    sweep = subprocess.Popen([sys.executable, str(program), str(mark), str(tmp_path / "log")], env=environment)
    try:
        deadline = time.monotonic() + 120
        while not mark.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        row = int(mark.read_text())
    finally:
        sweep.kill()
        sweep.wait()
    while Path(f"/proc/{row}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{row}").exists()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["svd-0.2/lrc.journal.jsonl", "svd-0.2.json", "statistics/statistics.json"])
def test_a_killed_sweep_goes_on_to_the_same_table(moment, tiny_checkpoints, tiny_text_file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(tiny_text_file.read_text()[::-1] * 4)

    def command(out: str) -> list[str]:
        words = ["sweep", tiny_checkpoints("llama", max_position_embeddings=2048), "--out", tmp_path / out, "--recipes", "svd",
                 "--ratios", "0.2,0.5", "--tasks", f"text:{other}", "--max-windows", 1,
                 "--calibration", f"text:{tiny_text_file}", "--samples", 4, "--length", 32]  # fmt: skip
        return [*map(str, words)]

    lrc_ok(*command("whole"))
    process = subprocess.Popen(
        [sys.executable, "-m", "lrc.cli", *command("killed")], stdout=subprocess.DEVNULL, cwd=tmp_path, env=os.environ
    )
    while process.poll() is None and not (tmp_path / "killed" / moment).exists():
        time.sleep(0.002)
    process.kill()
    process.wait()
    time.sleep(1)  # the row's process ends by itself
    lrc_ok(*command("killed"))
    whole, killed = ({row["name"]: row["metrics"] for row in json.loads((tmp_path / name / "sweep.json").read_text())["rows"]}
                     for name in ("whole", "killed"))  # fmt: skip
    assert killed == whole
    listed = [{path.name for path in (tmp_path / name).iterdir()} for name in ("whole", "killed")]
    assert listed[0] == listed[1]
