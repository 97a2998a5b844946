"""What engines call at their start: entry points, which register lrc where the engine's version was tested.

An engine serves other models too, so nothing here fails because lrc does not know the engine: a version that was not tested
still gets the method `lrc`, which refuses every result by name.
"""

from __future__ import annotations

from typing import Any

from ..errors import RequestError

METHOD = "lrc"
VLLM = ("0.32.0",)
SGLANG = ("0.5.23",)


def vllm() -> None:
    """Register lrc with vLLM; calling it again changes nothing."""
    from vllm import __version__ as version
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    if _plain(version) in VLLM:
        from .vllm import LrcConfig

        register_quantization_config(METHOD)(LrcConfig)
    else:
        register_quantization_config(METHOD)(_refusing(QuantizationConfig, "vLLM", version, VLLM, "vllm"))


def sglang() -> None:
    """Register lrc with SGLang; calling it again changes nothing."""
    from sglang.srt.layers import quantization
    from sglang.srt.layers.quantization.base_config import QuantizationConfig
    from sglang.version import __version__ as version

    found: Any = _refusing(QuantizationConfig, "SGLang", version, SGLANG, "sglang")
    if _plain(version) in SGLANG:
        from .sglang import LrcConfig

        found = LrcConfig
    for methods in ("BASE_QUANTIZATION_METHODS", "QUANTIZATION_METHODS", "CPU_QUANTIZATION_METHODS"):
        getattr(quantization, methods)[METHOD] = found


def _plain(version: str) -> str:
    return version.partition("+")[0]


def _refusing(base: Any, engine: str, version: str, tested: tuple[str, ...], package: str) -> Any:
    """A quantization configuration that refuses every result.

    Args:
        base: the engine's base class.
        engine, version: the engine that was found.
        tested: the versions that were tested.
        package: as pip names it.
    """

    def from_config(cls: type, config: dict[str, Any]) -> Any:
        raise RequestError(
            f"lrc's plugin was tested with {engine} {' and '.join(tested)}; this is {version}.",
            f"pip install {package}=={tested[-1]}, or export the result: lrc export OUT --to dense.",
        )

    unused = {name: lambda *_: None for name in base.__abstractmethods__}
    return type("LrcRefused", (base,), unused | {"from_config": classmethod(from_config)})
