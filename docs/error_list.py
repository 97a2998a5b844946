"""Writes docs/errors.md: every error that lrc raises for a user, with its remedy, from the places that raise it.

    make docs

`tests/test_docs.py` fails if the page is not what this script writes.
"""

from __future__ import annotations

import ast
import inspect
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from lrc import errors

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "errors.md"
_SKIP = {"tests", "benchmarks", "docs"}
CLASSES = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.LrcError)}


def raised() -> Iterator[tuple[str, str, str]]:
    """Name of the class, what happened, and the remedy, for every place that raises one of lrc's errors."""
    for path in sorted(ROOT.rglob("*.py")):
        inside = path.relative_to(ROOT).parts
        if inside[0] in _SKIP or any(part.startswith(".") for part in inside):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(call := node.exc, ast.Call) and isinstance(call.func, ast.Name):
                name = call.func.id
                if name in CLASSES and name != "RecipeError" and call.args:
                    what, *rest = [text(argument) for argument in call.args]
                    yield name, what, rest[0] if rest else ""


def text(node: ast.expr) -> str:
    """A message as it is in the code, with … for what is known only then; empty for one that is all of that kind."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (text(node.left) or "…") + (text(node.right) or "…")
    return ""


def page() -> str:
    """The text of docs/errors.md."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for name, what, remedy in raised():
        if what.strip("… :.;,\n"):
            found[name].setdefault(_cell(what), _cell(remedy))
    lines = [
        "# Every error, with its remedy",
        "",
        "<!-- written by docs/error_list.py from the places that raise them: run make docs -->",
        "",
        "A mistake ends in one message, its remedy, and an exit code: 2 where the request was wrong, 1 where the run failed.",
        "Nothing that was there before is lost. … stands for what the message fills in. In Python each is a class of",
        "`lrc.errors`; `RecipeError` lists all mistakes of a recipe at once, with the nearest key that exists.",
    ]
    for name, messages in sorted(found.items()):
        kind = CLASSES[name]
        about = (inspect.getdoc(kind) or "").partition("\n")[0]
        lines += [
            "",
            f"## {name}",
            "",
            f"{about} Exit code {kind.exit_code}.",
            "",
            "| what happened | what to do |",
            "|---|---|",
        ]
        lines += [f"| {what} | {remedy} |" for what, remedy in sorted(messages.items())]
    return "\n".join(lines) + "\n"


def _cell(message: str) -> str:
    cell = " ".join(message.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
    return cell.replace("[", "\\[").replace("`", "")


if __name__ == "__main__":
    PAGE.write_text(page())
