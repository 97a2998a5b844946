"""How long a run takes, beside what `lrc plan --time` foretells.

For each model and recipe: the prediction, then the run in a process of its own, with 8 × 512 calibration tokens. Both are
processor time of one thread (user and system), because the machine of a measurement is rarely idle; a run's own process also
imports libraries and reads its text, which a prediction leaves out: both are measured, by a plan and by reading it here, and
taken off.

    python benchmarks/quality/ungrid.py SMOLLM2
    python benchmarks/cost/plan_time.py SMOLLM2 --recipes svd-llm,gptq,lrc-fast
    python benchmarks/cost/plan_time.py --recipes svd-llm,gptq        # two random layers of Llama 7B: 4096 and 11008 wide
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from memory import build

from lrc.calibrate.data import CalibrationSpec, load_calibration
from lrc.checkpoint.location import locate
from lrc.plan.planner import make_draft
from lrc.run.duration.foretell import foretell
from lrc.run.request import Request

AMOUNTS = {"svd-llm": ["--ratio", "0.4"], "gptq": [], "lrc-fast": ["--ratio", "0.2"]}


def measured(words: list[str]) -> float:
    """Processor seconds of a command line in a process of its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "lrc.cli", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a folder; without it, a model is made")
    parser.add_argument("--recipes", default="svd-llm,gptq,lrc-fast")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--samples", default="8")
    parser.add_argument("--length", default="512")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(arguments.model) if arguments.model else Path(scratch) / "model"
        if not arguments.model:
            model.mkdir()
            build(model, arguments.layers, 4096, 11008)
        text = ["--calibration", "pydoc", "--samples", arguments.samples, "--length", arguments.length]
        settings = {"source": "pydoc", "samples": int(arguments.samples), "length": int(arguments.length)}
        for recipe in arguments.recipes.split(","):
            # each time, because a run reads it from the beginning
            started = time.process_time()
            load_calibration(CalibrationSpec(**settings), locate(str(model)).tokenizer())
            reading = time.process_time() - started
            amount = {"ratio": float(AMOUNTS[recipe][1])} if AMOUNTS[recipe] else {}
            request = Request.of(model, recipe, calibration=settings, **amount)
            draft = make_draft(request.view(), request.recipe)
            started = time.perf_counter()
            found = foretell(request.view(), draft, Path(scratch), request.devices, time.process_time)
            probe = time.perf_counter() - started
            words = [str(model), "--recipe", recipe, *AMOUNTS[recipe], *text]
            idle = measured(["plan", *words])
            seconds = measured(["compress", *words, "--no-time", "--out", f"{scratch}/{recipe}"]) - idle - reading
            print(
                f"{model.name} {recipe}: predicted {found.seconds:.0f} s, measured {seconds:.0f} s "
                f"({found.seconds / seconds - 1:+.0%}); the probe took {probe:.1f} s, to 1/{1 / found.share:.0f} of the width",
                flush=True,
            )
            for part, value in found.parts.items():
                print(f"    {part}: {value:.1f} s", flush=True)


if __name__ == "__main__":
    main()
