"""lrc: post-training compression of language models.

    import lrc
    result = lrc.compress("MODEL", "lrc-fast", ratio=0.4, out="OUT")    # as `lrc compress`
    draft = lrc.plan("MODEL", "lrc-fast", ratio=0.4)                    # as `lrc plan`
    metrics = lrc.evaluate("OUT", "wikitext2")                          # as `lrc eval`

Importing this package is cheap: it loads neither torch nor transformers. It asks to be told when transformers' registry of
quantizers is imported, and registers lrc's own there, so that `import lrc` is all that a plain `from_pretrained` needs.
"""

import importlib
from importlib.metadata import version
from types import ModuleType
from typing import Any

import wrapt

__version__ = version("lrc")

# what a person calls -> where it is
_FUNCTIONS = {"compress": "run.pipeline", "plan": "run.pipeline", "evaluate": "evaluation.evaluate"}


class _Callable(ModuleType):
    """A folder of this package that bears a function's name, and can be called as that function.

    Python gives the package an attribute for each folder that is imported: `lrc.compress` is the folder of the methods, and
    `lrc.compress(...)` has to be the pipeline all the same.
    """

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return _function(self.__name__.rpartition(".")[2])(*arguments, **keywords)


def _function(name: str) -> Any:
    return getattr(importlib.import_module(f".{_FUNCTIONS[name]}", __name__), name)


def __getattr__(name: str) -> Any:
    if name not in _FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("compress", "plan"):
        return importlib.import_module(f".{name}", __name__)  # called through `_Callable`
    return _function(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_FUNCTIONS})


@wrapt.when_imported(f"{__name__}.compress")
@wrapt.when_imported(f"{__name__}.plan")
def _make_callable(module: ModuleType) -> None:
    module.__class__ = _Callable


@wrapt.when_imported("transformers.quantizers.auto")
def _register(_module: ModuleType) -> None:
    importlib.import_module(".checkpoint.hf_quantizer", __name__)  # registers itself at its end
