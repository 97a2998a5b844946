"""What a report says: numbers from the record of a result and from files of `lrc eval`, with a schema of their own."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from ..compress.forms.base import Spec
from ..errors import RequestError, one_line
from ..run.result import Result

SCHEMA = 1
_LAYER = re.compile(r"^(?P<path>.*?)\.(?P<layer>\d+)\.(?P<role>.+)$")


@dataclass(frozen=True)
class TargetLine:
    """One matrix.

    Args:
        name: its path in the model.
        layer: the number of its layer in the original; None for one outside the layers.
        role: its path in the layer; numbers of experts are replaced by *.
        shape: (out, in).
        form: how it is stored, in words.
        rank: of its factors or of its correction; None where it has none.
        bits: stored bits per number of the original matrix, everything counted.
        bytes_before, bytes_after: bytes.
        error: relative error on the calibration set; None where none was measured.
        damping: relative to the mean diagonal of the gram.
        note: what the method said of it.
    """

    name: str
    layer: int | None
    role: str
    shape: tuple[int, int]
    form: str
    rank: int | None
    bits: float
    bytes_before: int
    bytes_after: int
    error: float | None
    damping: float
    note: str


@dataclass(frozen=True)
class Part:
    """Bytes of all matrices of one role, or of everything that is not compressed."""

    role: str
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Metric:
    """A measured value.

    Args:
        model: what was measured.
        metric: its full name.
        value: the number.
        stderr: standard error; None if it cannot be told.
        protocol: how it was measured, in one line.
    """

    model: str
    metric: str
    value: float
    stderr: float | None
    protocol: str


@dataclass(frozen=True)
class Report:
    """Everything that the page shows."""

    schema: int
    lrc: str
    result: str
    model: str
    architecture: str
    recipe: str
    bytes_before: int
    bytes_after: int
    ratio: float
    whole_ratio: float
    layers: int
    dropped_layers: list[int]
    forms: dict[str, int]
    parts: list[Part]
    targets: list[TargetLine]
    metrics: list[Metric]
    calibration: list[str]
    versions: dict[str, str]

    def as_json(self) -> str:
        """The content of report.json."""
        return json.dumps(self.as_data(), indent=2) + "\n"

    def as_data(self) -> dict[str, Any]:
        """The same content as data for JSON."""
        return asdict(self)


def gather(result: Result, evaluations: list[Path]) -> Report:
    """Read everything that the report says.

    Args:
        result: the finished result.
        evaluations: files that `lrc eval --json` wrote.

    Raises:
        CheckpointError: the record is damaged.
        RequestError: a file is none of `lrc eval --json`.
    """
    record = result.record
    targets = [_line(target) for target in result.targets]
    layers = [line.layer for line in targets if line.layer is not None]
    dropped = [int(number) for number in record.get("dropped_layers", [])]
    return Report(
        schema=SCHEMA,
        lrc=version("lrc"),
        result=result.folder.resolve().name,
        model=Path(record["model"]["name"]).name,
        architecture=record["model"]["type"],
        recipe=yaml.safe_dump(record["recipe"], sort_keys=False, allow_unicode=True),
        bytes_before=result.bytes_before,
        bytes_after=result.bytes_after,
        ratio=result.ratio,
        whole_ratio=result.whole_ratio,
        layers=max(layers, default=-1) + 1,
        dropped_layers=dropped,
        forms=dict(Counter(line.form.partition(",")[0] for line in targets)),
        parts=_parts(result, targets),
        targets=targets,
        metrics=[metric for file in evaluations for metric in _metrics(file)],
        calibration=[_source(each) for each in record.get("calibration", {}).get("provenance", [])],
        versions=record["versions"],
    )


def _line(target: Any) -> TargetLine:
    found = _LAYER.match(target.name)
    out, inside = target.shape[-2], target.shape[-1]
    form, rank = said(target.form)
    return TargetLine(
        name=target.name,
        layer=int(found["layer"]) if found else None,
        role=re.sub(r"\.\d+(?=\.|$)", ".*", found["role"] if found else target.name),
        shape=(out, inside),
        form=form,
        rank=rank,
        bits=8 * target.bytes_after / (out * inside),
        bytes_before=target.bytes_before,
        bytes_after=target.bytes_after,
        error=target.error,
        damping=target.damping,
        note=target.note,
    )


def said(spec: Spec) -> tuple[str, int | None]:
    """A form in words, and its rank where it has one."""
    kind = spec["kind"]
    if kind == "low-rank":
        return f"low rank, {spec['rank']}", int(spec["rank"])
    if kind == "quantized":
        return f"{spec['grid']['bits']}-bit codes, groups of {spec['grid']['group_size'] or 'a row'}", None
    if kind == "quantized-low-rank":
        corrected = int(spec["correction"]["rank"])
        return f"{spec['grid']['bits']}-bit codes and a correction, rank {corrected}", corrected
    if kind == "pruned":
        inner, rank = said(spec["form"])
        return f"pruned to {spec['rows']} × {spec['columns']}, {inner}", rank
    held = spec.get("rank")
    return kind.replace("-", " "), held if isinstance(held, int) else None


def _parts(result: Result, targets: list[TargetLine]) -> list[Part]:
    before, after = Counter[str](), Counter[str]()
    for line in targets:
        before[line.role] += line.bytes_before
        after[line.role] += line.bytes_after
    parts = [Part(role, before[role], after[role]) for role in before]
    rest = Part("not compressed", result.bytes_before - before.total(), max(result.bytes_after - after.total(), 0))
    return [*parts, rest]


def _source(given: dict[str, Any]) -> str:
    samples = f", {given['samples']} samples" if given.get("samples") else ""
    return f"{given['source']}{samples}"


def _metrics(file: Path) -> list[Metric]:
    """The values in a file of `lrc eval --json`, the baseline's first.

    Raises:
        RequestError: it is none.
    """
    try:
        content = json.loads(file.read_text())
        groups = [content["baseline"], content] if "baseline" in content else [content]
        return [
            Metric(Path(group["model"]).name, name, each["value"], each["stderr"], _protocol(each))
            for group in groups
            for name, each in group["results"].items()
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(
            f"{file} is no file of lrc eval --json: {one_line(error)}.", "Make it with: lrc eval OUT --json FILE"
        ) from error


def require_evaluation(file: Path) -> None:
    """Refuse a file that `lrc eval --json` did not write.

    Raises:
        RequestError: it is none.
    """
    _metrics(file)


def _protocol(result: dict[str, Any]) -> str:
    protocol = result["protocol"]
    known = ("windows", "length", "bos", "num_fewshot", "limit", "dtype")
    told = [f"{key} {protocol[key]}" for key in known if protocol.get(key) is not None]
    return ", ".join([*([f"{result['tokens']:,} tokens"] if result.get("tokens") else []), *told])
