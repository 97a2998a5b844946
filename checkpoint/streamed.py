"""A checkpoint as a model whose weights are loaded and unloaded layer by layer.

The model is on the meta device; its layers are the module list with most of the parameters. model/ knows what is inside the
layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..compress.forms.experts import IMPLEMENTATION, register
from ..errors import CheckpointError, ModelError, NonFiniteError, one_line
from .architecture import built, find_layers, keep_float32, require_sizes
from .location import Location
from .weights import GgufSource, SafetensorsSource, WeightSource, group_by_prefix


class Checkpoint:
    """A checkpoint's model and its layers, with the weights loaded on request.

    Args:
        location: where the checkpoint is.
        dtype: of the weights in memory and in the result; None takes the checkpoint's own.
        trust_remote_code: whether modelling code inside the checkpoint may run.
        prepare: called with the model on the meta device before weights are read, to replace modules (by the forms of a
            compressed checkpoint). None refuses compressed checkpoints.

    Raises:
        ModelError: the model cannot be compressed, or transformers cannot build it.
        CheckpointError: tensors are missing or have other shapes than the model's.
    """

    def __init__(
        self,
        location: Location,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
        prepare: Callable[[nn.Module], None] | None = None,
    ) -> None:
        self.location = location
        self.trust_remote_code = trust_remote_code
        self.config = location.config(trust_remote_code)
        if prepare is None:
            _refuse(self.config, location.name)
        shards = None if location.gguf else SafetensorsSource(location.path)
        self.dtype = dtype or self.config.dtype or (shards.dtype if shards else torch.float32)
        register()
        self.model: Any = _skeleton(self.config, self.dtype, trust_remote_code)
        require_sizes(self.config, location.name)
        if prepare is not None:
            prepare(self.model)
        self.layers_path, layers = find_layers(self.model, location.name)
        self.layers: list[nn.Module] = layers
        self.layer_names = [f"{self.layers_path}.{index}" for index in range(len(layers))]
        self._refuse_shared_layers()
        self.source: WeightSource = shards or GgufSource(location.path / str(location.gguf), self.model)
        renamed, self.unused = _renamed(self.model, self.source)
        self._sources = group_by_prefix(renamed, self.layer_names)
        self._renamed = renamed
        self._check_headers()

    @cached_property
    def numel(self) -> int:
        """Parameters of the whole model, tied tensors counted once."""
        return sum(parameter.numel() for name, parameter in self.model.named_parameters() if name not in self.tied)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the whole model in `self.dtype`, tied tensors counted once."""
        return _nbytes(parameter for name, parameter in self.model.named_parameters() if name not in self.tied)

    def layer_nbytes(self, layer: int) -> int:
        """Bytes of one layer's weights."""
        return _nbytes(self.layers[layer].parameters())

    def reading_nbytes(self, nbytes: int) -> int:
        """Peak bytes while weights of `nbytes` are read: the file's pages, a copy, and the weights again if they are cast."""
        stored = nbytes * self.source.dtype.itemsize // self.dtype.itemsize
        return 2 * stored + (nbytes if self.source.dtype != self.dtype else 0)

    def outside_nbytes(self, for_calibration: bool = False) -> int:
        """Bytes outside the layers; for calibration without the output head, which it does not compute."""
        left_out = {id(p) for layer in self.layers for p in layer.parameters()}
        if for_calibration and (head := self.untied_head):
            left_out.add(id(head.weight))
        named = self.model.named_parameters()
        return _nbytes(p for name, p in named if id(p) not in left_out and name not in self.tied)

    @property
    def untied_head(self) -> Any:
        """The output head if it has weights of its own, else None."""
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        if head is None or head.weight is embedding.weight:
            return None
        return None if any(self.model.get_submodule(name.rpartition(".")[0]) is head for name in self.tied) else head

    @property
    def tied(self) -> dict[str, str]:
        """Parameter -> the parameter that it shares its tensor with."""
        return dict(getattr(self.model, "all_tied_weights_keys", None) or {})

    def outside_parts(self) -> list[list[str]]:
        """Checkpoint names outside the layers, without tied copies: one list per large tensor, and one for all small ones."""
        parts: dict[str, list[str]] = {}
        for name in self._sources[""]:
            target = self._renamed[name]
            if target not in self.tied:
                large = self.model.get_parameter(target).numel() > 1 << 22 if target in self._parameters else False
                parts.setdefault(target if large else "", []).append(name)
        return [parts[key] for key in sorted(parts)]

    @cached_property
    def _parameters(self) -> set[str]:
        return {name for name, _ in self.model.named_parameters()}

    @cached_property
    def _buffers(self) -> set[str]:
        return {name for name, _ in self.model.named_buffers()}

    def outside_tensors(self, names: list[str]) -> dict[str, Tensor]:
        """Name in the model -> loaded tensor, for these names in the checkpoint."""
        state = self.model.state_dict()
        return {target: state[target] for target in dict.fromkeys(self._renamed[name] for name in names)}

    def source_names(self, prefix: str) -> list[str]:
        """The checkpoint's names of the tensors of a layer (its path), or of everything outside the layers ('')."""
        return self._sources[prefix]

    def load(self, prefix: str) -> nn.Module:
        """Load one layer's weights (on the CPU, in `self.dtype`) and return the layer.

        Raises:
            CheckpointError: a tensor is missing or has another shape than the model.
            NonFiniteError: a weight is NaN or infinite.
        """
        module = self.model.get_submodule(prefix)
        self._materialise(self._sources[prefix])
        self._require_complete(prefix, module)
        return module

    def load_module(self, path: str) -> nn.Module:
        """Load the weights of one module inside a layer, without the rest of the layer.

        Raises:
            CheckpointError, NonFiniteError: as for `load`.
        """
        layer = next(name for name in self.layer_names if path.startswith(name + "."))
        names = [name for name in self._sources[layer] if self._renamed[name].startswith(path + ".")]
        module: nn.Module = self.model.get_submodule(path)
        self._materialise(names)
        self._require_complete(path, module)
        return module

    def load_outside(self, names: Iterable[str] | None = None) -> None:
        """Load weights outside the layers.

        Args:
            names: in the checkpoint; None: all that the forward pass of calibration needs.
        """
        if names is None:
            head = self.untied_head
            unread = {name for name, p in self.model.named_parameters() if head is not None and p is head.weight}
            self._materialise([name for name in self._sources[""] if self._renamed[name] not in unread])
            self.model.tie_weights()  # an embedding may be stored under another name only
            return
        self._materialise(list(names))

    def load_end(self) -> None:
        """Load what the forward pass needs after the last layer: the final norm and the output head."""
        embedding = self.model.get_input_embeddings().weight
        unread = set() if self.untied_head is None else {n for n, p in self.model.named_parameters() if p is embedding}
        self._materialise([name for name in self._sources[""] if self._renamed[name] not in unread])
        self.model.tie_weights()

    def unload(self, prefix: str = "") -> None:
        """Move weights back to the meta device: those of one layer (its path), or all outside the layers ('')."""
        if prefix:
            _to_meta(self.model.get_submodule(prefix))
            return
        for name, module in self.model.named_modules():
            if not name.startswith(self.layers_path + "."):
                _to_meta(module, recurse=False)

    def _materialise(self, names: list[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        tensors = self.source.read(names)
        for name, tensor in tensors.items():
            # a stored buffer may be a bound, such as infinity
            wrong = torch.isnan if self._renamed[name] in self._buffers else _not_finite
            # aminmax propagates NaN and, unlike isfinite, needs no second tensor of this size
            if tensor.is_floating_point() and tensor.numel() and any(map(wrong, tensor.aminmax())):
                bad = int(wrong(tensor).sum())
                raise NonFiniteError(
                    f"{self.location.name}: {bad} of {tensor.numel()} values of '{name}' are NaN or infinite.",
                    "The checkpoint is damaged; get it again.",
                )
        mapping: Any = [] if self.location.gguf else get_model_conversion_mapping(self.model)
        settings = LoadStateDictConfig(dtype=self.dtype, device_map={"": "cpu"}, weight_mapping=mapping)
        info, _ = convert_and_load_state_dict_in_model(self.model, tensors, settings)
        if info.mismatched_keys:
            name, got, expected = sorted(info.mismatched_keys)[0]
            raise self._unfitting(name, tuple(got), tuple(expected))
        if info.conversion_errors:
            name, error = next(iter(info.conversion_errors.items()))
            raise CheckpointError(f"{self.location.name}: '{name}' cannot be converted: {error}", "Get the checkpoint again.")

    def _require_complete(self, prefix: str, module: nn.Module) -> None:
        missing = [name for name, parameter in module.named_parameters() if parameter.is_meta]
        if missing:
            raise CheckpointError(
                f"{self.location.name}: {len(missing)} tensors of {prefix} are missing, '{prefix}.{missing[0]}' first.",
                "The checkpoint is incomplete; get it again.",
            )
        module.requires_grad_(False)

    def _refuse_shared_layers(self) -> None:
        """Refuse a model whose layers use one weight together.

        Raises:
            ModelError: they do.
        """
        homes = group_by_prefix({name: name for pair in self.tied.items() for name in pair}, self.layer_names)
        home = {name: path for path, names in homes.items() for name in names}
        apart = (pair for pair in self.tied.items() if home[pair[0]] != home[pair[1]])
        if shared := next(apart, None):
            raise ModelError(
                f"{self.location.name}: {type(self.model).__name__} uses one weight in several layers ('{shared[0]}' is "
                f"'{shared[1]}'); lrc compresses and stores each layer by itself.",
                "This architecture cannot be compressed layer by layer.",
            )

    def _check_headers(self) -> None:
        """Compare the headers with the model, so that missing and unfitting tensors are found before any work."""
        have = {name for targets in _all_made(self.model, self._renamed).values() for name in targets}
        missing = [name for name, _ in self.model.named_parameters() if name not in have and name not in self.tied]
        if missing:
            raise CheckpointError(
                f"{self.location.name}: {len(missing)} tensors of the model are in no file, '{missing[0]}' first.",
                "The checkpoint is incomplete, or config.json describes another model.",
            )
        state = self.model.state_dict()
        for name, target in self._renamed.items():
            got, expected = self.source.shape(name), tuple(state[target].shape)
            if got is not None and got != expected and not _changes_shape(self.model, name):
                raise self._unfitting(name, got, expected)

    def _unfitting(self, name: str, got: tuple[int, ...], expected: tuple[int, ...]) -> CheckpointError:
        return CheckpointError(
            f"{self.location.name}: '{name}' has shape {got}, the model of config.json wants {expected}.",
            "Weights and config.json do not belong together.",
        )


def _refuse(config: Any, name: str) -> None:
    """Refuse models that cannot be compressed.

    Raises:
        ModelError: the model is compressed already, or an encoder-decoder.
    """
    quantized = getattr(config, "quantization_config", None)
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else getattr(quantized, "quant_method", "?")
        remedy = "Compress the original model instead." if method == "lrc" else "Compress the 16-bit original instead."
        raise ModelError(f"{name} is compressed already (quant_method: {method}).", remedy)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder ({config.model_type}).", "lrc compresses decoder-only models.")


def _skeleton(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The model with parameters on the meta device; buffers (rotary tables) are computed."""
    from accelerate import init_empty_weights

    config._experts_implementation = IMPLEMENTATION
    try:
        with init_empty_weights(include_buffers=False):
            model = built(config, dtype, trust_remote_code)
    except ImportError as error:
        raise ModelError(
            f"transformers needs another package for a model of type '{config.model_type}': {one_line(error)}", "Install it."
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ModelError(
            f"transformers cannot build a language model of type '{config.model_type}' from its configuration: "
            f"{type(error).__name__}: {one_line(error)}",
            "If its code comes with the checkpoint and you trust it, add --trust-remote-code; if not, config.json is damaged, "
            "or transformers has no language model of this type.",
        ) from error
    keep_float32(model, dtype)
    model.tie_weights()
    model.eval()
    model.requires_grad_(False)
    return model


def _renamed(model: Any, source: WeightSource) -> tuple[dict[str, str], list[str]]:
    """Name in the checkpoint -> name in the model, and the checkpoint's names that the model does not have."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    known = model.state_dict()
    if source.names() and all(name in known for name in source.names()):
        return {name: name for name in source.names()}, []
    mapping = get_model_conversion_mapping(model)
    converters: list[Any] = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    renamings: list[Any] = [entry for entry in mapping if not isinstance(entry, WeightConverter)]
    renamed, unused = {}, []
    for name in source.names():
        new, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if new not in known and name in known:
            new = name
        if new in known:
            renamed[name] = new
        else:
            unused.append(name)
    return renamed, unused


def _all_made(model: Any, renamed: dict[str, str]) -> dict[str, list[str]]:
    """Name in the checkpoint -> every name in the model that transformers makes of it: it splits some tensors."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    splits = [entry.target_patterns for entry in get_model_conversion_mapping(model)
              if isinstance(entry, WeightConverter) and len(entry.target_patterns) > 1]  # fmt: skip
    made = {name: [target] for name, target in renamed.items()}
    for name, (target, *_) in made.items():
        for first, *others in splits:
            if name != target and first in target:
                made[name] += [target.replace(first, other) for other in others]
    return made


def _changes_shape(model: Any, name: str) -> bool:
    """Whether transformers fuses, splits or transposes this tensor of the checkpoint when it loads it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    mapping = get_model_conversion_mapping(model)
    converters: list[Any] = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    renamings: list[Any] = [entry for entry in mapping if not isinstance(entry, WeightConverter)]
    return rename_source_key(name, renamings, converters)[1] is not None


def _not_finite(tensor: Tensor) -> Tensor:
    return ~torch.isfinite(tensor)


def _nbytes(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def _to_meta(module: nn.Module, recurse: bool = True) -> None:
    for child in module.modules() if recurse else [module]:
        for name, parameter in child.named_parameters(recurse=False):
            if not parameter.is_meta:
                setattr(child, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
