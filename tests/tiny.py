"""Tiny models of every architecture family, written to disk as real checkpoints with a real tokenizer.

Sizes are chosen odd on purpose (no two widths equal where the architecture allows it), so that a transposed or mixed-up
dimension fails.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

WORDS = (
    "the quick brown fox jumps over the lazy dog while seven wise owls watch from an old oak tree near the river and the "
    "miller counts his sacks of grain before the rain begins to fall on the roof of the mill "
)
VOCAB = 320

_COMMON = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
_LLAMA_LIKE = _COMMON | {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.08,
}

CONFIGS: dict[str, dict] = {
    "llama": _LLAMA_LIKE | {"tie_word_embeddings": True},
    "mistral": _LLAMA_LIKE | {"sliding_window": 12},
    "qwen3": _LLAMA_LIKE,
    "gemma3_text": _LLAMA_LIKE
    | {
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 16,
    },
    "phi3": {k: v for k, v in _LLAMA_LIKE.items() if k != "head_dim"}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "opt": _COMMON
    | {
        "hidden_size": 48,
        "word_embed_proj_dim": 48,
        "ffn_dim": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "init_std": 0.08,
    },
    "gpt2": _COMMON | {"n_embd": 48, "n_inner": 80, "n_layer": 3, "n_head": 4, "n_positions": 256, "initializer_range": 0.08},
    "gpt_neox": _COMMON
    | {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.08,
    },
    "mixtral": _LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def tiny_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 320 tokens trained on a sentence; with `bos` it puts <s> before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS], trainer)
    if bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def tiny_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> torch.nn.Module:
    """A model of `family` with random weights; biases and norms are random too, so that ignoring one is noticed."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **(CONFIGS[family] | changes))
    config.dtype = dtype
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            if name.endswith(("gate_up_proj", "down_proj")) and parameter.ndim == 3:
                parameter.normal_(std=0.08)
    return model.eval()


def write_tiny(
    folder: Path, family: str, dtype: torch.dtype = torch.float32, seed: int = 0, shard: str = "60KB", **changes
) -> Path:
    """Write a tiny checkpoint (several shards, tokenizer, generation config) of `family` into `folder`."""
    tiny_model(family, dtype, seed, **changes).save_pretrained(folder, max_shard_size=shard)
    tiny_tokenizer(bos=family.startswith("gemma")).save_pretrained(folder)
    return folder


def tiny_text(words: int = 4000, seed: int = 0) -> str:
    """English-looking text: the tokenizer's own words in random order."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = WORDS.split()
    picks = torch.randint(len(vocabulary), (words,), generator=generator).tolist()
    return " ".join(vocabulary[i] for i in picks)
