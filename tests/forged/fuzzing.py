"""Changed bytes and changed values for fuzz tests, and what a reader of them must hold to."""

from __future__ import annotations

import json
import resource
import time
import warnings
from collections.abc import Callable
from typing import Any

from forgeries import NASTY
from hypothesis import strategies as st

from lrc.errors import LrcError

SECONDS = 8.0  # for one input; a hundred times what a sound one takes, on a machine that does other things too
GROWTH = 700 << 20  # bytes of memory that all inputs of one test may add to the process
_INTERESTING = (0, 1, 0x7F, 0x80, 0xFF)


@st.composite
def changed_bytes(draw: st.DrawFn, sound: bytes) -> bytes:
    """A few changes of a sound file: flipped and replaced bytes, pieces cut out, put in, written twice, the end cut off."""
    data = bytearray(sound)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.integers(1, 40))
        match draw(st.sampled_from("frdtie8")):
            case "f" if data:
                data[place] ^= 1 << draw(st.integers(0, 7))
            case "r" if data:
                data[place] = draw(st.sampled_from(_INTERESTING))
            case "d":
                del data[place : place + length]
            case "t":
                data[place:place] = data[place : place + length]
            case "i":
                data[place:place] = draw(st.binary(min_size=1, max_size=length))
            case "e":
                del data[place:]
            case "8":  # a length or a count, where it happens to be one
                data[place : place + 8] = draw(st.sampled_from((1 << 60, (1 << 64) - 1, 1 << 63, 1 << 31, 0))).to_bytes(
                    8, "little"
                )
    return bytes(data)


@st.composite
def changed_json(draw: st.DrawFn, sound: Any, under: tuple[str | int, ...] = ()) -> bytes:
    """One to three values of a JSON value replaced by nasty ones, taken out, or given twice; `under`: only below this path."""
    held = json.loads(json.dumps(sound))
    at = held
    for key in under:
        at = at[key]
    texts = []
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(at))
        if not places:
            break
        parent, key = draw(st.sampled_from(places))
        match draw(st.sampled_from("rrrrdtn")):
            case "d":
                del parent[key]
            case "t" if isinstance(parent, dict):  # written with another value, then by its own
                parent[key] = f"@@{len(texts)}@@"
                texts.append(f"1, {json.dumps(key)}: {draw(st.sampled_from(NASTY))}")
            case "n" if isinstance(parent, dict):
                parent[draw(st.text(max_size=8))] = f"@@{len(texts)}@@"
                texts.append(draw(st.sampled_from(NASTY)))
            case _:
                parent[key] = f"@@{len(texts)}@@"
                texts.append(draw(st.one_of(st.sampled_from(NASTY), _NUMBERS)))
    text = json.dumps(held)
    for number, each in enumerate(texts):
        text = text.replace(f'"@@{number}@@"', each, 1)
    return text.encode("utf-8", "surrogatepass")


_NUMBERS = st.one_of(st.integers(), st.floats(), st.integers(-3, 300)).map(json.dumps)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(Container, key) of every value inside a value."""
    found, left = [], [value]
    while left:
        each = left.pop()
        keys = list(each) if isinstance(each, dict) else range(len(each)) if isinstance(each, list) else ()
        for key in keys:
            found.append((each, key))
            left.append(each[key])
    return found


class Watch:
    """Counts what readers answered, and holds them to their promises."""

    def __init__(self) -> None:
        self.read, self.refused = 0, 0
        self._before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def __call__(self, reader: Callable[[], object]) -> None:
        """Run a reader: it answers or raises an `LrcError` of a few lines, soon, and without a storm of warnings."""
        started = time.perf_counter()
        with warnings.catch_warnings(record=True) as storm:
            warnings.simplefilter("always")
            said = ""
            try:
                reader()
                self.read += 1
            except LrcError as error:
                self.refused += 1
                said = str(error)
        assert len(said) < 4000 and said.count("\n") < 12, "a message that nobody can read"
        assert time.perf_counter() - started < SECONDS
        assert len(storm) < 20, storm[0]

    def require_bounded(self) -> None:
        """All inputs together took no more memory than is allowed."""
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self._before) << 10
        assert grown < GROWTH, f"{grown:,} bytes"
