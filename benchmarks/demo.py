"""The demo: results of the embedded SmolLM2 beside the original, in one table and one picture.

The model is rewritten first so that its weights lie on no 4-bit grid (benchmarks/quality/ungrid.py); it computes the same. It
is calibrated on docstrings of Python's standard library, and measured on Python's own language reference and on the standard
library's code without comments and docstrings. Both are on every machine, and calibration has seen neither. Needs no network.

    python benchmarks/demo.py [--out demo-out] [--only gptq]
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import plotly.graph_objects as go
from quality import ungrid
from rich.console import Console
from rich.table import Table

CALIBRATION = ("--calibration", "pydoc", "--samples", "32", "--length", "1024", "--dtype", "bfloat16")
RESULTS = {
    "lrc-fast": ("--recipe", "lrc-fast", "--ratio", "0.2"),
    "gptq": ("--recipe", "gptq", "--bits", "4", "--propagate", "original"),
    "trellis": ("--recipe", "trellis", "--bits", "4", "--propagate", "original"),
}
ABOUT = {
    "original": "16 bits",
    "lrc-fast": "low rank and fewer channels",
    "gptq": "4-bit codes on a grid",
    "trellis": "4-bit codes of a trellis",
}
PROMPT = "The easiest way to learn a new language is"
MODULES = ("argparse", "ast", "difflib", "inspect", "pathlib", "tarfile", "typing", "zipfile")


@dataclass(frozen=True)
class Row:
    """One model of the table.

    Args:
        name: of the recipe, or 'original'.
        nbytes: of its weight files.
        bits: per weight of the compressed matrices.
        reference, code: perplexity on the two texts.
        speed: tokens per second while it writes, as a multiple of the original's; measured in turns with it.
        text: what it writes after the prompt.
    """

    name: str
    nbytes: int
    bits: float
    reference: float
    code: float
    speed: float
    text: str


def lrc(*arguments: str) -> None:
    """Run the command line as a user does; stop with its exit code if it fails."""
    Console().print(f"[bold]$ lrc {' '.join(arguments)}[/]", soft_wrap=True)
    code = subprocess.run([sys.executable, "-m", "lrc.cli", *arguments], check=False).returncode
    if code:
        sys.exit(code)


def reference() -> str:
    """Python's language reference, as pydoc has it."""
    return "\n\n".join(topics[name] for name in sorted(topics))


def code() -> str:
    """Modules of the standard library without comments and docstrings."""
    found = []
    for name in MODULES:
        path = Path(sysconfig.get_path("stdlib"), f"{name}.py")
        tree = ast.parse((path if path.exists() else path.with_suffix("") / "__init__.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
                node.body = node.body[1:] or [ast.Pass()]
        found.append(ast.unparse(tree))
    return "\n\n".join(found)


def compared(folder: Path, models: list[str], name: str, text: str) -> list[dict[str, Any]]:
    """What `lrc compare` says of the models on a text."""
    file, answer = folder / f"{name}.txt", folder / f"{name}.json"
    file.write_text(text)
    lrc("compare", *models, "--text", str(file), "--windows", "8", "--length", "1024", "--json", str(answer))
    found: list[dict[str, Any]] = json.loads(answer.read_text())["models"]
    return found


def rows(folder: Path, names: list[str]) -> list[Row]:
    """Measure the original and the results."""
    models = [str(folder / name) for name in names]
    on_reference, on_code = compared(folder, models, "reference", reference()), compared(folder, models, "code", code())
    speeds = [1.0, *(beside_original(folder, name) for name in names[1:])]
    written = folder / "written.json"
    lrc("generate", *models, "--prompt", PROMPT, "--tokens", "24", "--json", str(written))
    answers = json.loads(written.read_text())["answers"]
    return [
        Row(
            name,
            one["bytes"],
            bits(folder / name),
            one["perplexity"],
            two["perplexity"],
            speed,
            said["text"],
        )
        for name, one, two, speed, said in zip(names, on_reference, on_code, speeds, answers, strict=True)
    ]


def beside_original(folder: Path, name: str) -> float:
    """How many times as fast as the original a result writes, one sequence at a time."""
    answer = folder / f"{name}-speed.json"
    lrc(
        "bench", str(folder / name), "--baseline", str(folder / "original"), "--dtype", "bfloat16",
        "--prefill", "128", "--decode", "1", "--rounds", "3", "--json", str(answer),
    )  # fmt: skip
    faster: float = json.loads(answer.read_text())["times_as_fast"]["decode 1"]
    return faster


def bits(folder: Path) -> float:
    """Stored bits per weight of the compressed matrices; 16 for the original."""
    record = folder / "lrc.json"
    return 16 * (1 - json.loads(record.read_text())["ratio"]) if record.exists() else 16.0


def show(found: list[Row]) -> None:
    """Print the table."""
    first = found[0]
    table = Table("", "files", "bits a weight", "perplexity: reference", "code", "writes")
    for row in found:
        table.add_row(
            f"[bold]{row.name}[/]\n{ABOUT[row.name]}",
            f"{row.nbytes / 1e6:.0f} MB",
            f"{row.bits:.2f}",
            f"{row.reference:.2f} ({row.reference / first.reference - 1:+.0%})",
            f"{row.code:.2f} ({row.code / first.code - 1:+.0%})",
            f"{row.speed:.2f}×",
        )
    Console().print(table)
    for row in found:
        Console().print(f'{row.name}: "{PROMPT} ▸ {" ".join(row.text.split())} ..."', markup=False, highlight=False)


def draw(found: list[Row], file: Path) -> None:
    """One picture: bytes against perplexity on both texts."""
    figure = go.Figure()
    for name, values in (("reference", [row.reference for row in found]), ("code", [row.code for row in found])):
        figure.add_scatter(
            x=[row.nbytes / 1e6 for row in found], y=values, name=name, mode="markers+text", marker={"size": 12},
            text=[row.name for row in found], textposition="top center",
        )  # fmt: skip
    figure.update_layout(
        title="SmolLM2-135M-Instruct: smaller to the left, better to the bottom",
        xaxis_title="MB of weight files", yaxis_title="perplexity", yaxis_rangemode="tozero",
        template="plotly_white", font_size=15,
    )  # fmt: skip
    figure.write_html(file, include_plotlyjs=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    # a trellis takes ten times as long without numba
    made = [name for name in RESULTS if name != "trellis" or find_spec("numba")]
    parser.add_argument("--only", help="results to make, separated by commas", default=",".join(made))
    arguments = parser.parse_args()
    folder, names = arguments.out, arguments.only.split(",")
    model = folder / "original"
    if not (model / "config.json").exists():
        ungrid.main([str(model), "--dtype", "bfloat16"])
    for name in names:
        out = folder / name
        lrc("compress", str(model), *RESULTS[name], *CALIBRATION, "--statistics", str(folder / "statistics"), "--out", str(out))
    found = rows(folder, ["original", *names])
    show(found)
    draw(found, folder / "demo.html")
    smallest = min(found[1:], key=lambda row: row.reference)
    lrc("report", str(folder / smallest.name))
    Console().print(f"The picture: {folder / 'demo.html'}. A result in detail: {folder / smallest.name}-report/report.html")


if __name__ == "__main__":
    main()
