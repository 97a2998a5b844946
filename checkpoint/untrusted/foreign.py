"""The boundary to libraries that read what anyone may have written.

transformers, tokenizers, safetensors and gguf raise whatever their code happens to meet in a file that they do not expect: a
TypeError from a configuration, a bare Exception from a tokenizer, a RuntimeError from a tensor's shape. At this boundary, and
nowhere else, every exception becomes an error that names the file. lrc's own code does not run inside it: its bugs keep their
tracebacks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ...errors import LrcError, brief, one_line


@contextmanager
def foreign(kind: type[LrcError], what: str, remedy: str) -> Iterator[None]:
    """Turn every exception of a library into an `LrcError`.

    Args:
        kind: class of the error.
        what: what was being done, in words that a colon and the library's reason can follow.
        remedy: what the user can do.

    Raises:
        LrcError: the library raised something. Interrupts, exits, lrc's own errors and a device without memory pass through.
    """
    from torch import OutOfMemoryError

    try:
        yield
    except (LrcError, OutOfMemoryError):
        raise
    except Exception as error:
        raise kind(f"{what}: {_reason(error)}", remedy) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # what a library in Rust raises for its own bug
            raise
        raise kind(f"{what}: {_reason(error)}", remedy) from error


def _reason(error: BaseException) -> str:
    """The library's reason on one line, with the kind of error where the text alone says little (`KeyError: 'foo'`)."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MemoryError):
        return f"it asks for more memory than there is {one_line(error)}".removesuffix(" MemoryError")
    text = brief(one_line(error), 400)
    plain = isinstance(error, OSError | ValueError) and not isinstance(error, UnicodeError)
    return text if plain or text == type(error).__name__ else f"{type(error).__name__}: {text}"
