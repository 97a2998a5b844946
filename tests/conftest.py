"""What every test stands on: no network, no cache of the user's, one thread, and tiny checkpoints made once per session."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# `python -m pytest` in the repository puts it on the path, and there `cuda/` hides the package cuda (cuda-bindings), which
# torch looks for on machines with a GPU. The package is imported as lrc, never by its files' bare names.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

# Before anything imports huggingface_hub, which reads these once.
_hub_home = tempfile.TemporaryDirectory(prefix="lrc-test-hub-")
os.environ["HF_HOME"] = _hub_home.name
os.environ["XDG_CACHE_HOME"] = str(Path(_hub_home.name) / "cache")  # checkpoints' hashes
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest  # noqa: E402
import torch  # noqa: E402
from commandline import contents, lrc_ok  # noqa: E402
from tiny import tiny_text, tiny_tokenizer, write_tiny  # noqa: E402
from transformers import PreTrainedTokenizerBase  # noqa: E402


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
    if item.get_closest_marker("engine") and not os.environ.get("LRC_ENGINE_PYTHON"):
        pytest.skip("needs vLLM in an environment of its own: make test-engines")


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


@pytest.fixture
def damaged(tiny_checkpoints: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a tiny Llama of two layers to damage."""
    return shutil.copytree(tiny_checkpoints("llama", num_hidden_layers=2), tmp_path / "damaged")


@pytest.fixture(scope="session")
def request_for(tiny_text_file: Path) -> Callable[..., list[object]]:
    """A function of (model, out, *more) that gives the command line of one compression."""

    def request(model: Path, out: Path, *more: object, text: Path = tiny_text_file) -> list[object]:
        sizes = ["--samples", 8, "--length", 48]
        told = ["--recipe", "svd-llm", "--ratio", 0.3, "--calibration", f"text:{text}"]
        return ["compress", model, "--out", out, *told, *sizes, *more]

    return request


@pytest.fixture(scope="session")
def uninterrupted(
    tiny_checkpoints: Callable[..., Path],
    request_for: Callable[..., list[object]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., dict[str, str]]:
    """The files that the request leaves of a tiny Llama of two layers when nothing disturbs it, by `propagate`."""
    made: dict[str, dict[str, str]] = {}

    def run(propagate: str = "original") -> dict[str, str]:
        if propagate not in made:
            out = tmp_path_factory.mktemp("uninterrupted") / "out"
            assert lrc_ok(*request_for(tiny_checkpoints("llama", num_hidden_layers=2), out, "--propagate", propagate))
            made[propagate] = contents(out)
        return made[propagate]

    return run


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A task of `lrc eval`: 400 words in a file of its own."""
    path = tmp_path / "some.folder" / "notes.txt"
    path.parent.mkdir()
    path.write_text(tiny_text(words=400), encoding="utf-8")
    return f"text:{path}"


@pytest.fixture
def no_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong request must be refused before the model runs."""
    monkeypatch.setattr(torch.nn.Embedding, "forward", lambda *_: pytest.fail("the model ran"))


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """Prose of 3000 words."""
    path = tmp_path / "prose.txt"
    path.write_text(tiny_text(3000))
    return path


@pytest.fixture(scope="session")
def plain() -> PreTrainedTokenizerBase:
    """A tokenizer that adds nothing to a text."""
    return tiny_tokenizer()
