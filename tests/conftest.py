"""What every test stands on: no network, no cache of the user's, one thread, and tiny checkpoints made once per session."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# `python -m pytest` in the repository puts it on the path, and there `evaluate.py` hides the package evaluate that lm-eval
# imports, `cuda/` another one. The package is imported as lrc, never by its files' bare names.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

# Before anything imports huggingface_hub, which reads these once.
_hub_home = tempfile.TemporaryDirectory(prefix="lrc-test-hub-")
os.environ["HF_HOME"] = _hub_home.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest  # noqa: E402
import torch  # noqa: E402
from tiny import tiny_text, write_tiny  # noqa: E402


class RootIsNoTestPackage:
    """Collect the repository's root as a plain folder.

    It holds the `__init__.py` of lrc, which pytest would otherwise import a second time under the name of the folder that the
    repository happens to lie in, and fail at its relative imports.
    """

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(RootIsNoTestPackage())
    torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        pytest.skip(f"needs a CUDA device, and there is none (torch {torch.__version__}, {build})")


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function `(family, **changes) -> folder`: a tiny checkpoint on disk, written once per session and arguments.

    `changes` are those of `tiny.write_tiny`. The folder is shared: a test that alters it copies it first.
    """
    written: dict[str, Path] = {}

    def tiny_checkpoint(family: str, **changes: object) -> Path:
        key = f"{family} {sorted(changes.items())}"
        if key not in written:
            written[key] = write_tiny(tmp_path_factory.mktemp(family), family, **changes)
        return written[key]

    return tiny_checkpoint


@pytest.fixture(scope="session")
def tiny_text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of 20,000 words that the tiny tokenizer knows."""
    file = tmp_path_factory.mktemp("text") / "tiny.txt"
    file.write_text(tiny_text(20_000), encoding="utf-8")
    return file
