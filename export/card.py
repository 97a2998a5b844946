"""The model card of an export."""

from __future__ import annotations

from .base import Format


def export_card(form: Format) -> str:
    """The text of README.md: the result's own card, and what this export is."""
    card = form.source.folder / "README.md"
    held = card.read_text() if card.is_file() else ""
    lost = "".join(f"* {sentence}\n" for sentence in form.drawing.lost)
    needs = " ".join(form.drawing.needs)
    body = held.partition("```python")[0].rstrip()
    return f"""{body}

## This export

{form.about[0].upper()}{form.about[1:]} (`lrc export --to {form.name}`). It opens without lrc: {form.opened_by}.

{lost}
```
pip install {needs}
```

{form.usage()}"""
