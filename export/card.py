"""The model card of an export."""

from __future__ import annotations

import re

from .base import LOADING, Format


def export_card(form: Format) -> str:
    """The text of README.md: the result's own card, with another section about loading, and what this export is."""
    card = form.source.folder / "README.md"
    held = card.read_text() if card.is_file() else ""
    before, found, after = held.partition(LOADING)
    if not found:  # a card of an older lrc: everything up to its code
        before, after = held.partition("```python")[0], ""
    rest = re.search(r"^## (?!Load)", after, re.MULTILINE)
    lost = "".join(f"* {sentence}\n" for sentence in form.drawing.lost)
    return (
        f"""{before.rstrip()}

## This export

{form.about[0].upper()}{form.about[1:]} (`lrc export --to {form.name}`). It opens without lrc: {form.opened_by}.

{lost}
```
pip install {" ".join(form.drawing.needs)}
```

{form.loading()}

{after[rest.start() :] if rest else ""}""".rstrip()
        + "\n"
    )
