"""The schema of `lrc.json`: what every reader of a finished artifact may rely on."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ...errors import CheckpointError, brief, problem

_LONGEST_NAME = 255  # bytes, of every file system in use
_LONGEST_PATH = 4096


def plain_name(name: str) -> str:
    """The name, if it is that of a file in a folder.

    Raises:
        ValueError: it leads elsewhere, or no file can have it.
    """
    if PurePosixPath(name).name != name or name == "..":
        raise ValueError(f"'{brief(name)}' is not the name of a file in this folder")
    return inner_path(name)


def inner_path(name: str) -> str:
    """The path, if it leads to a file below a folder.

    Raises:
        ValueError: as for `plain_name`.
    """
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(f"'{brief(name)}' leads out of its folder")
    if len(name.encode(errors="replace")) > _LONGEST_PATH or any(
        len(p.encode(errors="replace")) > _LONGEST_NAME for p in path.parts
    ):
        raise ValueError(f"no file can have the name '{brief(name)}' of {len(name):,} characters")
    return name


Size = Annotated[int, Field(ge=0, lt=1 << 63)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
PlainName = Annotated[str, AfterValidator(plain_name)]
InnerPath = Annotated[str, AfterValidator(inner_path)]


class _Part(BaseModel):
    # a later lrc may record more under the same schema number; what is here keeps its type
    model_config = ConfigDict(strict=True, extra="allow")


class _Calibration(_Part):
    provenance: list[dict[str, Any]]


class _Shard(_Part):
    sha256: Sha256
    nbytes: Size


class _Bytes(_Part):
    targets_before: Size
    targets_after: Size
    model_before: Size
    model_after: Size


class Record(_Part):
    """The content of `lrc.json`. Keys that no reader needs are not listed."""

    schema_: int = Field(alias="schema", ge=1)
    identity: dict[str, Any]
    calibration: _Calibration
    shards: dict[PlainName, _Shard]
    files: list[InnerPath]
    bytes: _Bytes
    sha256: dict[InnerPath, Sha256] = Field(default_factory=dict)
    ratio: float = 0.0
    ratio_of_whole_model: float = 0.0
    targets: list[dict[str, Any]] = Field(default_factory=list)
    depth: dict[str, Any] = Field(default_factory=dict)


def require_record(record: Any, path: Path) -> None:
    """Check the content of `lrc.json`.

    Raises:
        CheckpointError: a key is missing, or its value is none that lrc writes; the first one is named.
    """
    try:
        Record.model_validate(record)
    except ValidationError as error:
        raise CheckpointError(f"{path} is damaged, or not lrc's: {problem(error)}.", "Write the artifact again.") from error
