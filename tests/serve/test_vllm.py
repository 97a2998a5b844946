"""Results in vLLM itself, on the CPU: the tokens that transformers generates, or a refusal that says why.

One process of the engine's own environment (`make test-engines`) does all jobs, because its start takes longer than they do.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from pipeline import compress
from safetensors.torch import load_file, save_file
from tiny import CONFIGS
from transformers import AutoModelForCausalLM

from lrc.export.write import export

pytestmark = pytest.mark.engine

PROMPTS = [[3, 4, 5, 6, 7, 8], [10, 20, 30]]
TOKENS = 12
# vLLM's attention on the CPU knows heads of 32 and more
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
LLAMA = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
CODES = {"settings__group_size": 16}
RESULTS: dict[str, tuple[str, str, dict, dict]] = {
    "low rank, different in q, k and v": ("llama", "svd-llm", {"ratio": 0.3}, LLAMA),
    "channels and low rank": ("llama", "lrc-fast", {"ratio": 0.3}, LLAMA),
    "dropped sub-layers": ("llama", "finercut", {"ratio": 0.3}, LLAMA),
    "biases that the model has not": ("llama", "llm-rom", {"ratio": 0.3}, LLAMA),
    "codes": ("llama", "gptq", CODES, LLAMA),
    "codes without zeros": ("llama", "rtn", CODES | {"settings__symmetric": True}, LLAMA),
    "powers of two": ("llama", "rtn", CODES | {"settings__grid": "mxint", "settings__bits": 8}, LLAMA),
    "codes and corrections": ("llama", "qera", CODES | {"settings__rank": 4}, LLAMA),
    "codes and quantized corrections": ("llama", "qera", CODES | {"settings__rank": 4, "settings__factor_bits": 8}, LLAMA),
    "quantized factors": ("llama", "svd-llm+gptq", {"ratio": 0.6}, LLAMA),
    "mistral": ("mistral", "svd-llm", {"ratio": 0.3}, LLAMA),
    "biases of q, k and v": ("qwen2", "svd-llm", {"ratio": 0.3}, WIDE),
    "biases everywhere": ("llama", "gptq", CODES, LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "norms of heads": ("qwen3", "svd-llm", {"ratio": 0.3}, LLAMA),
    "fused in the checkpoint": ("phi3", "lrc-fast", {"ratio": 0.3}, WIDE),
}  # fmt: skip
COMPILED = "codes and corrections"
REFUSED = {
    "factors shared by q, k and v": ("llama", "shared-input", {"ratio": 0.3}, LLAMA, r"'shared-low-rank': \d+ modules"),
    "another type": ("gpt2", "svd-llm", {"ratio": 0.3}, {}, "type 'gpt2' were not tested"),
}  # fmt: skip
EXPORTS = {
    "compressed-tensors": ("compressed-tensors", "codes and corrections"),
    "gptq": ("gptq", "codes without zeros"),
    "gptq with zeros": ("gptq", "codes"),
    "dense": ("dense", "low rank, different in q, k and v"),
}


@pytest.fixture(scope="module")
def folders(tiny_checkpoints, tiny_text_file, tmp_path_factory) -> dict[str, Path]:
    """Name -> a result, a result that is refused, or an export."""
    made = {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(CONFIGS, "qwen2", {key: value for key, value in CONFIGS["qwen3"].items() if key != "head_dim"})
        for name, (family, recipe, settings, changes, *_) in {**RESULTS, **REFUSED}.items():
            made[name] = tmp_path_factory.mktemp("served") / "out"
            compress(tiny_checkpoints(family, dtype=torch.bfloat16, **changes), made[name], tiny_text_file, recipe, **settings)
    for name, (form, result) in EXPORTS.items():
        made[name] = export(made[result], form, out=tmp_path_factory.mktemp("exported") / "out").folder
    made["incomplete"] = shutil.copytree(made["codes"], tmp_path_factory.mktemp("incomplete") / "out")
    weights = made["incomplete"] / "model.safetensors"
    save_file(
        {name: tensor for name, tensor in load_file(weights).items() if ".layers.1." not in name}, weights, {"format": "pt"}
    )
    return made


@pytest.fixture(scope="module")
def answers(folders, tmp_path_factory) -> dict[str, dict]:
    """What vLLM said to each folder, and to one result compiled in bfloat16."""
    folder = tmp_path_factory.mktemp("jobs")
    plain = {"enforce_eager": True, "dtype": "float32"}
    wanted = {name: (path, plain) for name, path in folders.items() if name not in EXPORTED}
    wanted |= {
        "bfloat16": (folders[COMPILED], plain | {"dtype": "bfloat16"}),
        "compiled": (folders[COMPILED], {"enforce_eager": False, "dtype": "bfloat16"}),
    }
    jobs = [{"model": str(path), "prompts": PROMPTS, "tokens": TOKENS, "options": options} for path, options in wanted.values()]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [os.environ["LRC_ENGINE_PYTHON"], str(Path(__file__).with_name("in_vllm.py"))]
    done = subprocess.run(
        [*command, folder / "jobs.json", folder / "answers.json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(wanted, json.loads((folder / "answers.json").read_text()), strict=True))


@torch.no_grad()
def by_transformers(folder: Path, dtype: torch.dtype = torch.float32) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    length = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    return [model.generate(torch.tensor([ids]), **length)[0, len(ids) :].tolist() for ids in PROMPTS]


@pytest.mark.parametrize("name", RESULTS)
def test_the_same_greedy_tokens_as_in_transformers(name, folders, answers):
    assert answers[name].get("ids") == by_transformers(folders[name]), answers[name].get("error")


def test_a_compiled_model_generates_the_same(answers):
    assert answers["bfloat16"]["ids"] == answers["compiled"].get("ids"), answers["compiled"].get("error")


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_refused_by_name(name, answers):
    assert "ids" not in answers[name]
    assert_said(REFUSED[name][-1], answers[name]["error"])
    assert_said("--to dense", answers[name]["error"])


def test_a_result_without_all_its_tensors_is_refused(answers):
    assert_said(r"tensors of compressed matrices are in no file, 'model\.layers\.\d+\.", answers["incomplete"]["error"])


def test_a_dense_export_needs_no_plugin(folders, answers):
    assert answers["dense"].get("ids") == by_transformers(folders["dense"]), answers["dense"].get("error")


EXPORTED = {
    "compressed-tensors": {"bits": 4, "group_size": 16, "rank": 4, "scaling": 1.0},
    "gptq": {"bits": 4, "group_size": 16},
    "gptq with zeros": {"error": "Unsupported quantization config: bits=4, sym=False"},
}


@pytest.mark.parametrize("name", EXPORTED)
def test_what_vllms_own_classes_say_to_an_export_of_codes(name, folders):
    command = [os.environ["LRC_ENGINE_PYTHON"], str(Path(__file__).with_name("vllm_configs.py")), str(folders[name])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == EXPORTED[name]


def assert_said(pattern: str, text: str) -> None:
    assert re.search(pattern, text), text
