"""Other quantizers at the same bits, on the same model, texts and protocol as benchmarks/quality/codes.py.

    python benchmarks/quality/others.py OUT --model UNGRID --calibration VALID.txt --test TEST.txt [--second OTHER.txt]
                                           [--only auto-round,llm-compressor] [--bits 4,3] [--iterations 40]
                                           [--samples 64] [--length 512]

UNGRID is the model of benchmarks/quality/ungrid.py. AutoRound (arXiv 2309.05516) and llm-compressor's GPTQ (arXiv 2210.17323)
run in environments of their own, OUT/auto-round and OUT/llm-compressor, which are made first. Groups of 64, asymmetric: scales
of 16 bits and zeros count, as in lrc's own figures. Their weights, multiplied out, are written as plain checkpoints in bfloat16
and evaluated by `lrc eval`. `--iterations` is AutoRound's alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from table import run, second_text

_GROUP = 64
# The scripts run in other environments, which have no lrc: model, text, out, bits, group, iterations, samples, length
_OPENING = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

name, text, out, *numbers = sys.argv[1:]
bits, group, iterations, samples, length = map(int, numbers)
tokenizer = AutoTokenizer.from_pretrained(name)
with open(text, encoding="utf-8") as file:
    ids = tokenizer(file.read(), add_special_tokens=False, return_tensors="pt").input_ids[0]
if len(ids) < samples * length:
    sys.exit(f"{text} has {len(ids)} tokens, {samples * length} are wanted")
windows = ids[: samples * length].view(samples, length)
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
"""
_AUTO_ROUND = """
from auto_round import AutoRound

rounding = AutoRound(
    model, tokenizer, scheme="W4A16", bits=bits, group_size=group, sym=False, iters=iterations, nsamples=samples, seqlen=length,
    batch_size=8, dataset=torch.utils.data.DataLoader([{"input_ids": each} for each in windows], batch_size=8),
    device_map="cpu", enable_torch_compile=False,
)
made, _ = rounding.quantize()
"""
_LLM_COMPRESSOR = """
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier

weights = {"num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": group, "observer": "mse"}
modifier = GPTQModifier(config_groups={"all": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
loader = torch.utils.data.DataLoader([{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in windows])
made = oneshot(
    model=model, recipe=modifier, dataset=loader, num_calibration_samples=samples, max_seq_length=length, pipeline="sequential"
)
"""
_CLOSING = """
plain = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
found = dict(made.named_modules())
layers = {path: module for path, module in plain.named_modules() if isinstance(module, torch.nn.Linear) and ".layers." in path}
changed = 0
with torch.no_grad():
    for path, module in layers.items():
        weight = found[path].weight.to(torch.bfloat16)
        values = weight.view(len(weight), -1, group).sort().values
        if (values.diff() != 0).sum(-1).max() >= 2**bits:
            sys.exit(f"{path} is not on a grid of {bits} bits")
        changed += not torch.equal(weight, module.weight)
        module.weight.copy_(weight)
if changed != len(layers):
    sys.exit(f"only {changed} of {len(layers)} matrices were rounded")
plain.save_pretrained(out)
tokenizer.save_pretrained(out)
"""


@dataclass(frozen=True)
class Other:
    """A quantizer: what its environment installs, and what rounds `model` to `made` there."""

    packages: tuple[str, ...]
    script: str


_OTHERS = {
    "auto-round": Other(("auto-round==0.16.1", "transformers==5.23.0"), _AUTO_ROUND),
    "llm-compressor": Other(("llmcompressor==0.14.0.1",), _LLM_COMPRESSOR),
}


def environment(folder: Path, packages: tuple[str, ...]) -> Path:
    """The interpreter of an environment with these packages, which is made where there is none."""
    python = folder / "bin" / "python"
    ready = folder / ".ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", "torch==2.13.0"], check=True
        )  # a build for the CPU first
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
        ready.touch()
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--second", type=Path)
    parser.add_argument("--only", default=",".join(_OTHERS))
    parser.add_argument("--bits", default="4,3")
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    wanted = parser.parse_args()
    names = wanted.only.split(",")
    if unknown := [name for name in names if name not in _OTHERS]:
        parser.error(f"--only knows {', '.join(_OTHERS)}, not {', '.join(unknown)}")
    wanted.out.mkdir(parents=True, exist_ok=True)
    second = wanted.second or second_text(wanted.out / "docstrings.txt", 40_000)
    for name in names:
        other = _OTHERS[name]
        python = environment(wanted.out / name, other.packages)
        for bits in map(int, wanted.bits.split(",")):
            result, start = wanted.out / f"{name}-{bits}", time.perf_counter()
            if not (result / "config.json").is_file():
                numbers = (bits, _GROUP, wanted.iterations, wanted.samples, wanted.length)
                script = _OPENING + other.script + _CLOSING
                command = [str(python), "-c", script, wanted.model, str(wanted.calibration), str(result), *map(str, numbers)]
                subprocess.run(command, check=True)
                print(f"{name}, {bits} bits: {bits + (16 + bits) / _GROUP:.2f} stored, {time.perf_counter() - start:.0f} s")
            run(
                "-m", "lrc.cli", "eval", str(result), "--tasks", f"text:{wanted.test},text:{second}",
                "--max-windows", str(wanted.windows), "--dtype", "bfloat16", "--json", str(wanted.out / f"{name}-{bits}.json"),
            )  # fmt: skip


if __name__ == "__main__":
    main()
