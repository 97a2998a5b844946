"""From text to windows of tokens: tokenising, the tokens before a text, random windows, the division of a mix, the hash."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import CalibrationError
from .readers import drawn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 4_000_000  # characters of one call of the tokenizer, which takes some 330 bytes of memory per token


def divide(samples: int, weights: Sequence[float]) -> list[int]:
    """Divide `samples` by weight, largest remainder first; the parts add up to `samples`."""
    shares = [samples * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i], i))
    for i in by_remainder[: samples - sum(counts)]:
        counts[i] += 1
    return counts


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """The tokens of a text, without the special tokens that the tokenizer adds.

    A text of more than `CHUNK` characters is tokenised in pieces that end with a line. This bounds the memory, and can change
    the tokens where two pieces meet.

    Returns:
        (tokens,) int64.
    """
    pieces, start = [], 0
    while start < len(text):
        end = start + CHUNK
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
            end = end if end > start else start + CHUNK
        # verbose=False: no warning that the text is longer than the model's context; it is cut into windows later
        encoded = tokenizer(text[start:end], add_special_tokens=False, return_attention_mask=False, verbose=False)
        pieces.append(torch.tensor(encoded["input_ids"], dtype=torch.int64))
        start = end
    return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64)


def text_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer itself puts in front of a text: BOS, several, or none. Found by tokenising."""
    bare, full = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    for i in range(len(full) - len(bare) + 1):
        if full[i : i + len(bare)] == bare:
            return list(full[:i])
    raise CalibrationError(f"The tokenizer turns 'a' into {bare}, but into {full} with its special tokens.", "It is damaged.")


def token_hash(tokens: torch.Tensor) -> str:
    """sha256 of a tensor's shape and its token ids (as little-endian int64)."""
    digest = hashlib.sha256(repr(tuple(tokens.shape)).encode())
    digest.update(np.ascontiguousarray(tokens.cpu().numpy(), dtype="<i8").tobytes())
    return digest.hexdigest()


def windows_of(ids: torch.Tensor, samples: int, length: int, seed: int) -> tuple[torch.Tensor, bool]:
    """Cut `samples` windows out of one stream of tokens at random places that the seed decides.

    Where the stream is long enough, the windows share no token: a grid of windows at a random offset, drawn without
    replacement. Otherwise each starts anywhere, and they may overlap.

    Args:
        ids: (tokens,) with at least `length`.

    Returns:
        (samples, length), and whether windows may overlap.
    """
    generator = random.Random(seed)
    spare = len(ids) - samples * length
    if spare >= 0:
        offset = generator.randrange(min(length, spare + 1))
        places = islice(drawn((len(ids) - offset) // length, generator.getrandbits(32)), samples)
        starts = [offset + place * length for place in places]
    else:
        starts = [generator.randrange(len(ids) - length + 1) for _ in range(samples)]
    return torch.stack([ids[start : start + length] for start in starts]), spare < 0


def derived_seed(seed: int, name: int | str) -> int:
    """A separate seed (32 bits) for one part of what `seed` decides."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "little")
