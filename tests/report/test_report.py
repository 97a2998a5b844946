"""The report of a result: its numbers are those of the record, and the page shows them in a browser without a network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from commandline import run_lrc
from pipeline import compressed_once

RESULTS = {
    "low rank": ("llama", "svd-llm", {"ratio": 0.3}, {}),
    "codes and corrections": ("llama", "qera", {"settings__group_size": 16, "settings__rank": 4}, {}),
    "narrow and low rank": ("llama", "lrc-fast", {"ratio": 0.3}, {}),
    "experts": ("mixtral", "svd-llm", {"ratio": 0.3}, {}),
    "dropped layer": ("llama", "block-influence", {"ratio": 0.3}, {}),
}


@pytest.fixture(scope="module")
def results(tiny_checkpoints, tiny_text_file, tmp_path_factory):
    """A function name -> folder of a finished result, compressed once."""
    return compressed_once(RESULTS, tiny_checkpoints, tiny_text_file, tmp_path_factory)


def written(result: Path, out: Path, *flags: object) -> tuple[dict, str]:
    done = run_lrc("report", result, "--out", out, *flags)
    assert done.code == 0, done.err
    assert done.out.strip() == str(out / "report.html")
    return json.loads((out / "report.json").read_text()), (out / "report.html").read_text()


@pytest.mark.parametrize("name", RESULTS)
def test_the_numbers_are_those_of_the_record(name, results, tmp_path):
    content, page = written(results(name), tmp_path / "report")
    record = json.loads((results(name) / "lrc.json").read_text())
    assert (content["bytes_before"], content["bytes_after"]) == (
        record["bytes"]["model_before"],
        record["bytes"]["model_after"],
    )
    assert [line["bytes_after"] for line in content["targets"]] == [each["bytes_after"] for each in record["targets"]]
    parts = content["parts"]
    assert sum(part["bytes_before"] for part in parts) == content["bytes_before"]
    if name != "dropped layer":
        assert sum(part["bytes_after"] for part in parts) == content["bytes_after"]
    for line in content["targets"]:
        assert line["name"] in page and line["form"] in page
    for line, each in zip(content["targets"], record["targets"], strict=True):
        assert line["bits"] == pytest.approx(8 * each["bytes_after"] / (each["shape"][-2] * each["shape"][-1]))


def test_nothing_is_loaded_from_elsewhere(results, tmp_path):
    """Outside plotly's own script the page names no address, and its policy forbids every request."""
    _, page = written(results("low rank"), tmp_path / "report")
    own = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert "http://" not in own and "https://" not in own and "src=" not in own
    assert "default-src 'none'" in own


def test_values_of_an_evaluation_are_shown(results, tiny_text_file, tmp_path):
    result = results("low rank")
    done = run_lrc("eval", result, "--tasks", f"text:{tiny_text_file}", "--json", tmp_path / "eval.json", "--length", 64,
                   "--allow-calibration-text")  # fmt: skip
    assert done.code == 0, done.err
    content, page = written(result, tmp_path / "report", "--eval", tmp_path / "eval.json")
    (metric,) = content["metrics"]
    assert metric["value"] > 1 and metric["metric"] in page and metric["protocol"] in page


def test_names_from_a_checkpoint_stay_text(results, tmp_path):
    """Whatever a record says is text on the page, never markup."""
    from lrc.report.content import gather
    from lrc.report.page import page
    from lrc.run.result import Result

    result = Result.read(results("low rank"))
    result.record["model"]["name"] = "<script>alert(1)</script>"
    result.record["targets"][0]["note"] = "</script><img src=x onerror=alert(1)>"
    shown = page(gather(result, []))
    assert "<script>alert" not in shown and "<img src=x" not in shown


def test_what_is_no_evaluation_or_no_result_is_refused(results, tmp_path):
    (tmp_path / "other.json").write_text("[]")
    for file in ("other.json", "missing.json"):
        done = run_lrc("report", results("low rank"), "--out", tmp_path / "report", "--eval", tmp_path / file)
        assert done.code == 2 and "no file of lrc eval --json" in done.err
    assert "holds no lrc.json" in run_lrc("report", tmp_path).err
    assert not (tmp_path / "report").exists()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed (Debian: apt-get install chromium)")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_draws_every_figure(width, results, tmp_path):
    """In headless Chromium, from a file: all figures are drawn, and nothing is wider than the window (500 is the narrowest)."""
    _, page = written(results("low rank"), tmp_path / "report")
    count = page.count('class="figure"')
    probe = """<script>addEventListener("load", () => { document.title = [
        document.querySelectorAll(".figure .main-svg").length > 0 && [...document.querySelectorAll(".figure")].every(
            box => box.querySelector(".main-svg")), document.querySelectorAll(".figure").length,
        document.documentElement.scrollWidth <= innerWidth, innerWidth].join() })</script></body>"""
    (tmp_path / "probe.html").write_text(page.replace("</body>", probe))
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
         f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--virtual-time-budget=5000", "--dump-dom",
         f"file://{tmp_path / 'probe.html'}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert f"<title>true,{count},true,{max(width, 500)}</title>" in done.stdout, re.findall("<title>.*?</title>", done.stdout)


def test_pictures_and_numbers_are_written_where_they_are_asked_for(results, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (the extra `pictures`)")
    done = run_lrc("report", results("low rank"), "--out", tmp_path / "report", "--png", "--json", "-")
    assert done.code == 0, done.err
    assert json.loads(done.out) == json.loads((tmp_path / "report" / "report.json").read_text())
    pictures = {path.name for path in (tmp_path / "report").glob("*.png")}
    assert pictures == {"bytes.png", "bits.png", "rank.png", "error.png"}
    for name in pictures:
        content = (tmp_path / "report" / name).read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 5_000


def test_pictures_without_matplotlib_are_refused_with_the_command_that_installs_it(results, tmp_path, monkeypatch):
    monkeypatch.setattr("lrc.report.picture.can_draw", lambda: False)
    done = run_lrc("report", results("low rank"), "--out", tmp_path / "report", "--png")
    assert done.code == 2 and "pip install 'lrc[pictures]'" in done.err
    assert not (tmp_path / "report").exists()
