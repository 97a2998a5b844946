"""Whether a calibration set can be had at all, before a model is read: files are there and hold text, the hub answers.

Only the beginning of a file is read. What is wrong further in is found when the text is read.
"""

from __future__ import annotations

import codecs
import os
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from ..errors import CalibrationError, together
from .data import CalibrationSpec
from .files.opening import opened, wrong_byte
from .readers import OFFLINE, HubData, TransportError
from .sources import Source, existing

_HEAD = 1 << 16
_PATIENCE = 1.5  # seconds; a hub that answers later is asked again, for longer, when the text is read


def require_available(spec: CalibrationSpec, hub: bool = True) -> None:
    """Refuse a calibration set of which a source is missing, empty, no text, or on a hub that is out of reach.

    Args:
        hub: look at data sets of the hub, too.

    Raises:
        CalibrationError: one source is not there.
        RequestError: several are not.
    """
    with together() as check:
        for source, _ in spec.parts():
            if hub or source.hub is None:
                check(_require, source)


def _require(source: Source) -> None:
    if source.hub is not None:
        _require_reachable(source.hub)
    elif source.path is not None:
        path = existing(source)
        if path.stat().st_size == 0:
            raise CalibrationError(f"{source.text}: {path} is empty.", "Name a file with text in it.")
        if source.kind == "parquet":
            _require_parquet(path)
        else:
            _require_text(source, path)


def _require_text(source: Source, path: Path) -> None:
    with opened(path) as file:  # refuses a zero byte
        head = file.read(_HEAD)
        more = bool(file.read(1))
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head, final=not more)
    except UnicodeDecodeError:
        raise wrong_byte(path) from None
    if not more and not text.strip():
        raise CalibrationError(f"{source.text} holds no text ({len(text):,} characters, all blank).", "Name another file.")


def _require_parquet(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(4) != b"PAR1":
            raise CalibrationError(
                f"{path} is no parquet file: its first bytes are others.", "Name a parquet file, or text:PATH."
            )


def _require_reachable(hub: HubData) -> None:
    if Path(hub.name).is_dir() or _has_cached(hub.name):
        return
    name = ":".join(filter(None, (hub.name, hub.config)))
    silence = "offline mode is set" if constants.HF_HUB_OFFLINE else ""
    if not silence:
        try:
            huggingface_hub.HfApi().dataset_info(hub.name, timeout=_PATIENCE)
        except RepositoryNotFoundError:
            raise CalibrationError(
                f"The hub has no data set '{hub.name}', or it is private.", "Check the name; log in with `hf auth login`."
            ) from None
        except HfHubHTTPError:
            return  # it answers: gated, or busy
        except (OSError, TransportError) as error:
            if "timeout" in type(error).__name__.lower():
                return
            silence = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    if silence:
        raise CalibrationError(
            f"Data set '{name}' ({hub.split}) is not available: the hub does not answer ({silence}) and the cache has no copy.",
            OFFLINE,
        )


def _has_cached(name: str) -> bool:
    """Whether the hub's cache, or that of `datasets`, knows the data set."""
    hub = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}"
    prepared = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    return hub.is_dir() or any(
        entry.name.lower() == name.replace("/", "___").lower() for entry in (prepared.iterdir() if prepared.is_dir() else ())
    )
