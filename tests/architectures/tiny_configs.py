"""Tiny configurations of every type that transformers has, by rule: a class's own defaults with every size made small.

`shrunk` walks the fields of a configuration class and of the configurations nested in it. A field's name says what it counts
(`SIZES`); a value never grows. `OVERRIDES` has the types for which the rule is not enough, because sizes depend on each other.
"""

from __future__ import annotations

import dataclasses
import re
from functools import cache
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig

VOCAB = 320
LAYERS = 4

# the first pattern that fits a field's whole name; None leaves the value as it is
SIZES: list[tuple[str, int | None]] = [
    (r"(num_|n_)?(nextn_predict|mtp)_layers|num_kv_shared_layers|layer_group_size|num_dense_layers", None),
    (r".*(encoder_layers|num_encoder_layers|depth|num_blocks|num_global_layers)", 2),
    (r"num_hidden_layers|n_layers?|num_layers|decoder_layers|num_decoder_layers", LAYERS),
    (r".*(kv_heads|key_value_heads|kv_n_heads|ngroups|n_groups|num_key_heads)", 2),
    (r"heads_per_ngram|n_group|topk_group|o_groups", 1),
    (r".*(_heads?|n_heads?|num_heads)", 4),
    (r"qk_rope_head_dim|rotary_dim|.*indexer?_rope.*", 8),
    (r".*(head_dim|dim_head|head_size|kv_channels)", 16),
    (r"(n_|num_|moe_num_)?shared_experts?|zero_expert_num", 1),
    (r".*(num_(local_|routed_)?experts|n_routed_experts|moe_num_experts)", 4),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|.*expert_top_?k|top_?k_experts", 2),
    (r".*(moe|expert).*(intermediate_size|hidden_size)|.*expert_ffn.*", 40),
    (r"hidden_size_per_layer_input", 16),
    (r".*(intermediate_size.*|ffn_dim|ffn_hidden_size|d_inner|dff|dim_ff|feed_forward_size|mlp_dim|n_inner)", 96),
    (r"codebook_size|audio_vocab_size", 256),
    (r".*(vocab_size|unpadded_vocab_size|encoder_hash_byte_group_vocab).*|vocab_offset|ngram_vocab_size_base", VOCAB),
    (r".*(hidden_size|d_model|n_embd|emb_dim|embed_dim|embedding_size|embd_pdim|proj_dim|dim_model|lru_width|hidden_dim)", 64),
    (r"hidden_size_global|mamba_d_ssm|adapter_(in|out)_dim|adapter_input_size|projector_(in|out)put_dim", 64),
    (r"prompt_mid_dim|output_proj_dims", 64),
    (r".*(_rank|lowrank|_rank_dim)", 24),
    (r"original_max_position_embeddings", 128),
    (r".*(max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|max_target_positions|max_source_positions|"
     r"position_embedding_size|num_position_embeddings|rel_extent)", 256),
    (r".*(sliding_window(_size)?|attention_window_size|window_len|local_attention|attention_chunk_size|keep_window_size)", 16),
    (r".*(chunk_size|chunk_length|block_size)", 16),
    (r".*(d_state|state_size|conv_dim|d_rel)", 16),
    (r"index_topk", 8),
    (r"index_.*blocks", 2),
    (r"image_size|crop_size", 16),
    (r"patch_size", 4),
]  # fmt: skip

# fields that some classes leave open
OPEN = {"num_experts_per_tok": 2, "n_routed_experts": 4, "num_local_experts": 4, "n_shared_experts": 1}

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_HYBRID = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
_SECTIONS = {"rope_parameters": _ROPE | {"mrope_section": [2, 3, 3]}}  # they add up to half of a head

# dotted paths of fields, by type, for sizes that depend on each other; a nested type has its own entry
OVERRIDES: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": LAYERS},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _SECTIONS["rope_parameters"]}},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "dots3_note_text": {
        "head_dim": 24,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 24,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
        "sliding_window": 16,
    },
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense", "sparse"] * 2},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma4_assistant": {
        "text_config.hidden_size_per_layer_input": 0,
        "text_config.vocab_size_per_layer_input": 0,
        "text_config.num_kv_shared_layers": LAYERS,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "moshi": {"audio_vocab_size": 256},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "qwen2_vl_text": _SECTIONS,
    "qwen2_5_vl_text": _SECTIONS,
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [16, 16]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": _HYBRID},
    "zamba2": {"layers_block_type": _HYBRID},
}


@cache
def _pattern(name: str) -> int | None:
    for pattern, value in SIZES:
        if re.fullmatch(pattern, name):
            return value
    if re.fullmatch(r".*_(id|index)", name):
        return -1
    return None


def _defaults(kind: type[Any]) -> dict[str, Any]:
    return {
        field.name: field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        for field in dataclasses.fields(kind)
    }


def _small(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    limit = _pattern(name)
    if limit is None:
        return value
    if limit == -1:  # a token's number: it must be in the vocabulary, and those of several kinds must differ
        return value if value < 3 else VOCAB - 3 - sum(map(ord, name)) % 40 if value >= VOCAB else value
    return min(value, limit) if value > 0 else value


def shrunk(kind: type[Any]) -> dict[str, Any]:
    """Arguments of a tiny configuration of this class; those of nested configurations are dictionaries."""
    found: dict[str, Any] = {}
    for name, value in _defaults(kind).items():
        small = _small(name, value)
        if value is None and name in OPEN:
            small = OPEN[name]
        if small != value:
            found[name] = small
    if "kv_lora_rank" in found:  # latent attention: every head has its keys
        found["num_key_value_heads"] = found["num_attention_heads"]
    for name, spec in kind.sub_configs_defaults.items():
        inner, model_type = _class_of(spec)
        found[name] = _nested(inner, spec.init_kwargs) | ({"model_type": model_type} if model_type else {})
    for name, inner in ({} if kind.sub_configs_defaults else kind.sub_configs).items():
        found[name] = shrunk(inner)
    for path, value in OVERRIDES.get(kind.model_type, {}).items():
        where = found
        *parents, leaf = path.split(".")
        for parent in parents:
            where = where.setdefault(parent, {})
        if value is ...:
            where.pop(leaf, None)
        else:
            where[leaf] = value
    return found


def _nested(kind: type[Any], given: dict[str, Any]) -> dict[str, Any]:
    """`shrunk`, of a class whose outer configuration gives it some values by itself."""
    return {name: _small(name, value) for name, value in given.items()} | shrunk(kind)


def _class_of(spec: Any) -> tuple[type[Any], str]:
    """The class of a nested configuration, and its model type where the outer class leaves the choice."""
    if dataclasses.is_dataclass(spec.config_class) and spec.config_class is not AutoConfig:
        return spec.config_class, ""
    return CONFIG_MAPPING[spec.model_type], spec.model_type


def tiny_config(model_type: str, **changes: Any) -> Any:
    """A tiny configuration of a type of transformers.

    Args:
        changes: further arguments of the class.
    """
    kind = CONFIG_MAPPING[model_type]
    fields = {field.name for field in dataclasses.fields(kind)}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    common = {name: value for name, value in ids.items() if name in fields}
    if "is_decoder" in fields:
        common["is_decoder"] = True
    return kind(**(shrunk(kind) | common | changes))
