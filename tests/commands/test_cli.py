"""What a person meets at the command line: help, typos, plans, plain output, exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import typer
import yaml
from commandline import contents, lrc_ok, run_lrc
from safetensors import safe_open

import lrc
from lrc.checkpoint.location import locate
from lrc.cli import app
from lrc.commands.common.terminal import size
from lrc.model.view import ModelView
from lrc.plan.load_recipe import load_recipe
from lrc.plan.planner import make_draft


@pytest.fixture(scope="module")
def model(tiny_checkpoints) -> Path:
    return tiny_checkpoints("llama")


@pytest.fixture(scope="module")
def finished(model, tiny_text_file, tmp_path_factory) -> tuple[Path, str]:
    """A finished result, and what the command that made it printed."""
    out = tmp_path_factory.mktemp("finished") / "out"
    sizes = ["--samples", 8, "--length", 48]
    return out, lrc_ok(
        "compress", model, "--recipe", "svd-llm", "--out", out, "--ratio", 0.3,
        "--calibration", f"text:{tiny_text_file}", *sizes,
    )  # fmt: skip


# ---- help


def commands(group: object = None, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], object]:
    """Every command and group of the application by its words."""
    group = group or typer.main.get_command(app)
    found = {path: group}
    for name, command in getattr(group, "commands", {}).items():
        found |= commands(command, (*path, name))
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_help_of_every_command_explains_every_option(words):
    printed = lrc_ok(*words, "--help")
    command = commands()[words]
    for parameter in command.params:
        assert parameter.help, f"{parameter.name} of {' '.join(words)} is not explained"
        assert all(option in printed for option in parameter.opts if option.startswith("--"))
    for name, inner in getattr(command, "commands", {}).items():
        assert name in printed and inner.help


def test_the_commands_are_these():
    assert {" ".join(words) for words in commands()} >= {
        "compress", "plan", "eval", "verify", "recipe list", "recipe show", "recipe check", "recipe methods",
    }  # fmt: skip


@pytest.mark.parametrize(("share", "count"), [("self", 8), ("*0.75+self*0.25", 2), ("", 0)])
def test_a_plan_says_what_the_model_has_to_write_itself(share, count, model, tiny_text_file):
    source = share if share == "self" else f"text:{tiny_text_file}{share}"
    printed = lrc_ok("plan", model, "--ratio", 0.3, "--calibration", source, "--samples", 8, "--length", 48)
    assert (f"the model, loaded whole, writes {count} of 8 samples" in printed) == (count > 0)
    recipe = load_recipe("svd-llm", {"ratio": 0.3, "calibration.source": source, "calibration.samples": 8})
    plan = make_draft(ModelView(locate(str(model)), None), recipe)
    assert (plan.memory.moments.get("writing text", 0) > plan.whole_bytes) == (count > 0)


def test_help_imports_nothing_that_is_slow(tmp_path):
    """How long it takes is measured by hand (the machine that tests run on may be busy); why it is quick is asserted."""
    program = (
        "import sys\nsys.argv = ['lrc', '--help']\nfrom lrc.cli import main\n"
        "try:\n    main()\nfinally:\n"
        "    print([name for name in ('torch', 'transformers', 'datasets', 'numpy') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "compress" in done.stdout
    assert done.stdout.rstrip().endswith("[]")


def test_version():
    assert lrc_ok("--version") == f"lrc {lrc.__version__}\n"


# ---- recipes


def test_recipe_list_and_methods_say_what_each_is_for():
    listed = {line.split()[0] for line in lrc_ok("recipe", "list").splitlines() if line.startswith("  ")}
    assert {"svd", "asvd", "svd-llm", "svd-llm-sequential"} <= listed
    known = lrc_ok("recipe", "methods").splitlines()
    assert {"svd", "asvd", "svd-llm"} <= {line.split()[0] for line in known}
    assert all(line.endswith("]") and len(line.split()) > 6 for line in known), "each names its source"


def test_a_shown_recipe_is_the_start_of_ones_own(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(lrc_ok("recipe", "show", "asvd"))
    assert "# ASVD" in own.read_text()
    own.write_text(own.read_text() + "ratio: 0.25\n")
    spelled_out = yaml.safe_load(lrc_ok("recipe", "check", own, "--set", "calibration.samples=3"))
    assert (spelled_out["ratio"], spelled_out["calibration"]["samples"], spelled_out["propagate"]) == (0.25, 3, "original")


def test_a_wrong_recipe_is_told_with_everything_that_is_wrong(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("methd: svd\nratio: 40\n")
    result = run_lrc("recipe", "check", own)
    assert (result.code, result.out) == (2, "")
    assert f"{own}: 2 problems" in result.err
    assert "unknown key 'methd'. Did you mean 'method'?" in result.err
    assert "Did you mean 0.4?" in result.err
    assert run_lrc("recipe", "show", "svd-lm").err.endswith("Did you mean 'svd-llm'?\n")


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compres"], "Did you mean 'compress'"),
        (["compress", "MODEL", "--bogus"], "No such option: --bogus"),
        (["compress"], "Missing argument"),
        (["compress", "MODEL", "--out", "x", "--ratio", "much"], "Invalid value for '--ratio'"),
        (["compress", "MODEL", "--out", "x", "--samples", "1.5"], "Invalid value for '--samples'"),
        (["sweep", "MODEL"], "Missing option"),
        (["recipe", "chek", "svd"], "Did you mean 'check'"),
    ],
)
def test_usage_errors(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run_lrc(*arguments)
    assert result.code == 2
    assert said in result.err
    assert list(tmp_path.iterdir()) == []


def test_all_mistakes_of_a_request_at_once(model, tmp_path):
    (tmp_path / "file").write_text("")
    result = run_lrc(
        "compress", model, "--recipe", "asvd", "--set", "settings.alfa=1", "--set", "samples=3", "--ratio", 40,
        "--calibration", "wikitxt2", "--propagate", "compresed", "--dtype", "flaot16", "--device", "gpu",
        "--out", tmp_path / "file",
    )  # fmt: skip
    assert (result.code, result.out) == (2, "")
    for said in (
        "Did you mean 'alpha'?",
        "Did you mean 'calibration.samples'?",
        "Did you mean 0.4?",
        "'wikitxt2'",
        "'compressed' (got 'compresed')",
        "Did you mean 'float16'?",
        "'gpu' is no device",
        f"Cannot write {tmp_path / 'file'}",
    ):
        assert said in result.err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "Add --ratio"),
        (["--ratio", 0.999], "have no form that is small enough"),
        (
            ["--ratio", 0.3, "--set", "keep=['*.v_prj', 'self_attn.q_proj']"],
            "'*.v_prj' matches no target. Did you mean '*.v_proj'?",
        ),
        (["--ratio", 0.3, "--device", "mps"], "'mps' is no device for lrc"),
        (["--ratio", 0.3, "--device", "cuda:99"], "There is no device cuda:99"),
        (["--ratio", 0.3, "--device", "cpu,cpu"], "Name GPUs, each once"),
        (["--ratio", 0.3, "--device", ""], "is no device"),
        (["--ratio", 0.3, "--recipe", "svd-lm"], "Did you mean 'svd-llm'?"),
        (["--ratio", 0.3, "--dtype", "int8"], "'int8' is no dtype"),
    ],
)
def test_a_request_that_cannot_be_met(more, said, model, tmp_path):
    result = run_lrc("compress", model, "--out", tmp_path / "out", "--calibration", "pydoc", *more)
    assert result.code == 2
    assert said in result.err
    assert not (tmp_path / "out").exists()


def test_a_mistake_in_an_evaluation_is_found_before_the_model_is_read(model, tmp_path):
    """With everything else that is wrong; the weights are damaged, so that reading them would say something else."""
    damaged = tmp_path / "damaged"
    shutil.copytree(model, damaged)
    for shard in damaged.glob("*.safetensors"):
        shard.write_bytes(b"no weights")
    for wrong, said in (
        (["--tasks", "wikitxt2"], "Did you mean 'wikitext2'"),
        (["--tasks", f"text:{tmp_path / 'nowhere.txt'}"], "nowhere.txt"),
        (["--tasks", "c4", "--bos", "sometimes"], "--bos sometimes is not a choice"),
        (["--tasks", "c4", "--limit", 3], "--limit 3"),
    ):
        result = run_lrc("eval", damaged, *wrong, "--dtype", "flota16")
        assert result.code == 2
        assert said in result.err and "Did you mean 'float16'?" in result.err
    text = tmp_path / "text.txt"
    text.write_text("A text. " * 50)
    result = run_lrc("eval", damaged, "--tasks", f"text:{text}", "--length", 10**6)
    assert result.code == 2
    assert "positions of this model" in result.err


def test_a_mistyped_source_is_told_beside_wrong_numbers(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("method: svd\nratio: 0.2\ncalibration: {source: wikitxt2, samples: 0}\n")
    result = run_lrc("recipe", "check", own)
    assert result.code == 2
    assert "Did you mean 'wikitext2'" in result.err and "calibration.samples" in result.err


def test_a_mistyped_model(model, tmp_path):
    model = shutil.copytree(model, tmp_path / "models" / "llama2")  # no neighbour has a name as near
    mistyped = model.parent / (model.name + "s")
    result = run_lrc("plan", mistyped, "--ratio", 0.3)
    assert result.code == 2
    assert f"There is no folder {mistyped}" in result.err and f"Did you mean '{model.name}'?" in result.err
    result = run_lrc("plan", "nobody/nothing", "--ratio", 0.3)
    assert result.code == 2
    assert "'nobody/nothing'" in result.err and "local folder" in result.err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--tasks", "wikitex2"], "Did you mean 'wikitext2'"),
        (["--tasks", "text:nosuch.txt", "--length", "64"], "there is no file nosuch.txt"),
        (["--tasks", " , "], "--tasks is empty"),
        (["--tasks", "text:{text},text:{text}"], "more than once"),
        (["--tasks", "text:{text}", "--bos", "sometimes"], "--bos sometimes"),
        (["--tasks", "text:{text}", "--length", "1"], "--length 1"),
        (["--tasks", "text:{text}", "--json", "nosuch/r.json"], "The folder of --json nosuch/r.json"),
        (["--tasks", "text:{text}", "--baseline", "./nosuch"], "There is no folder ./nosuch"),
        (["--tasks", "text:{text}", "--dtype", "float61"], "Did you mean 'float16'?"),
    ],
)
def test_an_evaluation_that_cannot_be_done(more, said, model, tiny_text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run_lrc("eval", model, *(part.format(text=tiny_text_file) for part in more))
    assert result.code == 2
    assert said in result.err


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("lrc.plan.load_recipe.shipped", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_lrc("recipe", "list")


# ---- plans and results


def test_plan_and_dry_run_print_the_same_and_write_nothing(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = contents(model)
    request = [model, "--ratio", 0.3, "--samples", 4, "--propagate", "compressed", "--set", "keep=['*.v_proj']"]
    planned = lrc_ok("plan", *request)
    dry = lrc_ok("compress", *request, "--dry-run", "--out", tmp_path / "out")
    measured = re.compile("memory: .*")  # it counts what this process holds already
    assert measured.sub("", planned) == measured.sub("", dry)
    assert "kept by '*.v_proj'" in planned and "calibration 4 × 2048 tokens" in planned
    assert list(tmp_path.iterdir()) == []
    assert contents(model) == before


def test_a_verbose_plan_names_every_target_and_everything_that_stays(model):
    printed = lrc_ok("plan", model, "--ratio", 0.3, "--verbose")
    assert all(f"model.layers.{i}.self_attn.q_proj" in printed for i in range(3))
    assert re.search(r"kept: model.embed_tokens.weight \(15,360 parameters\): embedding", printed)


def test_the_bytes_of_the_plan_are_the_bytes_on_disk(finished):
    out, printed = finished
    nbytes = 0
    for path in out.glob("*.safetensors"):
        with safe_open(path, "pt") as shard:
            nbytes += sum(shard.get_tensor(name).nbytes for name in shard.keys())  # noqa: SIM118
    promised = list(re.finditer(r"of the whole model \((.*) → (.*)\)", printed))[-1]  # the final plan
    assert size(nbytes) == promised[2]
    assert f"{nbytes:,} of" in lrc_ok("verify", out)
    record = json.loads((out / "lrc.json").read_text())
    assert record["bytes"]["model_after"] == nbytes
    assert f"removed: {record['ratio']:.2%} of the targets" in printed


def test_verify_names_the_shard_that_changed(finished, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for path in finished[0].iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    shard = out / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    result = run_lrc("verify", out)
    assert result.code == 1
    assert str(shard) in result.err and "sha256" in result.err
    shard.unlink()
    assert f"{shard} is missing" in run_lrc("verify", out).err
    assert run_lrc("verify", tmp_path).code == 2


def test_eval_puts_a_baseline_beside_and_writes_json(finished, model, tiny_text_file, tmp_path):
    out, _ = finished
    request = ["--tasks", f"text:{tiny_text_file}", "--length", 64, "--max-windows", 2]
    refused = run_lrc("eval", out, *request)
    assert refused.code == 2
    assert "calibrat" in refused.err and "--allow-calibration-text" in refused.err
    more = ["--allow-calibration-text", "--baseline", model, "--json", tmp_path / "r.json"]
    printed = lrc_ok("eval", out, *request, *more)
    written = json.loads((tmp_path / "r.json").read_text())
    (metric,) = written["results"]
    assert metric.endswith("token-ppl@64")
    entry = written["results"][metric]
    assert {"value", "tokens", "stderr", "protocol"} <= set(entry)
    assert entry["tokens"] == 126
    header, row = printed.splitlines()[:2]
    assert str(out) in header and str(model) in header, "long names are not cut"
    assert f"{entry['value']:.4f}" in row and metric in row and "%)" in row


# ---- where it prints


def test_without_a_terminal_lines_are_plain_and_whole(finished, model, tiny_text_file, tmp_path):
    long = tmp_path / ("a[bold]checkpoint[red] :smile: " + 8 * "of a long name ") / "model"
    long.parent.mkdir()
    long.symlink_to(model)
    printed = lrc_ok("plan", long, "--ratio", 0.01, "--set", "rank_multiple=1")
    assert "\x1b" not in printed
    first = printed.splitlines()[0]
    assert first.startswith(f"{long} (llama, float32) by nystrom") and first.endswith("256 × 2048 tokens")
    starts = ("checkpoint: ", "targets ", "self_attn.", "mlp.", "allocation kl: ", "removed: ", "kept: ", "disk: ", "memory: ",
              "time: ", "note: ")  # fmt: skip
    assert all(line.startswith(starts) for line in printed.splitlines()[1:])
    layers = [line for line in finished[1].splitlines() if line.startswith("layer ")]
    assert [line.split()[1] for line in layers] == ["1/3", "2/3", "3/3"]
    shape = r"layer +\d/3  7 targets, ranks \d+ to \d+, relative error 0\.\d+, damping 0, [\d.]+ s, peak [\d.]+ [MG]B"
    assert all(re.fullmatch(shape, line) for line in layers)
    done, checked = finished[1].splitlines()[-2:]
    assert "Checked: it loads, its logits are finite." in done
    assert re.search(r"perplexity [\d.]+ → [\d.]+ over 510 tokens of a text that calibration did not see", checked)
    assert checked.endswith(f"more by: lrc eval {finished[0]} --baseline {model}")


def test_on_a_terminal_there_is_one_bar_below_the_lines(model, tiny_text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    master, slave = os.openpty()
    seen = bytearray()

    def drain() -> None:
        with contextlib.suppress(OSError):  # the terminal was closed
            while data := os.read(master, 4096):
                seen.extend(data)

    reader = threading.Thread(target=drain)
    reader.start()
    with os.fdopen(slave, "w") as terminal, contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
        arguments = [
            "compress",
            str(model),
            "--out",
            str(tmp_path / "out"),
            "--ratio",
            "0.3",
            "--samples",
            "8",
            "--length",
            "48",
        ]
        monkeypatch.setattr(sys, "argv", ["lrc", *arguments, "--calibration", f"text:{tiny_text_file}"])
        with pytest.raises(SystemExit) as stop:
            lrc.cli.main()
    reader.join(10)
    os.close(master)
    text = seen.decode()
    assert stop.value.code in (0, None)
    assert "━" in text and "0/3" in text
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).splitlines()
    assert sum(line.lstrip("\r").startswith("layer ") for line in last) == 3
    assert "elapsed" in text and "left" in text
    assert "Checked: it loads" in " ".join(last[-6:])
