"""lrc: post-training compression of language models.

    import lrc
    result = lrc.compress("MODEL", "lrc-fast", ratio=0.4, out="OUT")    # as `lrc compress`
    draft = lrc.plan("MODEL", "lrc-fast", ratio=0.4)                    # as `lrc plan`
    metrics = lrc.evaluate("OUT", "wikitext2")                          # as `lrc eval`
    exported = lrc.export("OUT", "dense")                               # as `lrc export`
    config = lrc.lora_config(LoraConfig(...))                           # an adapter of PEFT on compressed modules

Importing this package is cheap: it loads neither torch nor transformers. When transformers imports its registry of quantizers,
an import hook registers lrc's quantizer there. A plain `from_pretrained` therefore needs nothing but `import lrc`.
"""

import importlib
from importlib.metadata import version
from types import ModuleType
from typing import Any

import wrapt

__version__ = version("lrc")

# public function -> the module that defines it
_FUNCTIONS = {"compress": "run.pipeline", "plan": "run.pipeline", "evaluate": "evaluation.evaluate",
              "export": "export.write", "lora_config": "model.adapters"}  # fmt: skip


class _Callable(ModuleType):
    """A subpackage with the name of a public function, which can be called as that function.

    Python sets an attribute of the package for each imported subpackage, so `lrc.compress` is the subpackage of the methods.
    `lrc.compress(...)` must run the pipeline nevertheless.
    """

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return _function(self.__name__.rpartition(".")[2])(*arguments, **keywords)


def _function(name: str) -> Any:
    return getattr(importlib.import_module(f".{_FUNCTIONS[name]}", __name__), name)


def __getattr__(name: str) -> Any:
    if name not in _FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("compress", "plan", "export"):
        return importlib.import_module(f".{name}", __name__)  # called through `_Callable`
    return _function(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_FUNCTIONS})


@wrapt.when_imported(f"{__name__}.compress")
@wrapt.when_imported(f"{__name__}.export")
@wrapt.when_imported(f"{__name__}.plan")
def _make_callable(module: ModuleType) -> None:
    module.__class__ = _Callable


@wrapt.when_imported("transformers.quantizers.auto")
def _register(_module: ModuleType) -> None:
    importlib.import_module(".checkpoint.hf_quantizer", __name__)  # registers itself at its end
