"""A checkpoint as a model whose weights are loaded and unloaded layer by layer.

The model is on the meta device; its layers are the module list with most of the parameters. model/ knows what is inside the
layers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..compress.forms.experts import IMPLEMENTATION, register
from ..errors import CheckpointError, ModelError, NonFiniteError
from .architecture import built, find_layers, keep_float32, require_sizes
from .location import Location
from .reading.ahead import ReadAhead
from .reading.fingerprint import Tell, unread_bytes
from .reading.fp8 import Fp8Source, open_weights, require_numbers, without_quantization
from .reading.names import all_made, renamed_tensors, reshaped
from .reading.weights import GgufSource, SafetensorsSource, WeightSource, dtype_of_gguf, group_by_prefix, numbers_held
from .untrusted.skeleton import building, require_affordable, require_finite_tables


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
        _refuse(self.config, location.name)
        shards = None if location.gguf else self._shards(dtype, original=prepare is None)
        self.dtype = (
            dtype or self.config.dtype or (shards.dtype if shards else dtype_of_gguf(location.path / str(location.gguf)))
        )
        register()
        held = numbers_held(shards, location.path / (location.gguf or ""))
        self.model: Any = _skeleton(self.config, self.dtype, trust_remote_code, location.name, held)
        require_sizes(self.config, location.name)
        if prepare is not None:
            prepare(self.model)
        self.layers_path, layers = find_layers(self.model, location.name)
        self.layers: list[nn.Module] = layers
        self.layer_names = [f"{self.layers_path}.{index}" for index in range(len(layers))]
        self._refuse_shared_layers()
        self.source: WeightSource = shards or GgufSource(location.path / str(location.gguf), self.model)
        renamed, self.unused = renamed_tensors(self.model, self.source)
        self._renamed = renamed
        self._standing_for: dict[str, str] = {}
        self.untied = self._settle_ties()
        self._sources = group_by_prefix(renamed, self.layer_names)
        self._numbers = {name: index for index, name in enumerate(self.layer_names)}
        self._loaded, self._ahead = -1, ReadAhead()
        self._check_headers()
        if prepare is None:  # forms store bits under the names of the weights that they stand for
            state = self.model.state_dict()
            floating = [name for name, target in self._renamed.items() if state[target].is_floating_point()]
            require_numbers(self.source, floating, location.name)

    def _shards(self, dtype: torch.dtype | None, original: bool) -> SafetensorsSource:
        """The weights; of an original also in fp8, which leaves no trace in the configuration."""
        if not original:
            return SafetensorsSource(self.location.path, self.config)
        source = open_weights(self.location.path, self.config, self.location.name, dtype)
        without_quantization(self.config)
        if isinstance(source, Fp8Source):
            self.config.dtype = source.dtype
        return source

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What a person should know about the weights before they are used."""
        found = []
        if isinstance(self.source, Fp8Source):
            left = set(self.source.activation_scales) & set(self.unused)
            into = str(self.source.dtype).removeprefix("torch.")
            found.append(
                f"{len(self.source.fp8)} fp8 tensors are read with their scales into {into}, "
                "of which all bytes here are counted"
                + (f"; {len(left)} scales of activations and of the key-value cache are left out" if left else "")
            )
        found += [
            f"'{one}' and '{other}' are tied in config.json and differ in the file: both are kept, as from_pretrained does"
            for one, other in self.untied.items()
        ]
        if unread := self.source.unread:
            found.append(f"not read, as from_pretrained does not: {', '.join(unread[:5])}{', …' if unread[5:] else ''}")
        return tuple(found)

    def tie(self) -> None:
        """Tie what is tied; `tie_weights` alone would tie again what differs in the files."""
        self.model.tie_weights(recompute_mapping=False)

    def _settle_ties(self) -> dict[str, str]:
        """Decide for every tied pair what `tie_weights` of `from_pretrained` decides (transformers 5.23).

        If both are in the files with other values, they are not tied. If only the copy is there, it stands for the other.

        Returns:
            Parameter -> the parameter that it is not tied to, although the configuration says so.
        """
        held: dict[str, list[str]] = {}
        for name, target in self._renamed.items():
            held.setdefault(target, []).append(name)
        untied = {}
        for copy, owner in list(self.tied.items()):
            if copy in held and owner not in held:
                held[owner] = held.pop(copy)
                for name in held[owner]:
                    self._renamed[name] = self._standing_for[name] = owner
            elif copy in held and not self._same(held[copy], held[owner]):
                untied[copy] = owner
                self.model.all_tied_weights_keys.pop(copy)
                parent, _, leaf = copy.rpartition(".")
                own = self.model.get_parameter(copy)
                setattr(self.model.get_submodule(parent), leaf, nn.Parameter(torch.empty_like(own), requires_grad=False))
        if untied and not self.tied:  # another loader would go by the flag
            for part in (self.config, self.config.get_text_config(), self.model.config, self.model.config.get_text_config()):
                part.tie_word_embeddings = False
        return untied

    def _same(self, first: list[str], second: list[str]) -> bool:
        """Whether two parameters are equal, each made of these tensors of the checkpoint."""
        return len(first) == len(second) and all(
            self.source.shape(one) == self.source.shape(other) and self.source.equal(one, other, self.dtype)
            for one, other in zip(first, second, strict=True)
        )

    def identity(self, tell: Tell = lambda done, total: None) -> dict[str, str]:
        """sha256 of everything in the checkpoint that a result depends on, by kind.

        Args:
            tell: called after each file of weights that had to be read.

        Returns:
            `fingerprint`: of the weights, every byte. `config`: of the configuration as transformers reads it. `files`: of the
            tokenizer's and other files that are copied into the result, and of the code that is run.
        """
        digest = hashlib.sha256()
        for name, path in sorted(self.location.beside(code=self.trust_remote_code).files.items()):
            digest.update(f"{name}\n{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
        return {"fingerprint": self.source.fingerprint(tell), "config": self.config_hash, "files": digest.hexdigest()}

    def fingerprint(self) -> str:
        """sha256 of what the model computes with: its weights, its configuration, and its code where that is run."""
        code = sorted(self.location.path.glob("*.py")) if self.trust_remote_code else []
        parts = [self.source.fingerprint(), self.config_hash, *(hashlib.sha256(path.read_bytes()).hexdigest() for path in code)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @cached_property
    def config_hash(self) -> str:
        """sha256 of the configuration; another version of transformers, which it states, does not change the model."""
        config = json.loads(self.config.to_json_string())
        config.pop("transformers_version", None)
        return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()

    @property
    def file_bytes(self) -> int:
        """Bytes of the weight files as they are on the disk."""
        return sum(path.stat().st_size for path in self.source.files)

    @property
    def unread_bytes(self) -> int:
        """Bytes that `identity` and `fingerprint` would read of the weights; the others' hashes are remembered."""
        return unread_bytes(self.source.fingerprinted)

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
        self._expect_after(prefix)
        return module

    def _expect_after(self, prefix: str) -> None:
        """Have the next layer's weights read from the disk meanwhile: in the direction in which layers are loaded."""
        if prefix not in self._numbers:
            return
        before, number = self._loaded, self._numbers[prefix]
        self._loaded = number
        following = number - 1 if before == number + 1 else number + 1
        if 0 <= following < len(self.layers):
            # a file that has gone or changed since it was opened: whoever loads that layer says what is wrong
            with contextlib.suppress(OSError, ValueError, KeyError):
                self._ahead.begin(self.source.extents(self._sources[self.layer_names[following]]))

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
        self.tie()

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
        tensors = {self._standing_for.get(name, name): tensor for name, tensor in tensors.items()}
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
        have = {name for targets in all_made(self.model, self._renamed).values() for name in targets}
        missing = [name for name, _ in self.model.named_parameters() if name not in have and name not in self.tied]
        if missing:
            raise CheckpointError(
                f"{self.location.name}: {len(missing)} tensors of the model are in no file, '{missing[0]}' first.",
                "The checkpoint is incomplete, or config.json describes another model.",
            )
        state, changes = self.model.state_dict(), reshaped(self.model)
        for name, target in self._renamed.items():
            got, expected = self.source.shape(name), tuple(state[target].shape)
            if got is not None and got != expected and not changes(name):
                raise self._unfitting(name, got, expected)

    def _unfitting(self, name: str, got: tuple[int, ...], expected: tuple[int, ...]) -> CheckpointError:
        return CheckpointError(
            f"{self.location.name}: '{name}' has shape {got}, the model of config.json wants {expected}.",
            "Weights and config.json do not belong together.",
        )


def _refuse(config: Any, name: str) -> None:
    """Refuse models that cannot be compressed.

    Raises:
        ModelError: the model is an encoder-decoder.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder ({config.model_type}).", "lrc compresses decoder-only models.")


def _skeleton(config: Any, dtype: torch.dtype, trust_remote_code: bool, name: str, held: int) -> Any:
    """The model with parameters on the meta device; buffers (rotary tables) are computed.

    Raises:
        ModelError: transformers cannot build it, or its buffers are too large or not finite; `name` is the model's.
    """
    from accelerate import init_empty_weights

    config._experts_implementation = IMPLEMENTATION
    if not trust_remote_code:  # code that comes with a checkpoint may not be made for the meta device
        require_affordable(config, name, held)
    with building(config), init_empty_weights(include_buffers=False):
        model = built(config, dtype, trust_remote_code)
    with building(config):
        keep_float32(model, dtype)
        model.tie_weights()
    require_finite_tables(model, name)
    model.eval()
    model.requires_grad_(False)
    return model


def _not_finite(tensor: Tensor) -> Tensor:
    return ~torch.isfinite(tensor)


def _nbytes(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def _to_meta(module: nn.Module, recurse: bool = True) -> None:
    for child in module.modules() if recurse else [module]:
        for name, parameter in child.named_parameters(recurse=False):
            if not parameter.is_meta:
                setattr(child, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
