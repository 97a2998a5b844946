"""Progress of a command that reads a model layer by layer: a bar on a terminal, plain lines elsewhere; on the error stream."""

from __future__ import annotations

from ...model.events import Event, Noted
from ...model.machine.host_memory import peak_rss
from ...plan.budget import readable
from ..common.console import advance, bar_of, messages


class Steps:
    """Shows events while the context is open.

    Args:
        first: what is done before the first event.
    """

    def __init__(self, first: str) -> None:
        self._console = messages()
        self._bar = bar_of(self._console)
        self._task = self._bar.add_task(first, total=None)

    def __enter__(self) -> Steps:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, Noted):
            self._console.print(f"note: {event.stage}")
        elif self._console.is_terminal and event.total:
            advance(self._bar, self._task, event.stage, event.done, event.total)
        elif event.done or not event.total:  # a bar says what begins, lines say what is done
            place = f" {event.done:>3}/{event.total}" if event.done else ""
            self._console.print(f"{event.stage}{place}  {event.seconds:.1f} s, peak {readable(peak_rss())}")
