"""Layers that stay get new numbers: whatever depends on them follows, or the plan refuses before any weight is read."""

from __future__ import annotations

import json

import pytest
import torch
from shallow import compress
from tiny import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from lrc.checkpoint.location import locate
from lrc.depth.candidates import Removable
from lrc.depth.renumbering.shallower import Shallower
from lrc.errors import ModelError
from lrc.model.view import ModelView
from lrc.plan.load_recipe import load_recipe
from lrc.plan.planner import make_draft

IDS = torch.arange(3, 40)[None]
WRITING = ("o_proj.weight", "down_proj.weight", "down_proj", "out_proj.weight", "c_proj.weight", "c_proj.bias", "o_proj.bias",
           "down_proj_bias", "output_linear.weight", "w2.weight", "dense.weight", "fc2.weight")  # fmt: skip

_BASE = {
    "vocab_size": 320, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    "initializer_range": 0.08,
}  # fmt: skip
_MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
_MLA = {
    "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "q_lora_rank": 40,
    "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4,
}  # fmt: skip
_MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
_MAMBA2 = _MAMBA | {"mamba_n_heads": 12, "mamba_d_head": 8, "mamba_n_groups": 1}
_DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_JAMBA = _MAMBA | {
    "num_hidden_layers": 8, "attn_layer_period": 4, "attn_layer_offset": 2, "expert_layer_period": 2, "expert_layer_offset": 1,
    "num_experts": 4, "use_mamba_kernels": False,
}  # fmt: skip

# (kind, silent layer, its configuration, what the result's config.json says of it)
QUICK = [
    ("qwen2_moe", 1, _MOE | {"shared_expert_intermediate_size": 56, "mlp_only_layers": [3]}, {"mlp_only_layers": [2]}),
    ("qwen3_moe", 2, _MOE | {"head_dim": 16, "decoder_sparse_step": 2, "mlp_only_layers": []}, {"mlp_only_layers": [0, 3]}),
    ("deepseek_v2", 1, _MLA | {"first_k_dense_replace": 3, "topk_method": "greedy"}, {"first_k_dense_replace": 2}),
    ("llama4_text", 2, {"intermediate_size_mlp": 80, "num_local_experts": 4, "interleave_moe_layer_step": 2, "head_dim": 16},
     {"moe_layers": [1, 2, 4]}),
]  # fmt: skip
SLOW = [
    ("gpt2", 1, {}, {"n_layer": 5}),
    ("bamba", 2, _MAMBA2 | {"attn_layer_indices": [1, 3]}, {"attn_layer_indices": [1, 2]}),
    ("smollm3", 2, {"no_rope_layer_interval": 3}, {"no_rope_layers": [1, 1, 1, 1, 0]}),
    ("qwen2", 1, {"use_sliding_window": True, "max_window_layers": 3, "sliding_window": 8}, {"num_hidden_layers": 5}),
    ("qwen3_next", 1, _MOE | _DELTA | {"head_dim": 16, "shared_expert_intermediate_size": 40, "full_attention_interval": 3,
     "mlp_only_layers": [1]}, {"mlp_only_layers": []}),
    ("cohere2", 3, {"head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 3}, {"num_hidden_layers": 5}),
    ("gemma2", 1, {"head_dim": 16, "sliding_window": 8}, {"num_hidden_layers": 5}),
    ("gemma3_text", 2, {"head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 3}, {"num_hidden_layers": 5}),
    ("falcon_h1", 3, _MAMBA2 | {"mamba_d_ssm": 96, "head_dim": 16}, {"num_hidden_layers": 5}),
    ("granitemoehybrid", 2, _MAMBA2 | {"layer_types": ["mamba", "attention"] * 3, "num_local_experts": 4,
     "num_experts_per_tok": 2, "shared_intermediate_size": 40}, {"num_hidden_layers": 5}),
    ("lfm2", 3, {"full_attn_idxs": [1, 4], "block_auto_adjust_ff_dim": False}, {"num_hidden_layers": 5}),
    ("gpt_oss", 2, {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 8},
     {"num_hidden_layers": 5}),
    ("olmo_hybrid", 1, _DELTA | {"linear_num_value_heads": 2}, {"num_hidden_layers": 5}),
    ("ernie4_5_moe", 2, {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 40, "moe_layer_start_index": 1,
     "moe_layer_end_index": 4, "moe_layer_interval": 2}, {"moe_layer_end_index": 2}),
    ("deepseek_v3", 1, _MLA | {"first_k_dense_replace": 2, "n_group": 2, "topk_group": 1}, {"first_k_dense_replace": 1}),
    ("glm4_moe", 1, {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
     "first_k_dense_replace": 2, "head_dim": 16}, {"first_k_dense_replace": 1}),
]  # fmt: skip
# (kind, its configuration, what the refusal says)
REFUSED = [
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scaling = "),
    ("diffllama", {}, "lambda_init = "),
    ("gemma3n_text", {"head_dim": 16, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 2, "laurel_rank": 8,
     "altup_num_inputs": 2, "vocab_size_per_layer_input": 320, "sliding_window": 8, "intermediate_size": [80] * 6,
     "layer_types": ["sliding_attention", "full_attention"] * 3, "activation_sparsity_pattern": [0.0] * 6},
     "outside the layers, has shape"),
    ("jamba", _JAMBA, "expert_layer_period 2"),
]  # fmt: skip


def written(folder, kind, silent=(), **config):
    """A tiny random model on disk; the layers `silent` add nothing, so that dropping them changes nothing."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(_BASE | config)), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 3:
                parameter.normal_(std=0.08)
            if any(f".{layer}." in name for layer in silent) and name.endswith(WRITING):
                parameter.zero_()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def answers(folder):
    """The logits of a checkpoint, and those of a step that continues from the cache."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        first = model(IDS[:, :20], use_cache=True)
        step = model(IDS[:, 20:21], past_key_values=first.past_key_values, use_cache=True).logits
        return model(IDS, use_cache=False).logits, step


def dropping(model, out, text, silent, config, **overrides):
    """Drop the silent layers by block influence; by how much the answers change. The result must say `config` of itself."""
    plan, _ = compress(model, out, text, **{"depth.drop": len(silent)} | overrides)
    assert plan.dropped == tuple(silent)
    assert json.loads((out / "config.json").read_text()).items() >= config.items()
    return max(float((mine - theirs).abs().max()) for mine, theirs in zip(answers(out), answers(model), strict=True))


@pytest.mark.parametrize(("kind", "silent", "config", "says"), [
    *(pytest.param(*case, id=case[0]) for case in QUICK),
    *(pytest.param(*case, id=case[0], marks=pytest.mark.slow) for case in SLOW),
])  # fmt: skip
def test_a_layer_that_adds_nothing_can_go(kind, silent, config, says, tiny_text_file, tmp_path):
    model = written(tmp_path / "model", kind, [silent], **config)
    assert dropping(model, tmp_path / "out", tiny_text_file, [silent], says) < 1e-4


def draft(model, **overrides):
    return make_draft(ModelView(locate(str(model))), load_recipe("block-influence", {"depth.drop": 1} | overrides))


@pytest.mark.parametrize(("kind", "config", "why"), [
    pytest.param(*case, id=case[0], marks=[pytest.mark.slow] if case[0] == "jamba" else []) for case in REFUSED
])  # fmt: skip
def test_what_no_configuration_describes_is_refused_in_the_plan(kind, config, why, tmp_path):
    model = written(tmp_path, kind, **config)
    with pytest.raises(ModelError, match=why) as refused:
        draft(model)
    assert "sub-layer" in refused.value.remedy and "damaged" not in str(refused.value)


def test_without_its_last_layer_a_model_that_scales_by_the_layers_number_is_the_same(tmp_path, tiny_text_file):
    model = written(tmp_path / "model", "gpt2", [5], scale_attn_by_inverse_layer_idx=True)
    assert dropping(model, tmp_path / "out", tiny_text_file, [5], {"n_layer": 5}, **{"depth.protect_last": 0}) < 1e-4


@pytest.mark.slow
def test_only_whole_periods_go_where_a_period_says_what_layers_are(tmp_path, tiny_text_file):
    silent = [2, 3, 4, 5]
    model = written(tmp_path / "model", "jamba", silent, **_JAMBA)
    plan = draft(model, **{"depth.drop": 4})
    assert any("not every layer can go" in note for note in plan.notes)
    assert dropping(model, tmp_path / "out", tiny_text_file, silent, {"num_hidden_layers": 4}) < 1e-4


@pytest.mark.slow
def test_a_set_that_leaves_the_period_is_not_chosen(tmp_path, tiny_text_file):
    model = written(tmp_path / "model", "jamba", [1, 2, 4, 6], **_JAMBA)  # the best four by themselves are no period
    plan, _ = compress(model, tmp_path / "out", tiny_text_file, **{"depth.drop": 4})
    assert plan.dropped != (1, 2, 4, 6) and Shallower.of(ModelView(locate(str(model)))).possible(plan.dropped)


@pytest.mark.slow
@pytest.mark.parametrize("score", ["sleb", "angular", "last"])
def test_every_score_keeps_to_what_can_go(score, tmp_path, tiny_text_file):
    model = written(tmp_path / "model", "jamba", [3, 4, 5, 6], **_JAMBA)
    plan, _ = compress(model, tmp_path / "out", tiny_text_file, **{"depth.drop": 4, "depth.score": score})
    assert len(plan.dropped) == 4
    assert plan.dropped in [(1, 2, 3, 4), (2, 3, 4, 5), (3, 4, 5, 6)], "a whole period"


def test_a_choice_that_is_free_takes_few_comparisons(tiny_checkpoints, monkeypatch):
    view = ModelView(locate(str(tiny_checkpoints("llama", num_hidden_layers=12))))
    known, looked = Shallower.of(view), []
    attempt = known._attempt
    monkeypatch.setattr(known, "_attempt", lambda dropped: looked.append(dropped) or attempt(dropped))
    spec = load_recipe("block-influence", {"depth.drop": 3}).depth
    removable = Removable(view, spec)
    assert all(removable.may_go([layer]) for layer in range(1, 11)) and removable.may_go([2, 5, 7])
    assert len(looked) == 2, "layers of one kind are compared once for each number of them"
