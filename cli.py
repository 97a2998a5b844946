"""The command line: the commands by their names, and `main`. No mathematics.

torch and transformers are imported inside the commands, so that `lrc --help` answers at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated

import typer

from .commands.bench import bench
from .commands.common.help import Command, Group
from .commands.compress import compress
from .commands.evaluate import evaluate
from .commands.export import export
from .commands.look.advise import advise
from .commands.look.compare import compare
from .commands.look.doctor import doctor
from .commands.look.generate import generate
from .commands.look.inspect import inspect
from .commands.look.report import report
from .commands.plan import plan
from .commands.recipe.app import recipe_app
from .commands.sweep import sweep
from .commands.verify import verify
from .errors import LrcError, of_resources

app = typer.Typer(
    help="Compress language models after training, and measure what that costs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
_COMMANDS: dict[str, Callable[..., None]] = {
    "compress": compress, "plan": plan, "eval": evaluate, "sweep": sweep, "verify": verify, "export": export, "bench": bench,
    "inspect": inspect, "advise": advise, "report": report, "compare": compare, "generate": generate, "doctor": doctor,
}  # fmt: skip
for name, command in _COMMANDS.items():
    app.command(name, cls=Command)(command)
app.add_typer(recipe_app, name="recipe")


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        from . import __version__

        print(f"lrc {__version__}")
        raise typer.Exit


def main(words: list[str] | None = None) -> None:
    """Run a command line, by default this process's own; a mistake ends in a message and an exit code, a bug in a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app(words, prog_name="lrc")  # the name also where it runs as python -m lrc.cli
    except (LrcError, MemoryError, OSError, RuntimeError, ImportError) as error:
        told = of_resources(error) or error
        if not isinstance(told, LrcError):
            raise
        from .commands.common.console import messages

        messages().print(f"lrc: {told}")
        raise SystemExit(told.exit_code) from None


if __name__ == "__main__":
    main()
