"""Peak memory of a streamed compression, measured beside what the plan predicted.

Builds a Llama with random weights (1.3 billion parameters in bfloat16 with the defaults), compresses it in a process of its
own with 16 × 512 calibration tokens, and prints the peak resident memory, the plan's prediction and the checkpoint's size.

    python benchmarks/cost/memory.py                 # 24 layers; about half an hour on two cores
    python benchmarks/cost/memory.py --layers 3      # the same layers, fewer of them
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from lrc.plan.budget import bytes_of

VOCABULARY = 32_000


def build(folder: Path, layers: int, hidden: int, intermediate: int) -> int:
    """Write the checkpoint shard by shard, so that building it takes little memory; returns its bytes."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=hidden // 128, num_key_value_heads=hidden // 128, max_position_embeddings=2048, dtype="bfloat16",
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).bfloat16()

    index: dict[str, str] = {}
    total = 0

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
        total += sum(t.numel() * t.element_size() for t in tensors.values())

    square, up, down = (hidden, hidden), (intermediate, hidden), (hidden, intermediate)
    for layer in range(layers):
        at = f"model.layers.{layer}"
        tensors = {f"{at}.self_attn.{name}_proj.weight": draw(*square) for name in "qkvo"}
        tensors |= {f"{at}.mlp.{name}_proj.weight": draw(*up) for name in ("gate", "up")}
        tensors[f"{at}.mlp.down_proj.weight"] = draw(*down)
        norms = ("input_layernorm", "post_attention_layernorm")
        tensors |= {f"{at}.{name}.weight": torch.ones(hidden, dtype=torch.bfloat16) for name in norms}
        write(f"layer-{layer:03d}.safetensors", tensors)
    outside = {"model.embed_tokens.weight": draw(VOCABULARY, hidden), "lm_head.weight": draw(VOCABULARY, hidden)}
    write("outside.safetensors", outside | {"model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)})
    whole = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(whole))
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5504)
    parser.add_argument("--ratio", default="0.2")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model, text = Path(scratch) / "model", Path(scratch) / "text.txt"
        model.mkdir()
        total = build(model, arguments.layers, arguments.hidden, arguments.intermediate)
        words = random.Random(0)
        text.write_text(" ".join(f"w{words.randrange(VOCABULARY)}" for _ in range(20_000)))
        command = [sys.executable, "-m", "lrc.cli", "compress", str(model), "--recipe", "svd-llm", "--ratio", arguments.ratio,
                   "--calibration", f"text:{text}", "--samples", "16", "--length", "512", "--out", f"{scratch}/o"]  # fmt: skip
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, cwd=scratch, check=False)
        seconds = time.perf_counter() - started
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        print(done.stdout)
        measured, predicted = re.search(r"peak memory ([\d.]+ [kMG]?B) \(predicted ([\d.]+ [kMG]?B)\)", done.stdout).groups()
        print(f"checkpoint      {total / 1e9:8.3f} GB ({arguments.layers} layers, bfloat16)")
        print(f"predicted peak  {predicted:>11}")
        print(f"measured peak   {measured:>11} = {bytes_of(measured) / total:.2f} of the checkpoint")
        print(f"time            {seconds:8.0f} s")


if __name__ == "__main__":
    main()
