"""A file that is one long text: whole, or where it is very large, pieces of it."""

from __future__ import annotations

import codecs
import hashlib
import io
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from .opening import opened, wrong_byte

WHOLE = 256 << 20  # bytes up to which a text is read whole; it takes some 15 times as much memory once it is tokens
PIECES = 64  # of a larger text
PIECE = 1 << 20  # characters of a piece


def long_text(path: Path, order: Callable[[int], Iterator[int]]) -> tuple[str, dict[str, Any]]:
    """The text of a file, lines ended by \\n, without a mark of byte order.

    Args:
        path: of a text in UTF-8, compressed or not.
        order: (number of pieces) -> their numbers, the wanted ones first. A text above `WHOLE` bytes is read in two passes, and
            `PIECES` of its pieces are kept, joined by \\n in their own order.

    Returns:
        the text, and {"sha256": of the whole text in UTF-8, "documents": 1}, and for a text of which there are pieces only
        {"pieces": how many, "of": out of how many}.

    Raises:
        CalibrationError: it cannot be decompressed or is not UTF-8.
    """
    with opened(path) as file:
        data = file.read(WHOLE + 1)
    if len(data) <= WHOLE:
        try:
            # lines end in \n here whatever the file ends them in, as in any text that Python reads
            text = data.decode().removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError:
            raise wrong_byte(path) from None
        return text, {"sha256": hashlib.sha256(text.encode()).hexdigest(), "documents": 1}
    del data
    digest, count = hashlib.sha256(), 0
    for piece in _pieces(path):
        digest.update(piece.encode())
        count += 1
    wanted = set(islice(order(count), PIECES))
    kept = [piece for number, piece in enumerate(_pieces(path)) if number in wanted]
    return "\n".join(kept), {"sha256": digest.hexdigest(), "documents": 1, "pieces": len(kept), "of": count}


def _pieces(path: Path) -> Iterator[str]:
    """The text of a file in pieces of `PIECE` characters; the last one may be shorter."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    held = ""
    with opened(path) as file:
        while True:
            block = file.read(PIECE)
            try:
                held += decoder.decode(block, final=not block)
            except UnicodeDecodeError:
                raise wrong_byte(path) from None
            while len(held) >= PIECE:
                yield held[:PIECE]
                held = held[PIECE:]
            if not block:
                break
    if held:
        yield held
