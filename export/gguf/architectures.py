"""Which architectures llama.cpp knows under which name, with which settings, and how it arranges their tensors.

Every entry is held to llama.cpp itself by tests/export/gguf. What an entry does not describe is refused: llama.cpp would ignore
it without a word.

Source: github.com/ggml-org/llama.cpp, src/models and gguf-py; docs/gguf.md of github.com/ggml-org/ggml for the keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_EXPERTS = {"gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"), "down_proj": ("ffn_down_exps",)}


@dataclass(frozen=True)
class Architecture:
    """An architecture as llama.cpp has it.

    Args:
        name: in `general.architecture`, as the gguf package spells it.
        norm: the key of its norms' epsilon: 'rms' or 'layer'.
        interleaved: whether queries and keys are stored for rotation of neighbouring numbers instead of halves.
        rotates: whether it has rotary positions.
        sliding: whether llama.cpp follows `sliding_window`.
        ignored: settings that must have one of these values (None: not set), because llama.cpp has no other.
    """

    name: str
    norm: str = "rms"
    interleaved: bool = False
    rotates: bool = True
    sliding: bool = False
    ignored: tuple[tuple[str, tuple[Any, ...]], ...] = ()


_SILU = (("hidden_act", ("silu", "swish")),)
ARCHITECTURES = {
    "llama": Architecture("llama", interleaved=True, ignored=_SILU),
    "mistral": Architecture("llama", interleaved=True, ignored=_SILU),
    "mixtral": Architecture("llama", interleaved=True, ignored=_SILU),
    "qwen2": Architecture("qwen2", ignored=_SILU),
    "qwen3": Architecture("qwen3", ignored=(*_SILU, ("attention_bias", (False,)))),
    "phi3": Architecture("phi3", ignored=_SILU),
    "gpt2": Architecture(
        "gpt2",
        norm="layer",
        rotates=False,
        ignored=(
            ("activation_function", ("gelu_new", "gelu_pytorch_tanh")),
            ("scale_attn_weights", (True,)),
            ("scale_attn_by_inverse_layer_idx", (False,)),
        ),
    ),
}
_SCALINGS = ("default", "linear", "yarn", "llama3")


def why_not(config: Any) -> list[str]:
    """Why llama.cpp would compute something else than this model; empty where it would not.

    Args:
        config: of the text model.
    """
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        return [f"an architecture '{config.model_type}'; it knows {', '.join(sorted(ARCHITECTURES))}"]
    reasons = [
        f"{key} = {getattr(config, key)}" for key, values in found.ignored if getattr(config, key, values[0]) not in values
    ]
    window = getattr(config, "sliding_window", None)
    if window and not found.sliding and window < config.max_position_embeddings and _slides(config):
        reasons.append(f"a sliding window of {window} tokens below the context of {config.max_position_embeddings}")
    if found.rotates and (kind := rope(config).get("rope_type", "default")) not in _SCALINGS:
        reasons.append(f"rotary positions of type '{kind}'")
    return reasons


def _slides(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None)
    return bool(getattr(config, "use_sliding_window", True)) and (kinds is None or "sliding_attention" in kinds)


def rope(config: Any) -> dict[str, Any]:
    """The settings of rotary positions."""
    return getattr(config, "rope_parameters", None) or {}


def head_size(config: Any) -> int:
    """Numbers of one head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def describe(writer: Any, config: Any, vocabulary: int) -> None:
    """Write the settings of the model.

    Args:
        writer: a GGUFWriter.
        config: of the text model.
        vocabulary: rows of the embedding.
    """
    found = ARCHITECTURES[config.model_type]
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_vocab_size(vocabulary)
    if found.norm == "rms":
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(getattr(config, "layer_norm_epsilon", None) or config.layer_norm_eps)
    if experts := getattr(config, "num_local_experts", None):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if found.rotates:
        _describe_rope(writer, config)


def _describe_rope(writer: Any, config: Any) -> None:
    from gguf import RopeScalingType

    settings = rope(config)
    writer.add_rope_dimension_count(int(head_size(config) * settings.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(settings.get("rope_theta", 10_000.0))
    kind = settings.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(settings["factor"])
    elif kind == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(settings["factor"])
        writer.add_rope_scaling_orig_ctx_len(settings.get("original_max_position_embeddings") or config.max_position_embeddings)


def computed(model: Any) -> dict[str, Tensor]:
    """Tensors that llama.cpp reads and the checkpoint does not store: what Llama 3 divides its rotary frequencies by."""
    config = model.config.get_text_config()
    if rope(config).get("rope_type") != "llama3":
        return {}
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = rope(config)["rope_theta"] ** -(torch.arange(0, head_size(config), 2).double() / head_size(config))
    return {"rope_freqs.weight": (plain / scaled.double()).float()}


class Names:
    """The names of tensors in the file, and how they are arranged there.

    Args:
        model: the plain model, on the meta device.
    """

    def __init__(self, model: Any) -> None:
        import gguf

        self.model, self.config = model, model.config.get_text_config()
        self.architecture = ARCHITECTURES[self.config.model_type]
        (kind,) = (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture.name)
        self._map = gguf.get_tensor_name_map(kind, self.config.num_hidden_layers)

    def of(self, name: str) -> list[str]:
        """The names in the file of a tensor of the model; several where the file stores it in parts.

        Raises:
            KeyError: llama.cpp has no place for it.
        """
        owner, _, last = name.rpartition(".")
        if last in _EXPERTS and owner.endswith("experts"):
            block = self._map.get_name(f"{owner}.down_proj")
            if block is None:
                raise KeyError(name)
            return [f"{block.rpartition('.')[0]}.{part}.weight" for part in _EXPERTS[last]]
        found = self._map.get_name(owner)
        if found is None:
            raise KeyError(name)
        return [f"{found}.{last}"]

    def arranged(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """A tensor of the model as the file stores it: names with (out, in) matrices, or stacks of them.

        Args:
            name: in the model.
            tensor: as the model stores it.
        """
        owner, _, last = name.rpartition(".")
        if last == "weight" and type(self.model.get_submodule(owner)).__name__ == "Conv1D":
            tensor = tensor.T
        names = self.of(name)
        rows = self.rows(name)
        for each, part in zip(names, tensor.chunk(len(names), dim=-2) if len(names) > 1 else [tensor], strict=True):
            yield each, part[rows] if rows is not None else part

    def rows(self, name: str) -> Tensor | None:
        """The order of a matrix's rows in the file, (out,) int64; None where it is the model's own.

        transformers rotates the first half of a head's numbers with the second; llama.cpp, for some architectures, each number
        with its neighbour.
        """
        parts = name.split(".")
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(parts[-2] if len(parts) > 1 else "")
        if not self.architecture.interleaved or heads is None:
            return None
        size = head_size(self.config)
        each = torch.arange(size).reshape(2, size // 2).T.reshape(-1)
        return (torch.arange(getattr(self.config, heads))[:, None] * size + each).reshape(-1)


def unplaced(model: nn.Module, names: Callable[[str], list[str]], tied: set[str]) -> list[str]:
    """Tensors of the model that llama.cpp has no place for."""
    found = []
    for name in model.state_dict():
        try:
            if name not in tied:
                names(name)
        except KeyError:
            found.append(name)
    return found
