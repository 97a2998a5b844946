"""Generates greedily with vLLM; run by the tests with the python of the engine's environment, where pytest is not installed.

    python in_vllm.py JOBS ANSWERS

JOBS is a JSON list of {"model", "prompts": [[ids]], "tokens", "options"}; ANSWERS gets a list of {"ids": [[ids]]} or
{"error": text}, in the same order.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}

from vllm import LLM, SamplingParams

from lrc.errors import LrcError


def answered(job: dict[str, Any]) -> dict[str, Any]:
    """What the engine generates, or why it did not."""
    try:
        engine = LLM(job["model"], max_model_len=128, max_num_seqs=4, disable_log_stats=True, **job["options"])
    except (LrcError, RuntimeError, ValueError) as error:
        chain: BaseException | None = error
        text = []
        while chain is not None:
            text.append(f"{type(chain).__name__}: {chain}")
            chain = chain.__cause__ or chain.__context__
        return {"error": "\n".join(text)}
    wanted = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], wanted, use_tqdm=False)
    del engine
    gc.collect()
    return {"ids": [list(output.outputs[0].token_ids) for output in outputs]}


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([answered(job) for job in jobs]))
