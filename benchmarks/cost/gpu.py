"""Check and time the GPU kernels of cuda/ on the linear layers of 7B and 8B models, and a compression stage by stage.

On a GPU, in less than ten minutes: every product is first compared with float64, then timed against dense cuBLAS and against
what torch does with the same form, in one run, with weights that no cache holds; beside it the time that its bytes and
operations need at the bandwidth and the rate measured here. Then grams against float32 and TF32, and `lrc compress` of a model
of random weights with the layers of Llama-7B. It prints one table, the tables of cuda/dispatch.py anew, and JSON (--json FILE).

    python benchmarks/cost/gpu.py [--json FILE] [--minutes 9] [--quick]
    python benchmarks/cost/gpu.py --check-here       without a GPU: the tests in Triton's interpreter, and every kernel compiled

Without a GPU there are no figures, and none are printed. There are none in the docs either: no GPU was at hand so far.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

ROOT = Path(__file__).resolve().parents[2]
# model, group -> inputs and the outputs of the members
LAYERS = {
    "7B qkv": (4096, [4096] * 3),
    "7B o": (4096, [4096]),
    "7B gate,up": (4096, [11008] * 2),
    "7B down": (11008, [4096]),
    "8B qkv": (4096, [4096, 1024, 1024]),
    "8B gate,up": (4096, [14336] * 2),
    "8B down": (14336, [4096]),
}
ROWS = (1, 4, 16, 64, 256, 2048)
KEPT, GROUP, RANK, COLD = 0.6, 128, 32, 256 << 20  # COLD: bytes of weights that are read before the same ones are read again
DTYPE, DEVICE = torch.bfloat16, "cuda"
MODEL = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 2, "num_attention_heads": 32}
CALIBRATION = {"samples": 16, "length": 2048}


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to multiply.

    Args:
        make: gives the product of fresh weights, x -> y, and the matrix in float64 that it stands for (None after the first).
        nbytes: of the weights that a call reads (and of what it writes to read again); operations: for one row.
    """

    name: str
    make: Callable[[bool], tuple[Callable[[Tensor], Tensor], Tensor | None]]
    nbytes: int
    operations: int


@dataclasses.dataclass(frozen=True)
class Timed:
    """A measured product: microseconds, those of its roofline, and its error relative to the norm of the result."""

    layer: str
    rows: int
    case: str
    us: float
    roofline_us: float
    error: float


def normal(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype or DTYPE)


def dense_case(inputs: int, outs: list[int]) -> Case:
    def make(check: bool) -> tuple[Callable[[Tensor], Tensor], Tensor | None]:
        weight = normal(sum(outs), inputs) / inputs**0.5
        return lambda x: linear(x, weight), weight.double() if check else None

    return Case("dense", make, 2 * inputs * sum(outs), 2 * inputs * sum(outs))


def low_rank_cases(inputs: int, outs: list[int]) -> Iterator[Case]:
    from lrc.cuda.grouped_low_rank import grouped_low_rank, stack

    ranks = [int(KEPT * out * inputs / (out + inputs)) for out in outs]

    def make(grouped: bool, check: bool) -> tuple[Callable[[Tensor], Tensor], Tensor | None]:
        rights = [normal(rank, inputs) / inputs**0.5 for rank in ranks]
        lefts = [normal(out, rank) / rank**0.5 for out, rank in zip(outs, ranks, strict=True)]
        pairs = list(zip(lefts, rights, strict=True))
        matrix = torch.cat([left.double() @ right.double() for left, right in pairs]) if check else None
        if not grouped:
            return lambda x: torch.cat([linear(linear(x, right), left) for left, right in pairs], -1), matrix
        right, left, padded = stack(rights, lefts)
        return lambda x: grouped_low_rank(x, right, left, padded, outs, None, None), matrix

    count = sum(rank * (out + inputs) for rank, out in zip(ranks, outs, strict=True))
    yield Case("low rank, torch", lambda check: make(False, check), 2 * count, 2 * count)
    yield Case("low rank, kernel", lambda check: make(True, check), 2 * count, 2 * count)


def codes_cases(inputs: int, outs: list[int], bits: int) -> Iterator[Case]:
    from lrc.compress.forms.grids import Grid, pack
    from lrc.compress.forms.quantized import QuantizedLinear
    from lrc.cuda.packed_codes import Codes, codes_dense, codes_product

    rows = sum(outs)
    packed, groups = rows * inputs * bits // 8, inputs // GROUP

    def make(how: str, check: bool) -> tuple[Callable[[Tensor], Tensor], Tensor | None]:
        grid = Grid(bits, GROUP, symmetric=False)
        weight = torch.randint(0, 256, (packed,), device=DEVICE, dtype=torch.uint8)
        steps = (torch.rand(rows, groups, device=DEVICE) + 0.5).to(DTYPE) / (4 << bits) / inputs**0.5
        zeros = pack(torch.randint(0, 1 << bits, (rows, groups), device=DEVICE, dtype=torch.uint8), bits).flatten()
        right, left = normal(RANK, inputs) / inputs**0.5, normal(rows, RANK) / RANK**0.5
        module = QuantizedLinear(grid, inputs, rows, False, DTYPE).to(DEVICE).eval()
        for name, tensor in (("weight", weight), ("scales", steps), ("zeros", zeros)):
            setattr(module, name, torch.nn.Parameter(tensor, requires_grad=False))
        codes = Codes(weight, steps, zeros, bits, GROUP, inputs, rows)
        matrix = module.matrix(torch.float64) + (left.double() @ right.double() if "+" in how else 0) if check else None
        return {
            "torch": lambda x: linear(x, module.matrix(DTYPE)),
            "kernel": lambda x: codes_product(x, codes),
            "kernel + rank": lambda x: codes_product(x, codes, right, left),
            "written out": lambda x: linear(x, codes_dense(codes, DTYPE)),
        }[how], matrix

    read = packed + 2 * rows * groups + rows * groups * bits // 8
    work = 2 * rows * inputs
    for how, more in (
        ("torch", 0),
        ("kernel", 0),
        ("kernel + rank", RANK * (rows + inputs)),
        ("written out", 2 * rows * inputs),
    ):
        operations = work + (2 * more if "+" in how else 0)
        yield Case(f"{bits} bits, {how}", lambda check, how=how: make(how, check), read + 2 * more, operations)  # type: ignore[misc]


def dictionary_cases(inputs: int, outs: list[int]) -> Iterator[Case]:
    from lrc.compress.forms.dictionary import Dictionary, expand
    from lrc.cuda.sparse_codes import FEW, Sparse, sparse_dense, sparse_product

    rows = sum(outs)
    atoms = int(KEPT * rows * inputs * 2 / (2 * inputs + rows + rows / 8))  # half of the codes are zero

    def make(how: str, check: bool) -> tuple[Callable[[Tensor], Tensor], Tensor | None]:
        mask = torch.rand(rows, atoms, device=DEVICE) < 0.5
        codes, weight = normal(rows, atoms) / atoms**0.5, normal(atoms, inputs) / inputs**0.5
        form = Dictionary.of(codes, mask, weight)
        counts = mask.sum(1)
        sparse = Sparse(form.values, form.support, (counts.cumsum(0) - counts).int(), rows, atoms)
        matrix = (codes * mask).double() @ weight.double() if check else None
        products: dict[str, Callable[[Tensor], Tensor]] = {
            "torch": lambda x: linear(linear(x, weight), expand(form.values, mask)),
            "kernel": lambda x: sparse_product(linear(x, weight), sparse),
            "written out": lambda x: linear(linear(x, weight), sparse_dense(sparse)),
        }
        return products[how], matrix

    nonzeros = rows * atoms // 2
    read, work = 2 * (atoms * inputs + nonzeros) + rows * atoms // 8, 2 * atoms * (inputs + rows)
    for how, more in (("torch", 4 * rows * atoms), ("kernel", 0), ("written out", 4 * rows * atoms)):
        case = Case(f"dictionary, {how}", lambda check, how=how: make(how, check), read + more, work)  # type: ignore[misc]
        yield case if how != "kernel" else dataclasses.replace(case, name=f"dictionary, kernel (to {FEW})")


def trellis_cases(inputs: int, outs: list[int], bits: int) -> Iterator[Case]:
    """Codes alone, with torch's operations for the rotations before and after them left out."""
    from lrc.compress.forms.codes.code import SIDE, Code, from_tiles
    from lrc.compress.forms.codes.tables import FACTOR, trellis_unit
    from lrc.cuda.trellis_codes import FEW, Trellis, trellis_dense, trellis_product

    rows, code = sum(outs), Code("trellis", bits, 12)
    tall, wide, unit = rows // SIDE, inputs // SIDE, trellis_unit(12) / inputs**0.5

    def make(how: str, check: bool) -> tuple[Callable[[Tensor], Tensor], Tensor | None]:
        packed = torch.randint(0, 256, (tall * wide, code.nbytes), device=DEVICE, dtype=torch.uint8)
        codes = Trellis(packed.flatten(), unit, tall, wide, bits, 12, FACTOR)
        values = lambda: from_tiles(code.values(packed).view(tall, wide, -1)) / inputs**0.5  # noqa: E731
        products: dict[str, Callable[[Tensor], Tensor]] = {
            "torch": lambda x: linear(x, values().to(DTYPE)),
            "kernel": lambda x: trellis_product(x, codes),
            "written out": lambda x: linear(x, trellis_dense(codes, DTYPE)),
        }
        return products[how], values().double() if check else None

    read, work = tall * wide * code.nbytes, 2 * rows * inputs
    for how, more in (("torch", 4 * rows * inputs), ("kernel", 0), ("written out", 4 * rows * inputs)):
        case = Case(f"trellis, {how}", lambda check, how=how: make(how, check), read + more, work)  # type: ignore[misc]
        yield case if how != "kernel" else dataclasses.replace(case, name=f"trellis, kernel (to {FEW})")


def microseconds(products: list[Callable[[Tensor], Tensor]], x: Tensor) -> float:
    """Of one product: the median of replays of a CUDA graph in which each set of weights is used once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for product in products:
            product(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for product in products:
            product(x)
    times = []
    for _ in range(8):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(products))
    return statistics.median(times[2:])


def machine() -> dict[str, Any]:
    """The GPU's name, its measured bandwidth in bytes a second and its rate of bfloat16 products in operations a second."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    copy = microseconds([lambda x: x.clone()], source)
    a, b = normal(8192, 8192), normal(8192, 8192)
    product = microseconds([lambda x: x @ b], a)
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "torch": torch.__version__,
        "bandwidth": 2 * source.numel() / copy * 1e6,
        "rate": 2 * 8192**3 / product * 1e6,
    }


def time_products(here: dict[str, Any], rows: tuple[int, ...], until: float) -> Iterator[Timed]:
    """Every layer, every way, every number of rows; stops, and says so, when the time is over."""
    for layer, (inputs, outs) in LAYERS.items():
        cases = [dense_case(inputs, outs), *low_rank_cases(inputs, outs), *codes_cases(inputs, outs, 4)]
        cases += [*dictionary_cases(inputs, outs), *trellis_cases(inputs, outs, 3)]
        cases += codes_cases(inputs, outs, 3) if layer.startswith("7B") else ()
        for case in cases:
            if time.monotonic() > until:
                print(f"NOT MEASURED, the time is over: {layer}, {case.name}, and all that follow", flush=True)
                return
            first, matrix = case.make(True)
            assert matrix is not None
            others = [case.make(False)[0] for _ in range(min(15, COLD // case.nbytes))]
            for count in rows:
                if "kernel (to" in case.name and count > 4:
                    continue
                x = normal(count, inputs)
                expected = x.double() @ matrix.T
                error = float((first(x).double() - expected).norm() / expected.norm())
                us = microseconds([first, *others], x)
                moved = case.nbytes + 2 * count * (inputs + sum(outs))
                roofline = 1e6 * max(moved / here["bandwidth"], count * case.operations / here["rate"])
                yield Timed(layer, count, case.name, us, roofline, error)


def time_grams() -> Iterator[dict[str, Any]]:
    """Grams of 8192 tokens: the kernel against torch in float32 and in TF32, errors relative to the columns' norms."""
    from lrc.cuda.gram import gram_, reference

    for width in (1024, 4096, 11008):
        spread = torch.logspace(-2, 2, width, device=DEVICE)
        for dtype in (torch.float32, DTYPE):
            x = (normal(8192, width, dtype=torch.float32) * spread).to(dtype)
            exact = x.double().T @ x.double()
            norms = exact.diag().sqrt()
            ways: dict[str, tuple[Callable[[Tensor, Tensor, float, float], None], bool]] = {
                "kernel": (gram_, False),
                "float32": (reference, False),
                "TF32": (reference, True),
            }
            for name, (call, tf32) in ways.items():
                torch.backends.cuda.matmul.allow_tf32 = tf32
                value = torch.zeros(width, width, device=DEVICE)
                call(value, x, 0.0, 1.0)
                error = float(((value.double() - exact).triu().abs() / (norms[:, None] * norms)).max())
                us = microseconds([lambda given, call=call, value=value: call(value, given, 0.5, 0.5)], x)  # type: ignore[misc]
                yield {"width": width, "input": str(dtype), "way": name, "us": us, "error": error}
            torch.backends.cuda.matmul.allow_tf32 = False


def time_compress() -> dict[str, dict[str, float]]:
    """Seconds of the stages of `lrc compress` for a random model with layers of Llama-7B; recipe -> stage -> seconds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import lrc

    sys.path.insert(0, str(ROOT / "tests"))
    from tiny import tiny_text, tiny_tokenizer

    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = tiny_tokenizer()
        config = LlamaConfig(**MODEL, vocab_size=max(1024, len(tokenizer)))
        with torch.device(DEVICE):
            model = LlamaForCausalLM(config).to(DTYPE)
        model.save_pretrained(f"{scratch}/model")
        tokenizer.save_pretrained(f"{scratch}/model")
        del model
        text = Path(scratch) / "text.txt"
        text.write_text(tiny_text(200_000))
        calibration = {"source": f"text:{text}"} | CALIBRATION
        for recipe in ("svd-llm", "gptq"):
            stages: dict[str, float] = defaultdict(float)

            def note(event: Any, stages: dict[str, float] = stages) -> None:
                stages[type(event).__name__ if event.stage == "" else event.stage] += event.seconds

            settings = {"ratio": 0.4} if recipe == "svd-llm" else {}
            begun = time.perf_counter()
            lrc.compress(f"{scratch}/model", recipe, out=f"{scratch}/{recipe}", notify=note, calibration=calibration,
                         device=DEVICE, **settings)  # fmt: skip
            found[recipe] = {name: seconds for name, seconds in stages.items() if seconds}
            found[recipe]["whole run"] = time.perf_counter() - begun
    return found


def crossovers(timed: list[Timed]) -> dict[str, int]:
    """For each kernel, the largest number of rows up to which it is the fastest way for every layer that was measured."""
    pairs = {
        "low-rank group": ("low rank, kernel", ("low rank, torch",), lambda name: "," in name),
        "low-rank": ("low rank, kernel", ("low rank, torch",), lambda name: "qkv" not in name and "," not in name),
        "codes": ("4 bits, kernel", ("4 bits, torch", "4 bits, written out"), lambda name: True),
        "dictionary": ("dictionary, kernel (to 4)", ("dictionary, torch", "dictionary, written out"), lambda name: True),
        "trellis": ("trellis, kernel (to 4)", ("trellis, torch", "trellis, written out"), lambda name: True),
    }
    us = {(one.layer, one.rows, one.case): one.us for one in timed}
    found = {}
    for name, (kernel, others, counts) in pairs.items():
        best = 0
        for rows in ROWS:
            layers = [layer for layer in LAYERS if counts(layer) and (layer, rows, kernel) in us]
            if not layers or any(us[layer, rows, kernel] > us[layer, rows, o] for layer in layers for o in others):
                break
            best = rows
        found[name] = best
    return found


def report(timed: list[Timed], grams: list[dict[str, Any]], stages: dict[str, dict[str, float]]) -> None:
    """Print the tables."""
    dense = {(one.layer, one.rows): one.us for one in timed if one.case == "dense"}
    print(f"{'layer':<12}{'rows':>6}  {'product':<26}{'us':>9}{'roofline':>10}{'of it':>7}{'dense / it':>12}{'error':>10}")
    for one in timed:
        ratio = dense[one.layer, one.rows] / one.us
        print(f"{one.layer:<12}{one.rows:>6}  {one.case:<26}{one.us:>9.1f}{one.roofline_us:>10.1f}"
              f"{one.roofline_us / one.us:>7.0%}{ratio:>12.2f}{one.error:>10.1e}")  # fmt: skip
    print(f"\n{'gram width':<12}{'input':<16}{'way':<10}{'us':>10}{'error':>10}")
    for gram in grams:
        print(f"{gram['width']:<12}{gram['input']:<16}{gram['way']:<10}{gram['us']:>10.0f}{gram['error']:>10.1e}")
    for recipe, seconds in stages.items():
        print(f"\nlrc compress, {recipe}: " + ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items()))
    print("\n# for cuda/dispatch.py, measured here:\nUP_TO", crossovers(timed))
    by = {(gram["width"], gram["input"], gram["way"]): gram for gram in grams}
    for dtype in ("torch.float32", str(DTYPE)):
        good = [
            width
            for width in sorted({gram["width"] for gram in grams})
            if by[width, dtype, "kernel"]["us"] < by[width, dtype, "float32"]["us"]
            and by[width, dtype, "kernel"]["error"] <= 1.5 * by[width, dtype, "float32"]["error"]
        ]
        print(f"GRAM_FROM {dtype}: {good[0] if good else None}")


def check_here() -> int:
    """The tests in Triton's interpreter, and every kernel compiled ahead of time; 0 where all is right."""
    from lrc.cuda.dispatch import FOUND

    if not FOUND:
        sys.exit("Triton is not installed: pip install 'lrc[triton]', or run `make test-kernels`.")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    tests = ["-m", "pytest", "-q", "-m", "not slow", str(ROOT / "tests" / "cuda")]
    with tempfile.TemporaryDirectory() as elsewhere:  # not the root, where `cuda` would hide the package of that name
        first = subprocess.run([sys.executable, *tests], env=environment, cwd=elsewhere, check=False).returncode
        environment.pop("TRITON_INTERPRET")
        script = str(ROOT / "benchmarks" / "ahead_of_time.py")
        second = subprocess.run([sys.executable, script], env=environment, cwd=elsewhere, check=False).returncode
    return first or second


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check-here", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--quick", action="store_true", help="three numbers of rows, no compression")
    told = parser.parse_args()
    if told.check_here:
        return check_here()
    if not torch.cuda.is_available():
        sys.exit(f"This measures on a GPU, and torch {torch.__version__} finds none. Without one: --check-here.")
    begun = time.monotonic()
    with torch.no_grad():
        here = machine()
        print(f"{here['name']}, torch {here['torch']}: copies {here['bandwidth'] / 1e12:.2f} TB/s, bfloat16 products "
              f"{here['rate'] / 1e12:.0f} TFLOP/s", flush=True)  # fmt: skip
        grams = list(time_grams())
    stages = {} if told.quick else time_compress()
    with torch.no_grad():
        timed = list(time_products(here, (1, 16, 256) if told.quick else ROWS, begun + 60 * told.minutes))
    report(timed, grams, stages)
    if told.json:
        rows = [dataclasses.asdict(one) for one in timed]
        told.json.write_text(json.dumps({"machine": here, "products": rows, "grams": grams, "compress": stages}, indent=1))
    wrong = [one for one in timed if one.error > 0.02]
    for one in wrong:
        print(f"WRONG: {one.layer}, {one.rows} rows, {one.case}: error {one.error:.1e}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
