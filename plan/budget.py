"""The budget: a ratio, bits per weight, or a size on disk, converted to a number of bytes.

    ratio   the targets keep 1 - ratio of their bytes
    bits    the targets keep this mean number of bits per weight, including scales, masks and indices
    size    the weight files take at most this size on disk: the targets get it less the other tensors and the files' headers

A recipe may also give the allowed rise of perplexity; a search converts it to a ratio (run/search.py).
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
ASSUMED = 0.2  # the ratio that a draft assumes before a search has found one

_DECIMAL, _BINARY = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}, {"ki": 1, "mi": 2, "gi": 3, "ti": 4}
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]*)\s*", re.IGNORECASE)
# bytes of one tensor in a safetensors header without its name: dtype, shape and offsets with up to 14 digits each
_ENTRY = 110
_PARTS = 6  # maximum number of tensors in one form (factors, codes, scales, zeros, mask, guard)


def checked_ratio(ratio: float) -> float:
    """Check that a ratio lies in [0, 1), and return it.

    Raises:
        ValueError: it lies outside; the message suggests the intended value.
    """
    if not 0 <= ratio < 1:
        hint = f"Did you mean {ratio / 100:g}?" if 1 < ratio < 100 else "0.4 removes 40 % of the targets' bytes."
        also = f" (Bits per weight are said as bits: {ratio:g}.)" if 1 < ratio <= 8 else ""
        raise ValueError(f"must lie in [0, 1). {hint}{also}")
    return ratio


def checked_bits(bits: float) -> float:
    """Check that the mean bits per weight lie in (0, 32], and return them.

    Raises:
        ValueError: they lie outside.
    """
    if not 0 < bits <= 32:
        raise ValueError("must lie above 0 and be at most 32: the mean over all targets' weights. 4 keeps four bits of each")
    return bits


def bytes_of(text: str) -> int:
    """Bytes of a size such as '300MB' (decimal), '1.5GiB' (binary) or '300000000B'.

    Raises:
        ValueError: the text is no size, has no unit, or is below one byte.
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
    """The fraction by which perplexity may rise, from '5%' or 0.05.

    Raises:
        ValueError: the value is no positive number, or is 1 or more without '%'.
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
    """The requested budget in words, with the equivalent ratio."""
    if amounts["bits"] is not None:
        return f"{amounts['bits']:g} bits per weight (ratio {ratio:g})"
    if amounts["size"] is not None:
        return f"a size of {amounts['size']:,} bytes (ratio {ratio:g})"
    return f"ratio {ratio:g}" if ratio is not None else "no ratio"


@dataclass(frozen=True)
class Found:
    """Result of the search for a size.

    Args:
        ratio: fraction of the targets' bytes to remove.
        before, after: token perplexity of the original and of the compressed model on held-out calibration windows.
        tokens: number of predicted tokens in these windows.
        evaluations: number of compressed models that the search measured.
    """

    ratio: float
    before: float
    after: float
    tokens: int
    evaluations: int

    @property
    def increase(self) -> float:
        """Relative rise of perplexity over the original model."""
        return self.after / self.before - 1


@dataclass(frozen=True)
class Footprint:
    """The parts of a model's bytes before compression.

    Args:
        targets: bytes of all targets.
        numel: number of weights of all targets.
        element: bytes of one number in the checkpoint's dtype.
        whole: bytes of all tensors.
        gone: bytes that dropping layers and sub-layers removes, targets and other tensors together.
        gone_targets: bytes of the targets among them.
        kept: bytes of the targets that stay dense under any budget: those that the recipe keeps, and those for which the method
            has no smaller form.
        headers: upper bound on the bytes of the files' headers.
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
        """Bytes on disk outside the targets: the other tensors and the headers."""
        return self.whole - self.targets - (self.gone - self.gone_targets) + self.headers

    @property
    def open(self) -> int:
        """Bytes of the targets that the budget decides on."""
        return self.targets - self.gone_targets - self.kept


def header_bytes(tensors: Mapping[str, bool], shards: int) -> int:
    """Upper bound on the bytes of the headers of the weight files.

    Args:
        tensors: name -> whether the tensor is a target's weight, whose form may have several tensors.
        shards: number of files.
    """
    return sum((len(name) + _ENTRY) * (_PARTS if target else 1) for name, target in tensors.items()) + 64 * shards


def targets_bytes(amounts: Mapping[str, Any], model: Footprint) -> int | None:
    """Bytes that all targets together may take; None if the recipe gives no budget.

    Args:
        amounts: 'ratio', 'bits' and 'size' (bytes) of a recipe; at most one of them is not None.
        model: the parts of the model's bytes.

    Raises:
        BudgetError: bits or size exceed the uncompressed model, or fall below the bytes that stay under any budget.
    """
    if (ratio := amounts.get("ratio")) is not None:
        # 1e-6 guards against 0.6 * 100 = 59.99999: the budget must not depend on the rounding of a decimal
        return int((1 - ratio) * model.targets + 1e-6)
    if (bits := amounts.get("bits")) is not None:
        if bits >= 8 * model.element:
            raise BudgetError(
                f"bits: {bits:g} per weight is no compression: the checkpoint has {8 * model.element}.",
                f"Give less than {8 * model.element}, such as --bits {4 * model.element} (ratio 0.5).",
            )
        budget = int(bits * model.numel / 8 + 1e-6)
        left = 8 * model.kept / model.numel
        return _above_kept(budget, model.kept, f"bits: {bits:g} per weight", f"{left:.2f} bits of every target's weight")
    if (size := amounts.get("size")) is not None:
        if size >= model.whole + model.headers:
            raise BudgetError(
                f"size: {readable(size)} is no compression: the model takes {readable(model.whole)}.",
                "Give a smaller size; check its unit (MB, GB).",
            )
        stays = model.beside + model.kept
        if size <= stays:
            raise BudgetError(
                f"size: {readable(size)} is less than what stays as it is: {readable(stays)} "
                f"({readable(model.beside)} of embeddings, norms, head and headers, {readable(model.kept)} of targets that "
                "stay dense).",
                f"Give more than {readable(stays)}; the other targets take {readable(model.open)} more when dense.",
            )
        return min(size - model.beside, model.targets - model.gone_targets)
    return None


def _above_kept(budget: int, kept: int, asked: str, meaning: str) -> int:
    if budget <= kept:
        raise BudgetError(
            f"{asked} is less than what the recipe keeps dense or has no smaller form for ({readable(kept)}, {meaning}).",
            "Raise the budget, or keep fewer targets.",
        )
    return budget


def share_of(budget: int, model: Footprint) -> float:
    """The fraction of its bytes that every open target gives up so that all targets take `budget` bytes; at least 0."""
    return max(0.0, 1 - (budget - model.kept) / model.open) if model.open else 0.0


def readable(nbytes: float) -> str:
    """A number of bytes in decimal units, such as '300.0 MB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"
