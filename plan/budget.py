"""How much may stay: said as a ratio, as bits per weight, or as a size on disk, and turned into one number of bytes.

    ratio   the targets keep 1 - ratio of their bytes
    bits    the targets keep this many bits per weight of theirs, on average, scales, masks and indices counted
    size    the files with the weights come to no more than this: what is no target is taken off first, and the files' headers

A fourth way, the rise of perplexity that is allowed, becomes a ratio by search (run/search.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import BudgetError

KEYS = ("ratio", "bits", "size", "max_ppl_increase")
ASK = "Add --ratio 0.2 (removes 20 % of the targets' bytes), --bits 4 or --size 300MB."
ASSUMED = 0.2  # the ratio that a plan shows before a search has found one

_DECIMAL, _BINARY = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}, {"ki": 1, "mi": 2, "gi": 3, "ti": 4}
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]*)\s*", re.IGNORECASE)
# of one tensor in a header of safetensors, its name left out: dtype, shape and offsets with up to 14 digits each
_ENTRY = 110
_PARTS = 6  # tensors that one target's form may have (factors, codes, scales, zeros, mask, guard)


def checked_ratio(ratio: float) -> float:
    """The ratio, if it lies in [0, 1).

    Raises:
        ValueError: it does not; guesses what was meant.
    """
    if not 0 <= ratio < 1:
        hint = f"Did you mean {ratio / 100:g}?" if 1 < ratio < 100 else "0.4 removes 40 % of the targets' bytes."
        also = f" (Bits per weight are said as bits: {ratio:g}.)" if 1 < ratio <= 8 else ""
        raise ValueError(f"must lie in [0, 1). {hint}{also}")
    return ratio


def checked_bits(bits: float) -> float:
    """The mean bits per weight, if they can be.

    Raises:
        ValueError: none or more than any checkpoint has.
    """
    if not 0 < bits <= 32:
        raise ValueError("must lie above 0 and be at most 32: the mean over all targets' weights. 4 keeps four bits of each")
    return bits


def bytes_of(text: str) -> int:
    """Bytes of a size such as '300MB' (decimal), '1.5GiB' (binary) or '300000000B'.

    Raises:
        ValueError: it is none, or has no unit.
    """
    found = _SIZE.fullmatch(text)
    if found is None:
        raise ValueError("is no size. Write 300MB (decimal) or 286MiB (binary)")
    number, unit = float(found[1]), found[2].lower()
    if not unit:
        raise ValueError(f"has no unit. Did you mean {found[1]}MB or {found[1]}GB?")
    bare = unit.removesuffix("b")
    if unit == bare or bare not in _DECIMAL | _BINARY:
        meant = f"{found[1]}{bare[:1].upper()}B" if bare[:1] in _DECIMAL and bare else "300MB"
        raise ValueError(
            f"has an unknown unit '{found[2]}'. Did you mean {meant}? Known: B, kB, MB, GB, TB, KiB, MiB, GiB, TiB"
        )
    nbytes = number * (1000 ** _DECIMAL[bare] if bare in _DECIMAL else 1024 ** _BINARY[bare])
    if nbytes < 1:
        raise ValueError("is nothing; a size is above 0 bytes")
    return math.floor(nbytes)


def rise_of(value: Any) -> float:
    """The fraction by which perplexity may rise, of '5%' or 0.05.

    Raises:
        ValueError: it is no such number.
    """
    text = str(value).strip()
    try:
        rise = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise ValueError("is no rise of perplexity. Write 5% or 0.05") from None
    if not math.isfinite(rise) or rise <= 0:
        raise ValueError("must lie above 0: 5% lets perplexity rise from 20 to 21")
    if rise >= 1 and not text.endswith("%"):
        raise ValueError(f"would be {rise:.0%}. Did you mean {rise:g}%?")
    return rise


def said(amounts: Mapping[str, Any], ratio: float | None) -> str:
    """What was asked for, in words, with the ratio that it comes to."""
    if amounts["bits"] is not None:
        return f"{amounts['bits']:g} bits per weight (ratio {ratio:g})"
    if amounts["size"] is not None:
        return f"a size of {amounts['size']:,} bytes (ratio {ratio:g})"
    return f"ratio {ratio:g}" if ratio is not None else "no ratio"


@dataclass(frozen=True)
class Found:
    """What a search has found.

    Args:
        ratio: fraction of the targets' bytes that goes.
        before, after: token perplexity on held-out calibration windows, of the original and of the compressed model.
        tokens: how many predictions they are over.
        evaluations: how many compressed models were measured.
    """

    ratio: float
    before: float
    after: float
    tokens: int
    evaluations: int

    @property
    def increase(self) -> float:
        """The rise of perplexity, relative to the original's."""
        return self.after / self.before - 1


@dataclass(frozen=True)
class Footprint:
    """What a model's bytes consist of, when nothing is compressed yet.

    Args:
        targets: bytes of all targets.
        numel: their weights.
        element: bytes of one number in the checkpoint's dtype.
        whole: bytes of all tensors.
        gone: bytes of the layers that are dropped, targets and the rest.
        gone_targets: of which targets.
        kept: bytes of the targets that stay dense whatever the budget.
        headers: bytes that the headers of the files may take.
    """

    targets: int
    numel: int
    element: int
    whole: int
    gone: int = 0
    gone_targets: int = 0
    kept: int = 0
    headers: int = 0

    @property
    def beside(self) -> int:
        """Bytes on disk that are no target's."""
        return self.whole - self.targets - (self.gone - self.gone_targets) + self.headers

    @property
    def open(self) -> int:
        """Bytes of the targets that the budget decides on."""
        return self.targets - self.gone_targets - self.kept


def header_bytes(tensors: Mapping[str, bool], shards: int) -> int:
    """An upper bound of what the headers of the weights' files take.

    Args:
        tensors: name -> whether it is a target, whose form may be several tensors.
        shards: number of files.
    """
    return sum((len(name) + _ENTRY) * (_PARTS if target else 1) for name, target in tensors.items()) + 64 * shards


def targets_bytes(amounts: Mapping[str, Any], model: Footprint) -> int | None:
    """Bytes that all targets together may take; None where nothing says how much.

    Args:
        amounts: 'ratio', 'bits' and 'size' (bytes) of a recipe; at most one of them is not None.

    Raises:
        BudgetError: it asks for more than there is, or for less than what stays whatever the budget.
    """
    if (ratio := amounts.get("ratio")) is not None:
        # guards against 0.6 * 100 = 59.99999: what is kept must not depend on how a decimal is rounded
        return int((1 - ratio) * model.targets + 1e-6)
    if (bits := amounts.get("bits")) is not None:
        if bits >= 8 * model.element:
            raise BudgetError(
                f"bits: {bits:g} per weight is no compression: the checkpoint has {8 * model.element}.",
                f"Ask for less than {8 * model.element}, such as --bits {4 * model.element} (ratio 0.5).",
            )
        budget = int(bits * model.numel / 8 + 1e-6)
        left = 8 * model.kept / model.numel
        return _above_kept(budget, model.kept, f"bits: {bits:g} per weight", f"{left:.2f} bits of every target's weight")
    if (size := amounts.get("size")) is not None:
        if size >= model.whole + model.headers:
            raise BudgetError(
                f"size: {readable(size)} is no compression: the model takes {readable(model.whole)}.",
                "Ask for less; mind the unit (MB, GB).",
            )
        stays = model.beside + model.kept
        if size <= stays:
            raise BudgetError(
                f"size: {readable(size)} is less than what stays as it is: {readable(stays)} "
                f"({readable(model.beside)} of embeddings, norms, head and headers, {readable(model.kept)} of targets that "
                "are kept).",
                f"Ask for more than {readable(stays)}; the targets take {readable(model.open)} beside it when dense.",
            )
        return min(size - model.beside, model.targets - model.gone_targets)
    return None


def _above_kept(budget: int, kept: int, asked: str, meaning: str) -> int:
    if budget <= kept:
        raise BudgetError(
            f"{asked} is less than what the recipe keeps dense ({readable(kept)}, {meaning}).", "Ask for more, or keep fewer."
        )
    return budget


def share_of(budget: int, model: Footprint) -> float:
    """The fraction that every open target loses so that all targets together take `budget` bytes; never below 0."""
    return max(0.0, 1 - (budget - model.kept) / model.open) if model.open else 0.0


def readable(nbytes: float) -> str:
    """'300.0 MB', decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"
