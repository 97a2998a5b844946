"""Help of the commands: every line whole, wrapped to the terminal, with examples that run as they are printed."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

# command -> examples; MODEL is a model, OUT the result of a run, FILE a text. tests/commands/test_examples.py runs them.
EXAMPLES: dict[str, tuple[str, ...]] = {
    "": ("lrc compress MODEL --recipe svd-llm --ratio 0.4 --out OUT", "lrc eval OUT --baseline MODEL"),
    "compress": (
        "lrc compress MODEL --recipe svd-llm --ratio 0.4",
        "lrc compress MODEL --ratio 0.3 --calibration text:FILE --samples 64 --out OUT",
    ),
    "plan": ("lrc plan MODEL --ratio 0.3", "lrc plan MODEL --recipe gptq --bits 4 --verbose"),
    "eval": ("lrc eval OUT", "lrc eval OUT --tasks text:FILE --baseline MODEL --json eval.json"),
    "sweep": (
        "lrc sweep MODEL --recipes svd,rtn --ratios 0.2 --tasks text:FILE --out DIR",
        "lrc sweep MODEL --recipes svd-llm --tasks text:FILE --out SWEEP",
    ),
    "verify": ("lrc verify OUT", "lrc verify OUT --json -"),
    "export": ("lrc export OUT", "lrc export OUT --to dense --out DENSE"),
    "bench": ("lrc bench OUT --baseline MODEL", "lrc bench OUT --prefill 64 --decode 1 --rounds 3 --json bench.json"),
    "report": ("lrc report OUT", "lrc report OUT --out PAGE"),
    "advise": (
        "lrc advise MODEL --ratio 0.4",
        "lrc advise MODEL --ratio 0.3 --recipes gptq,lrc-fast --calibration text:FILE --json -",
    ),
    "inspect": ("lrc inspect MODEL", "lrc inspect MODEL --calibration text:FILE --map rank --html inspect.html"),
    "recipe": ("lrc recipe list", "lrc recipe show svd-llm"),
    "recipe list": ("lrc recipe list", "lrc recipe list --json -"),
    "recipe methods": ("lrc recipe methods", "lrc recipe methods --json -"),
    "recipe scores": ("lrc recipe scores", "lrc recipe scores --json -"),
    "recipe rules": ("lrc recipe rules", "lrc recipe rules --json -"),
    "recipe show": ("lrc recipe show lrc-fast", "lrc recipe show svd-llm > mine.yaml"),
    "recipe check": ("lrc recipe check svd-llm", "lrc recipe check lrc-best --set ratio=0.5 --json -"),
    "recipe new": ("lrc recipe new my.yaml", "lrc recipe new best.yaml --from lrc-best"),
    "recipe schema": ("lrc recipe schema", "lrc recipe schema > recipe.schema.json"),
    "recipe diff": ("lrc recipe diff svd-llm lrc-fast", "lrc recipe diff asvd svd-llm --json -"),
    "doctor": ("lrc doctor", "lrc doctor --json -"),
    "generate": (
        'lrc generate MODEL OUT --prompt "The old mill"',
        'lrc generate OUT --prompt "Once" --tokens 8 --json -',
    ),
    "compare": ("lrc compare MODEL OUT", "lrc compare MODEL OUT --text FILE --windows 4 --json -"),
}


class Command(TyperCommand):
    """A command whose help ends with its examples."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples, not wrapped: they are to be copied."""
        _write_examples(ctx, formatter)


class Group(TyperGroup):
    """A group whose help says whole what each of its commands does."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands with their first sentences, wrapped where the terminal is narrow."""
        rows = [
            (name, command.get_short_help_str(10_000))
            for name in self.list_commands(ctx)
            if (command := self.get_command(ctx, name)) is not None and not command.hidden
        ]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples."""
        _write_examples(ctx, formatter)


def _write_examples(ctx: Any, formatter: Any) -> None:
    shown = EXAMPLES.get(ctx.command_path.partition(" ")[2], ())
    if shown:
        formatter.write("\nExamples:\n" + "".join(f"  {line}\n" for line in shown))
