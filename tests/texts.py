"""Texts for tests of what is read, written and cut."""

from __future__ import annotations

import json
from pathlib import Path

from tiny import tiny_text


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def numbered(count: int) -> list[str]:
    return [f"{i} {tiny_text(20, seed=i)}" for i in range(count)]


def decoded(tokenizer, calibration) -> str:
    return tokenizer.decode(calibration.tokens.flatten().tolist())
