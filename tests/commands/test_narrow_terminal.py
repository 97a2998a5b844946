"""On a terminal of 60 columns, lines end between words; elsewhere they are as long as they are."""

from __future__ import annotations

import pytest
from commandline import run_lrc

COMMANDS = {
    "messages": [
        "plan",
        "nowhere",
        "--recipe",
        "svd-lm",
        "--ratio",
        "3",
        "--calibration",
        "text:no-such-folder/no-such-text.txt",
    ],
    "doctor": ["doctor"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_lines_end_between_words(name, monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    whole = run_lrc(*COMMANDS[name]).printed
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "0")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    narrow = run_lrc(*COMMANDS[name]).printed
    assert max(map(len, narrow.splitlines())) <= 60 < max(len(line.rstrip()) for line in whole.splitlines())
    for line in narrow.splitlines():
        assert _words(line) <= _words(whole), line


def _words(text: str) -> set[str]:
    """Its words without numbers: free memory differs from one call to the next."""
    return {word for word in text.split() if not any(letter.isdigit() for letter in word)}
