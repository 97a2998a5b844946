"""A compressed checkpoint in plain transformers: it loads after `import lrc`, and fails loudly without it."""

from __future__ import annotations

import pytest
import torch
from pipeline import compress
from stock import plain_python, refused_without_lrc, stock_python
from tiny import CONFIGS
from transformers import AutoModelForCausalLM

IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def compressed(tiny_checkpoints, tiny_text_file, tmp_path_factory):
    """A function (family, **overrides) -> artifact, made once."""
    made = {}

    def make(family, **overrides):
        key = (family, str(overrides))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(family) / "out"
            compress(tiny_checkpoints(family), made[key], tiny_text_file, ratio=0.3, **overrides)
        return made[key]

    return make


@pytest.mark.parametrize("family", CONFIGS)
def test_every_tensor_finds_its_place(family, compressed):
    _, info = AutoModelForCausalLM.from_pretrained(compressed(family), output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_without_lrc_every_family_fails_loudly(compressed):
    """One process tries them all; an artifact of which only the experts are compressed is the hardest."""
    folders = [compressed(family) for family in CONFIGS]
    folders.append(compressed("mixtral", keep=["self_attn.*"]))
    assert refused_without_lrc(folders) == len(folders)


IMPORTS = ["import lrc, transformers", "import transformers, lrc", "import lrc.checkpoint.hf_quantizer, transformers"]


@pytest.mark.parametrize("order", IMPORTS)
def test_import_lrc_is_all_it_takes(order, compressed, tmp_path):
    done = plain_python(
        f"""
        {order}
        import sys, torch
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], device_map="auto", dtype=torch.float16)
        print(type(model.model.layers[0].mlp.up_proj).__name__, model.dtype)
        """,
        compressed("llama"),
    )
    assert done.stdout.split() == ["LowRankLinear", "torch.float16"], done.stderr


def test_loading_a_result_imports_forms_and_no_method(compressed):
    done = stock_python(
        """
        import lrc, sys
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
        print(type(model.model.layers[0].mlp.up_proj).__name__)
        print(*(name for name in sys.modules if name.startswith("lrc.compress.")))
        """,
        compressed("llama", recipe="svd-llm+gptq"),
    )
    assert done.returncode == 0, done.stderr
    module, imported = done.stdout.splitlines()
    assert module == "ProductLinear" and "lrc.compress.forms.quantized" in imported.split()
    needed_by_forms = {"lrc.compress.forms", "lrc.compress.install_forms", "lrc.compress.options", "lrc.compress.registry"}
    rest = {name for name in imported.split() if not name.startswith("lrc.compress.forms.")}
    assert rest <= needed_by_forms


@pytest.mark.parametrize("family", CONFIGS)
def test_saving_and_loading_again_changes_nothing(family, compressed, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(compressed(family)).eval()
    model.save_pretrained(tmp_path / "again", max_shard_size="50KB")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, again.eval()(IDS).logits)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral", "gpt2"])
def test_generating_with_the_cache_is_generating_without(family, compressed):
    model = AutoModelForCausalLM.from_pretrained(compressed(family)).eval()
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 2}
    with_cache = model.generate(IDS[:, :9], use_cache=True, **settings)
    assert torch.equal(with_cache, model.generate(IDS[:, :9], use_cache=False, **settings))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "opt"])
def test_tied_embeddings_stay_tied(family, compressed):
    model = AutoModelForCausalLM.from_pretrained(compressed(family))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_without_lrc_the_exception_says_what_to_do(compressed):
    done = stock_python(
        """
        import sys
        from transformers import AutoModelForCausalLM, pipeline
        for load in (AutoModelForCausalLM.from_pretrained, lambda folder: pipeline("text-generation", folder)):
            try:
                load(sys.argv[1])
            except ValueError as error:
                print("compressed by lrc" in str(error) and "`import lrc` before" in str(error))
        assert "lrc" not in sys.modules
        """,
        compressed("llama"),
    )
    assert done.stdout.split() == ["True", "True"], done.stderr


def test_a_saved_copy_of_a_result_loads_again(compressed, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(compressed("llama"))
    assert not hasattr(model.config, "transformers_weights")
    model.save_pretrained(tmp_path / "copy")
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "copy")(IDS).logits, model(IDS).logits)
