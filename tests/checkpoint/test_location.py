"""Where a model may lie, and what a mistyped place is answered with."""

from __future__ import annotations
