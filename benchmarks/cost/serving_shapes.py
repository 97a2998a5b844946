"""How fast compressed models answer, beside the dense one, at the layer shapes of a model of any size.

    python benchmarks/cost/serving_shapes.py [--shapes llama-7b] [--kinds low-rank,narrow,4bit] [--layers 4] [--vocabulary 2048]
                                        [--dtype bfloat16]
                                        [--prefill 128,512] [--decode 1,8] [--rounds 5] [--busy] [--json FILE]

Nothing is calibrated: factors, codes and weights are random, because time depends on shapes alone. The model has a few layers
and a small vocabulary, so that the layers' share of a token is what it is in the whole model. Kinds:

* `low-rank`: every matrix as two factors that hold 60 % of its bytes (svd-llm at 0.4)
* `narrow`: feed-forwards with so many channels fewer that 60 % of the layers' bytes are left (narrow at 0.4)
* `mixed`: factored attention, feed-forwards with 60 % of their channels (lrc-fast at 0.4 without its measured sizes)
* `4bit`, `8bit`, `3bit` and so on: codes in groups of 64 with zeros (gptq, rtn)

With --busy one thread computes and its own CPU time is taken: on a machine that others use, wall time with several threads is
mostly waiting. Every kind takes turns with the dense model as in `lrc bench`, in one process; the dense model and one other are
in memory.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from lrc.compress.forms.base import build_module
from lrc.compress.forms.quantized import QuantizedLinear
from lrc.evaluation.speed import SpeedReport, SpeedSettings, described, in_turns

KEPT = 0.6  # of the bytes of the targets
SHAPES = {  # hidden, inner, heads, heads of keys and values
    "llama-7b": (4096, 11008, 32, 32),
    "smollm2-135m": (576, 1536, 9, 3),
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def dense(shape: tuple[int, int, int, int], layers: int, vocabulary: int, dtype: torch.dtype) -> Any:
    """A model with random weights."""
    hidden, inner, heads, pairs = shape
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=pairs,
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        dtype=dtype,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def compressed(kind: str, shape: tuple[int, int, int, int], layers: int, vocabulary: int, dtype: torch.dtype) -> Any:
    """The same model with random forms in place of its matrices."""
    hidden, inner, heads, pairs = shape
    if kind == "narrow":  # attention stays as it is, so feed-forwards give all
        attention = 2 * hidden * hidden * (1 + pairs / heads)
        inner = round((KEPT * (attention + 3 * hidden * inner) - attention) / (3 * hidden))
    if kind == "mixed":
        inner = round(KEPT * inner)
    model = dense((hidden, inner, heads, pairs), layers, vocabulary, dtype)
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, module in list(part.named_children()):
                if isinstance(module, nn.Linear) and not (kind == "narrow" or (kind == "mixed" and part is layer.mlp)):
                    setattr(part, name, form(kind, module, dtype))
    return model


def form(kind: str, module: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """A random form of a matrix."""
    rows, columns = module.weight.shape
    if kind.endswith("bit"):
        grid = {"bits": int(kind.removesuffix("bit")), "group_size": 64, "kind": "int", "symmetric": False}
        spec: dict[str, Any] = {"kind": "quantized", "grid": grid, "bias": False}
    else:
        spec = {"kind": "low-rank", "rank": int(KEPT * rows * columns / (rows + columns)), "bias": False}
    made = build_module(spec, columns, rows, dtype).eval().requires_grad_(False)
    for parameter in made.parameters():
        if parameter.dtype == torch.uint8:
            parameter.random_(0, 256)
        else:
            parameter.normal_(1e-3 if kind.endswith("bit") else 0, 1e-4 if kind.endswith("bit") else 0.02)
    if isinstance(made, QuantizedLinear):
        made.pack()
    return made


def printed(report: SpeedReport) -> None:
    """One line per workload."""
    own, base = report.speeds
    share = own.tensor_bytes / base.tensor_bytes
    print(f"{own.model}: {share:.0%} of the dense model's bytes, {report.threads} threads, {report.dtype}", flush=True)
    for workload in own.seconds:
        times = own.times_as_fast_as(base, workload)
        milliseconds = [f"{1000 * each.median(workload):9.1f}" for each in (base, own)]
        print(f"  {workload:12} dense {milliseconds[0]} ms, {own.model} {milliseconds[1]} ms: {times:5.2f} times", flush=True)
    for workload, reason in report.why_slower().items():
        print(f"  slower: {workload}: {reason}", flush=True)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, default="llama-7b")
    parser.add_argument("--kinds", default="low-rank,mixed,narrow,4bit")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--prefill", default="128,512")
    parser.add_argument("--decode", default="1,8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    prefill, decode = ([int(part) for part in text.split(",") if part] for text in (options.prefill, options.decode))
    settings = SpeedSettings(prefill, decode, options.rounds, time.thread_time if options.busy else time.perf_counter)
    if options.busy:
        torch.set_num_threads(1)
    size = (SHAPES[options.shapes], options.layers, options.vocabulary, DTYPES[options.dtype])
    base, reports = dense(*size), {}
    for kind in options.kinds.split(","):
        model = compressed(kind, *size)
        report = in_turns([described(kind, model), described("dense", base)], [model, base], settings)
        printed(report)
        reports[kind] = report.as_json()
    if options.json is not None:
        options.json.write_text(json.dumps(reports, indent=2) + "\n")


if __name__ == "__main__":
    main()
