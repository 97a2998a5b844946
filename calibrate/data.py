"""Calibration tokens and evaluation text: named sources, packing, provenance.

`load_calibration` turns a `CalibrationSpec` into (samples, length) tokens, the same for the same text, tokenizer and seed on
any machine. One long text (`text:`, `wikitext2`, `ptb`) is tokenised whole and cut at random starts, as the papers do (GPTQ,
arXiv:2210.17323, and its successors); documents are shuffled and concatenated, with EOS between them.
`evaluation_text` returns the text that perplexity is measured on, and `same_text` says whether both read the same text.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import jinja2
import pydantic
import torch

from ..errors import CalibrationError, RequestError, did_you_mean
from .files.columns import Document
from .files.long_text import PIECE
from .packing import derived_seed, divide, text_prefix, token_hash, token_ids, windows_of
from .readers import drawn, language_reference
from .sources import (
    HELD_OUT,
    NAMED,
    SHAPES,
    STREAMS,
    TOPICS,
    Source,
    open_documents,
    parse_mix,
    parse_source,
    read_stream,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Generate = Callable[[int, int, int], torch.Tensor]
WRITTEN_TOGETHER = 8  # samples that the model generates in one batch
C4_DOCUMENTS = 1100  # documents of C4's first validation shard that the papers evaluate on
EVALUATION_CHARACTERS = 1 << 25  # of a source made of documents: some 4,000 windows of 2,048 tokens


class WeightedSource(pydantic.BaseModel):
    """One source of a mix and its share of the samples, relative to the other weights."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    source: str
    weight: float = pydantic.Field(default=1.0, gt=0, allow_inf_nan=False)


class CalibrationSpec(pydantic.BaseModel):
    """The tokens that statistics are collected on.

    Attributes:
        source: one source (see `sources`), a mix written `wikitext2*0.5+pydoc*0.5`, or a list of weighted sources.
        samples: number of windows.
        length: tokens per window, BOS included.
        seed: chooses windows, order of documents, order of a mix.
        held_out: further windows, of which no statistics are collected; refinement stops by the loss on them, and searches
            choose by it.
        chat: wrap each document as a user's turn in the tokenizer's chat template; rows that are conversations are
            rendered as they are. For sources made of documents.

    Raises:
        pydantic.ValidationError: an unknown key or source (with the nearest known one), a value out of range.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    source: str | tuple[WeightedSource, ...]
    samples: int = pydantic.Field(default=128, ge=1)
    length: int = pydantic.Field(default=2048, ge=2)
    seed: int = 0
    held_out: int = pydantic.Field(default=0, ge=0)
    chat: bool = False

    @pydantic.field_validator("source")
    @classmethod
    def _sources_can_be_read(cls, source: str | tuple[WeightedSource, ...]) -> str | tuple[WeightedSource, ...]:
        try:
            names = [part.text for part, _ in _parts(source)]
        except RequestError as error:
            raise ValueError(" ".join(str(error).split("\n"))) from None
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"a mix holds {', '.join(sorted(twice))} twice; add up the weights")
        return source

    @pydantic.model_validator(mode="after")
    def _chat_has_documents(self) -> CalibrationSpec:
        parts = self.parts()
        if self.chat and (whole := [source.text for source, _ in parts if source.kind in (*STREAMS, "self")]):
            raise ValueError(
                f"chat wraps documents, and {', '.join(whole)} is not made of documents; "
                f"take {SHAPES['jsonl']}, {SHAPES['csv']}, {SHAPES['parquet']}, {SHAPES['hf']}, c4, pile or pydoc"
            )
        return self

    def parts(self) -> list[tuple[Source, float]]:
        """The sources and their weights.

        Raises:
            RequestError: a source cannot be read as one; no source; a weight of zero.
        """
        return _parts(self.source)

    def divided(self, windows: int) -> list[int]:
        """The number of windows that each source gets out of `windows`."""
        return divide(windows, [weight for _, weight in self.parts()])

    def self_written(self, windows: int) -> int:
        """The number of windows, out of `windows`, that the model itself generates."""
        each = zip(self.parts(), self.divided(windows), strict=True)
        return sum(count for (source, _), count in each if source.kind == "self")


def _parts(source: str | tuple[WeightedSource, ...]) -> list[tuple[Source, float]]:
    pairs = parse_mix(source) if isinstance(source, str) else [(part.source, part.weight) for part in source]
    if not pairs:
        raise RequestError("The list of calibration sources is empty.", "Name at least one.")
    if zero := [name for name, weight in pairs if weight <= 0]:
        raise RequestError(f"The weight of {', '.join(zero)} is zero.", "Leave it out, or give it a weight.")
    return [(parse_source(name), weight) for name, weight in pairs]


@dataclass(frozen=True)
class Calibration:
    """Calibration tokens.

    Attributes:
        tokens: (samples, length) int64 on the CPU.
        hash: sha256 of the shape and the token ids.
        held_out: (windows, length) of the same sources, no token of which is among `tokens`.
        provenance: per source: source, split, dataset (of the hub, else absent), sha256 of the text that was read (of the
            whole file for local files), weight, documents, samples, and `overlap`: whether windows may share tokens
            because the text is short.
        source: of each sample, the index of its entry in `provenance`; empty where there is one source.
    """

    tokens: torch.Tensor
    hash: str
    provenance: tuple[dict[str, Any], ...]
    held_out: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))
    source: tuple[int, ...] = ()

    def few(self, samples: int, length: int) -> torch.Tensor:
        """The first `length` tokens of `samples` evenly spread samples; each source has its share of them, and at least one."""
        of = self.source or (0,) * len(self.tokens)
        members = {source: [index for index, its in enumerate(of) if its == source] for source in sorted(set(of))}
        more = divide(max(0, samples - len(members)), [len(each) for each in members.values()])
        taken: list[int] = []
        for each, extra in zip(members.values(), more, strict=True):
            count = min(1 + extra, len(each))
            taken += [each[number * len(each) // count] for number in range(count)]
        return self.tokens[taken, :length]


NO_TEXT = Calibration(torch.empty(0, 2, dtype=torch.int64), "", ())  # for recipes that need no calibration


@dataclass(frozen=True)
class EvaluationText:
    """Text to evaluate on; `protocol` says how it was put together, `provenance` is as in `Calibration`."""

    text: str
    protocol: str
    provenance: tuple[dict[str, Any], ...]


def load_calibration(
    spec: CalibrationSpec, tokenizer: PreTrainedTokenizerBase, generate: Generate | None = None
) -> Calibration:
    """Read, tokenise and cut the calibration text.

    If the tokenizer itself puts tokens (BOS) in front of a text, every sample begins with them and BOS appears nowhere else,
    unless it is the end-of-text token as well.

    Args:
        spec: what to read.
        tokenizer: of the model.
        generate: (samples, length, seed) -> (samples, length) tokens, written by the model itself; for `self`.

    Raises:
        CalibrationError: a source is not available, is damaged, empty or too short; `self` without `generate`; chat without a
            chat template.
        RequestError: a source of the mix would get no sample.
    """
    parts = spec.parts()
    counts = spec.divided(spec.samples)
    if 0 in counts:
        starved = parts[counts.index(0)]
        share = starved[1] / sum(weight for _, weight in parts)
        raise RequestError(
            f"Of {spec.samples} samples, none falls to {starved[0].text} (share {share:.3g}).",
            f"Take at least {math.ceil(1 / share)} samples, or leave it out.",
        )
    extra = spec.divided(spec.held_out)
    reader = _Reader(spec, tokenizer)
    tokens, apart, provenance = [], [], []
    for i, ((source, weight), count, more) in enumerate(zip(parts, counts, extra, strict=True)):
        seed = derived_seed(spec.seed, i)  # from its number, not its name: the windows must not depend on a path
        if source.kind == "self":
            windows, facts = _generated(generate, count + more, spec.length, seed)
        else:
            windows, facts = reader.read(source, count + more, seed)
        if more and facts["overlap"]:
            raise CalibrationError(
                f"{source.text} is too short for {count} samples and {more} held-out windows of {spec.length:,} tokens that "
                "share none.",
                "Take fewer samples, a shorter length, or more text.",
            )
        tokens.append(windows[:count])
        apart.append(windows[count:])
        provenance.append({**source.facts, **facts, "weight": weight, "samples": count})
    result = torch.cat(tokens)
    order = list(range(len(result)) if len(parts) == 1 else drawn(len(result), derived_seed(spec.seed, "order")))
    origin = [i for i, count in enumerate(counts) for _ in range(count)]
    result = result[order].contiguous()
    return Calibration(result, token_hash(result), tuple(provenance), torch.cat(apart), tuple(origin[index] for index in order))


class _Reader:
    """Reads sources for one spec and one tokenizer."""

    def __init__(self, spec: CalibrationSpec, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.length, self.chat = tokenizer, spec.length, spec.chat
        self.prefix = torch.tensor(text_prefix(tokenizer), dtype=torch.int64)
        self.eos: int | None = tokenizer.eos_token_id
        if spec.chat and not tokenizer.chat_template:
            raise CalibrationError("chat is asked for, but the tokenizer has no chat template.", "Leave chat out.")
        if len(self.prefix) >= spec.length:
            raise CalibrationError(f"length {spec.length} leaves no room beside the {len(self.prefix)} tokens before a text.")

    def read(self, source: Source, samples: int, seed: int) -> tuple[torch.Tensor, dict[str, Any]]:
        """(samples, length) tokens of one source, and what was read."""
        body = self.length - len(self.prefix)
        if source.kind in STREAMS:
            text, facts = read_stream(source, seed)
            ids = self._inner(text)
        else:
            ids, facts = self._packed(source, samples * body, seed)
        if len(ids) < self.length + 1:
            raise CalibrationError(
                f"{source.text} holds {len(ids):,} tokens; a sample of length {self.length:,} needs {self.length + 1:,}.",
                f"Take more text, or a length of at most {max(len(ids) - 1, 0):,}.",
            )
        if source.kind in STREAMS or len(ids) < samples * body:
            windows, overlap = windows_of(ids, samples, body, seed)
        else:
            windows, overlap = ids[: samples * body].view(samples, body), False
        return torch.cat([self.prefix.expand(samples, -1), windows], dim=1), {**facts, "overlap": overlap}

    def _packed(self, source: Source, wanted: int, seed: int) -> tuple[torch.Tensor, dict[str, Any]]:
        documents, facts = open_documents(source, seed)
        pieces: list[torch.Tensor] = []
        digest, count, tokens = hashlib.sha256(), 0, 0
        end = torch.tensor([] if self.eos is None else [self.eos], dtype=torch.int64)
        for document in documents:
            text = self._rendered(document, source)
            digest.update(text.encode(errors="surrogatepass") + b"\0")
            ids = self._inner(text)
            if not torch.equal(ids[-1:], end):  # a chat template may end with EOS itself
                ids = torch.cat([ids, end])
            pieces.append(ids)
            count, tokens = count + 1, tokens + len(ids)
            if tokens >= wanted:
                break
        if not count:
            raise CalibrationError(f"{source.text} holds no text: every document is empty.")
        return torch.cat(pieces), {"sha256": digest.hexdigest(), **facts, "documents": count}

    def _inner(self, text: str) -> torch.Tensor:
        """Tokens of a text without any BOS: a literal '<s>' in it, or one from the chat template, would be one."""
        ids = token_ids(self.tokenizer, text)
        special = [token for token in self.prefix.tolist() if token != self.eos]
        return ids[~torch.isin(ids, torch.tensor(special, dtype=torch.int64))] if special else ids

    def _rendered(self, document: Document, source: Source) -> str:
        if not self.chat:
            if isinstance(document, str):
                return document
            raise CalibrationError(f"{source.text} holds conversations.", "Set chat, or name a field with text.")
        turns = [{"role": "user", "content": document}] if isinstance(document, str) else document
        try:
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False))
        except jinja2.TemplateError as error:
            raise CalibrationError(
                f"{source.text}: the tokenizer's chat template refuses a conversation: {error}",
                "Mend that row, or leave chat out.",
            ) from None


def _generated(generate: Generate | None, samples: int, length: int, seed: int) -> tuple[torch.Tensor, dict[str, Any]]:
    if generate is None:
        raise CalibrationError("Source self is text that the model writes, and no model is at hand here.", "Take pydoc.")
    tokens = generate(samples, length, seed)
    if tokens.shape != (samples, length):
        raise ValueError(f"generate({samples}, {length}, {seed}) gave {tuple(tokens.shape)}")
    tokens = tokens.to("cpu", torch.int64)
    return tokens, {"sha256": token_hash(tokens), "documents": samples, "overlap": False}


def evaluation_text(name: str) -> EvaluationText:
    """The text that a perplexity is measured on, put together as the papers do.

    Args:
        name: `wikitext2` (raw, test, rows joined by an empty line), `ptb` (test, joined by a space), `c4` (first 1,100
            documents of the first validation shard, joined by a space), `text:PATH`, or `jsonl:`, `json:`, `csv:`,
            `parquet:`, `hf:` (split test unless named; documents joined by an empty line, up to `EVALUATION_CHARACTERS`);
            or `pydoc-topics` (the language reference that comes with Python, joined by an empty line).

    Raises:
        RequestError: no such evaluation text.
        CalibrationError: it is not available, is damaged or is empty.
    """
    if name == TOPICS:
        text, facts, how = language_reference()
        return EvaluationText(text, f"{name}, {how}", ({"source": name, "split": None, **facts, "weight": 1.0},))
    kind = name.partition(":")[0]
    if kind not in HELD_OUT and (kind not in SHAPES or kind == name):
        if kind in (*NAMED, "self", "pydoc"):
            known = ", ".join([*HELD_OUT, TOPICS])
            raise RequestError(f"'{name}' has no held-out text to evaluate on.", f"Known: {known}, text:PATH.")
        raise RequestError(
            f"No evaluation text is called '{name}'.", did_you_mean(name, [*HELD_OUT, TOPICS, *(f"{kind}:" for kind in SHAPES)])
        )
    source = parse_source(name, split="test")
    if kind in HELD_OUT:
        source = replace(source, hub=HELD_OUT[kind])
    if source.kind in STREAMS:
        text, facts = read_stream(source)
        how = f"{facts['documents']} rows joined by {source.hub.joiner!r}" if source.hub else "whole file"
        if "pieces" in facts:
            how = f"the first {facts['pieces']} of {facts['of']} pieces of {PIECE:,} characters"
    else:
        text, facts, how = _joined(source)
    split = f" {source.hub.split}" if source.hub else ""
    return EvaluationText(text, f"{source.text}{split}, {how}", ({**source.facts, **facts, "weight": 1.0},))


def _joined(source: Source) -> tuple[str, dict[str, Any], str]:
    documents, facts = open_documents(source, seed=None)
    joiner = source.hub.joiner if source.hub else "\n\n"
    texts: list[str] = []
    characters, cut = 0, ""
    for document in documents:
        if not isinstance(document, str):
            raise CalibrationError(f"{source.text} holds conversations.", "Name a field with text.")
        if (source.kind == "c4" and len(texts) == C4_DOCUMENTS) or characters > EVALUATION_CHARACTERS:
            cut = "the first "
            break
        texts.append(document)
        characters += len(document)
    text = joiner.join(texts)
    if not text.strip():
        raise CalibrationError(f"{source.text} holds no text: {len(texts)} documents, all blank.")
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    return text, {"sha256": digest, **facts, "documents": len(texts)}, f"{cut}{len(texts)} documents joined by {joiner!r}"


def same_text(calibration: Iterable[dict[str, Any]], evaluation: Iterable[dict[str, Any]]) -> str | None:
    """Why a calibration and an evaluation read the same text, in words; None if nothing says that they do.

    Two texts are the same if their contents hash to the same (whatever the files are called), or if they are the same split
    of the same data set.

    Args:
        calibration: the provenance of a `Calibration`.
        evaluation: the provenance of an `EvaluationText`.
    """
    others = list(evaluation)
    for one in calibration:
        for other in others:
            if one["sha256"] == other["sha256"]:
                return f"{one['source']} and {other['source']} are the same text (sha256 {one['sha256'][:12]}…)"
            if "dataset" in one and "dataset" in other and _same_split(one, other):
                return f"{one['source']} and {other['source']} are both {other['dataset']}, split {other['split']}"
    return None


def _same_split(one: dict[str, Any], other: dict[str, Any]) -> bool:
    def plain(facts: dict[str, Any]) -> tuple[str, str]:
        return facts["dataset"], re.sub(r"\[.*", "", facts["split"])  # train[:10%] is train

    (name, split), (other_name, other_split) = plain(one), plain(other)
    if "/" not in name.partition(":")[0] or "/" not in other_name.partition(":")[0]:
        name, other_name = name.split("/")[-1], other_name.split("/")[-1]  # wikitext is an old name of Salesforce/wikitext
    return (name, split) == (other_name, other_split)
