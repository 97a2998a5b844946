"""Grids, packing, quantized forms and the methods that make them, against formulations written anew in numpy."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import error, problem, statistics
from safetensors.torch import save

from lrc.compress.base import get_method
from lrc.compress.forms.base import LowRank, build_module, fill_module
from lrc.compress.forms.codes.code import Code
from lrc.compress.forms.grids import BITS, Grid, pack, packed_width, unpack
from lrc.compress.forms.quantized import Quantized, QuantizedLowRank
from lrc.compress.metric import Metric
from lrc.compress.options import Choice, Shape
from lrc.compress.quantize.factors import InOneCode, OnGrid, quantize_factors
from lrc.compress.quantize.gptq import compensator
from lrc.errors import LrcError, NonFiniteError, RecipeError
from lrc.plan.load_recipe import load_recipe

GRIDS = [
    Grid(bits, group, kind, symmetric)
    for bits in BITS
    for group, kind, symmetric in ((16, "int", True), (8, "int", False), (0, "int", False), (16, "mxint", True))
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CORRECTIONS = ["lqer", "l2qer", "qera-approx", "qera", "zeroquant-v2", "caldera"]


def solved(name, weight, x, **chosen):
    """(options for a 16-bit checkpoint, solution) of a method on these inputs."""
    picked = get_method(name)
    wanted = picked.settings(**chosen)
    return picked.options(Shape(*weight.shape, 2), wanted, 1), picked.solve(weight, statistics(x), wanted)


@given(bits=st.sampled_from(BITS), rows=st.integers(1, 5), count=st.integers(1, 70), seed=st.integers(0, 99))
def test_packing_loses_nothing_and_pads_rows_to_bytes_only(bits, rows, count, seed):
    codes = torch.randint(2**bits, (rows, count), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (rows, math.ceil(count * bits / 8)) == (rows, packed_width(count, bits))
    stream = (codes.numpy()[..., None] >> np.arange(bits) & 1).reshape(rows, -1)
    assert np.array_equal(packed.numpy(), np.packbits(stream, axis=1, bitorder="little"))
    assert torch.equal(unpack(packed, bits, count), codes)


def on_grid(row: np.ndarray, grid: Grid) -> np.ndarray:
    """One group of a row on a grid, written value by value."""
    levels, largest = 2**grid.bits, np.abs(row).max()
    if largest == 0:
        return np.zeros_like(row)
    zero, low = levels // 2, min(row.min(), 0.0)
    if grid.kind == "mxint":
        step = 2.0 ** (math.floor(math.log2(largest)) - grid.bits + 2)
    else:
        span = 2 * largest if grid.symmetric else max(row.max(), 0.0) - low
        step = float(torch.tensor(span / (levels - 1)).bfloat16())
        zero = zero if grid.symmetric else round(-low / step)
    return np.array([(min(max(round(value / step) + zero, 0), levels - 1) - zero) * step for value in row])


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("in_features", [32, 27])
def test_rounding_against_one_value_at_a_time(grid, in_features):
    weight = torch.randn(5, in_features, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight[1], weight[2] = weight[1].abs() + 3, 0.0
    width = grid.group_size or in_features
    expected = [
        np.concatenate([on_grid(row[i : i + width], grid) for i in range(0, in_features, width)]) for row in weight.numpy()
    ]
    assert np.allclose(Quantized.nearest(weight, grid).dense().numpy(), np.stack(expected), rtol=1e-12, atol=0)


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid.kind == "int"], ids=str)
def test_no_value_is_further_off_than_half_a_step(grid):
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    form = Quantized.nearest(weight, grid)
    steps = form.scales.steps.repeat_interleave(grid.width(64), dim=1)
    # a step of eight bits may be a 2^-9th part too small, which the extreme value of a group feels; so does its zero's rounding
    slack = 2.0**-9 * grid.top + (0 if grid.symmetric else 0.5)
    assert float(((weight - form.dense()).abs() / steps).max()) <= 0.5 + slack


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("in_features", [32, 27])
def test_what_is_stored_is_what_the_module_multiplies_by(dtype, grid, in_features):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(11, in_features, generator=generator, dtype=torch.float64)
    weight[3] *= 1e-3
    low = LowRank(torch.randn(11, 3, generator=generator).double(), torch.randn(3, in_features, generator=generator).double())
    both = QuantizedLowRank(Quantized.nearest(weight, grid), low)
    on_grids = quantize_factors(low.dense(), low.left, low.right, Metric(), OnGrid(grid))
    x = torch.randn(6, in_features, generator=generator).to(dtype)
    for whole in (both.base, both, QuantizedLowRank(both.base, on_grids)):
        form = whole.with_bias(torch.randn(11, generator=generator)).stored(dtype)
        assert form.dense().dtype == dtype
        assert torch.allclose(form.dense().double(), whole.dense(), rtol=0.02, atol=0.05)
        module = build_module(json.loads(json.dumps(form.spec())), in_features, 11, dtype)
        fill_module(module, form.tensors())
        assert torch.equal(module.matrix(dtype), form.dense())
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
        expected = x.double() @ form.dense().double().T + module.bias.double()
        assert torch.allclose(module(x).double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    # a change of dtype leaves codes alone, and steps of eight bits are the same in every dtype
    again = module.to(torch.float64)
    assert again.weight.dtype == torch.uint8
    assert torch.allclose(again.matrix(torch.float64), form.dense().double(), rtol=0.02, atol=0.05)


def data_bytes(tensors) -> int:
    """Bytes of a safetensors file behind its header."""
    raw = save(tensors)
    return len(raw) - 8 - int.from_bytes(raw[:8], "little")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "chosen"),
    [(name, {"bits": bits}) for name in ("rtn", "gptq") for bits in BITS]
    + [(name, {"rank": 3, "bits": bits, "factor_bits": f}) for name in CORRECTIONS for bits in (2, 3) for f in (16, 8)]
    + [("caldera", {"rank": 3, "code": "trellis", "state_bits": 6, "factor_bits": f}) for f in (16, 8)]
    + [("caldera", {"rank": 3, "factor_code": "e8", "factor_bits": 4, **code}) for code in ({}, {"code": "e8"})]
    + [("qera", {"rank": 0}), ("caldera", {"rank": 99}), ("lqer", {"rank": 3, "grid": "mxint", "factor_bits": 8})],
)
def test_a_file_has_the_bytes_of_its_option(name, chosen, dtype):
    weight, x = problem(26, 37, tokens=60)
    picked = get_method(name)
    for group in (16, 0):
        wanted = picked.settings(
            **({"group_size": group, "rounds": 1} if name == "caldera" else {"group_size": group}), **chosen
        )
        element = torch.empty((), dtype=dtype).element_size()
        for option in picked.options(Shape(26, 37, element), wanted, 1):
            form = picked.solve(weight, statistics(x), wanted).form(option.choice).stored(dtype)
            assert data_bytes(form.tensors()) == form.nbytes == option.nbytes < 26 * 37 * element


def test_bits_per_weight_count_everything():
    """METHODS: LQER's 4.63 bits at 4096 x 4096 with one byte per block of 16, which its authors print as 4.38."""
    options = get_method("lqer").options(
        Shape(4096, 4096, 2), get_method("lqer").settings(grid="mxint", group_size=16, factor_bits=8, rank=32), 1
    )
    assert 8 * options[0].nbytes / 4096**2 == pytest.approx(4.5 + 0.133, abs=2e-3)


def textbook_gptq(
    weight: np.ndarray, gram: np.ndarray, group: int, bits: int, order: np.ndarray | None, symmetric: bool
) -> np.ndarray:
    """Algorithm 1 of the paper: rows of the Cholesky factor of the inverse, updates to the right."""
    count = weight.shape[1]
    damped = gram + 0.01 * gram.diagonal().mean() * np.eye(count)
    columns = np.arange(count) if order is None else order
    inverse = np.linalg.inv(damped[np.ix_(columns, columns)])
    upper = np.linalg.cholesky(inverse).T
    left, result = weight[:, columns].copy(), np.zeros_like(weight)
    top = 2**bits - 1

    def step(values: np.ndarray) -> tuple[np.ndarray, np.ndarray | int]:
        """Of a group, and the code of the value 0."""
        low, high = np.minimum(values.min(1), 0), np.maximum(values.max(1), 0)
        span = 2 * np.abs(values).max(1) if symmetric else high - low
        size = torch.tensor(span / top).bfloat16().double().numpy()
        return size, 2 ** (bits - 1) if symmetric else np.clip(np.round(-low / size), 0, top)

    static = [step(weight[:, i : i + group]) for i in range(0, count, group)]
    for i, column in enumerate(columns):
        if order is not None:
            size, zero = static[column // group]
        elif i % group == 0:
            size, zero = step(left[:, i : i + group])
        result[:, column] = (np.clip(np.round(left[:, i] / size) + zero, 0, top) - zero) * size
        left[:, i + 1 :] -= np.outer((left[:, i] - result[:, column]) / upper[i, i], upper[i, i + 1 :])
    return result


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("in_features", "group"), [(30, 8), (300, 32), (300, 200)])
def test_gptq_against_the_papers_algorithm(symmetric, act_order, in_features, group):
    weight, x = problem(12, in_features, tokens=2 * in_features)
    gram = (x.T @ x / len(x)).numpy()
    order = np.argsort(-gram.diagonal(), kind="stable") if act_order else None
    expected = textbook_gptq(weight.numpy(), gram, group, 3, order, symmetric)
    _, solution = solved("gptq", weight, x, bits=3, group_size=group, symmetric=symmetric, act_order=act_order)
    assert np.allclose(solution.form(Choice(bits=3)).dense().numpy(), expected, rtol=1e-9)
    assert solution.damping == 0.01
    assert solution.loss(Choice(bits=3)) == pytest.approx(error(weight, torch.tensor(expected), x), rel=1e-9)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("grid", ["int", "mxint"])
def test_gptq_is_better_than_rounding(act_order, bits, grid):
    weight, x = problem(40, 150, tokens=600)
    _, plain = solved("rtn", weight, x, bits=bits, grid=grid, group_size=32)
    _, better = solved("gptq", weight, x, bits=bits, grid=grid, group_size=32, act_order=act_order)
    assert better.loss(Choice(bits=bits)) < plain.loss(Choice(bits=bits))


def test_gptq_takes_a_singular_gram_and_says_what_it_added():
    weight, x = problem(8, 40, tokens=6)
    x[:, 7] = 0
    _, solution = solved("gptq", weight, x, damping=0.0, group_size=8)
    assert 0 < solution.damping <= 1e-6
    _, plain = solved("rtn", weight, x, group_size=8)
    assert solution.loss(Choice(bits=4)) < 0.2 * plain.loss(Choice(bits=4))
    # an input that never fires takes no part: its column is rounded to nearest on its group's steps
    form = solution.form(Choice(bits=4))
    assert float((form.dense()[:, 7] - weight[:, 7]).abs().max()) <= float(form.scales.steps[:, 0].max()) * 1.1


def test_no_token_at_all_is_rounding():
    weight, _ = problem(8, 40, tokens=1)
    nothing = torch.zeros(1, 40, dtype=torch.float64)
    for name in ("gptq", *CORRECTIONS):
        options, solution = solved(name, weight, nothing, bits=4, **({} if name == "gptq" else {"rank": 2}))
        form = solution.form(options[0].choice)
        base = form if name == "gptq" else form.base  # an option with factors gives a form with factors
        assert torch.equal(base.dense(), Quantized.nearest(weight, Grid(4, 64, symmetric=False)).dense())
        assert torch.isfinite(form.dense()).all()


def test_a_matrix_that_is_no_gram_is_refused():
    with pytest.raises(LrcError, match="negative eigenvalues"):
        compensator(torch.tensor([[1.0, 9.0], [9.0, 1.0]]))
    with pytest.raises(NonFiniteError, match="not finite"):
        compensator(torch.tensor([[1.0, 0.0], [0.0, torch.nan]]))
    with pytest.raises(NonFiniteError, match="1 of 4 values"):
        Quantized.nearest(torch.tensor([[1.0, 2.0], [torch.inf, 1.0]]), Grid(4))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_corrections_against_the_papers_formulas(shape):
    weight, x = problem(*shape, tokens=300)
    base = Quantized.nearest(weight, Grid(3, 16, symmetric=False)).dense().numpy()
    left_over = weight.numpy() - base
    # one sample of 300 tokens: its mean magnitude is the peak
    magnitude = np.abs(x.numpy()).mean(0)
    roots = {
        "lqer": np.eye(shape[1]),
        "zeroquant-v2": np.eye(shape[1]),
        "l2qer": np.diag(magnitude / np.sqrt(magnitude.min() * magnitude.max())),
        "qera-approx": np.diag(np.sqrt((x.numpy() ** 2).mean(0))),
        "qera": scipy.linalg.sqrtm((x.T @ x / len(x)).numpy()).real,
    }
    for name, root in roots.items():
        left, values, right = np.linalg.svd(left_over @ root, full_matrices=False)
        expected = base + (left[:, :5] * values[:5]) @ right[:5] @ np.linalg.inv(root)
        options, solution = solved(name, weight, x, bits=3, group_size=16, rank=5, factor_bits=16)
        assert np.allclose(solution.form(options[0].choice).dense().numpy(), expected, atol=1e-6)
        assert solution.loss(options[0].choice) == pytest.approx((values[5:] ** 2).sum(), rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(out_features=st.integers(2, 24), in_features=st.integers(2, 24), tokens=st.integers(1, 60), seed=st.integers(0, 99))
def test_loss_never_rises_with_rank_and_full_rank_is_exact(out_features, in_features, tokens, seed):
    """Singular grams included."""
    weight, x = problem(out_features, in_features, tokens, seed)
    full = min(out_features, in_features)
    for name in ("lqer", "l2qer", "qera-approx", "qera"):
        _, solution = solved(name, weight, x, bits=2, rank=None)
        losses = [solution.loss(Choice(rank=rank, bits=2)) for rank in range(full + 1)]
        assert all(a >= b - 1e-9 * solution.total for a, b in pairwise(losses))
        assert torch.allclose(solution.form(Choice(rank=full, bits=2)).dense(), weight, atol=1e-6 * float(weight.abs().max()))
        if name == "qera":
            for rank in range(full + 1):
                measured = error(weight, solution.form(Choice(rank=rank, bits=2)).dense(), x)
                assert measured == pytest.approx(losses[rank], rel=1e-4, abs=1e-9 * solution.total)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("factor_bits", [16, 8])
def test_the_exact_correction_leaves_the_least_output_error(bits, factor_bits):
    weight, x = problem(60, 80, tokens=500)
    wanted = {"bits": bits, "rank": 6, "factor_bits": factor_bits, "group_size": 16}
    measured = {"rtn": error(weight, solved("rtn", weight, x, bits=bits, group_size=16)[1].form(Choice(bits=bits)).dense(), x)}
    for name in ("lqer", "l2qer", "qera-approx", "qera"):
        options, solution = solved(name, weight, x, **wanted)
        measured[name] = error(weight, solution.form(options[0].choice).dense(), x)
    assert measured["qera"] <= min(measured.values()) * (1 + 1e-9)
    assert measured["l2qer"] < measured["lqer"] < measured["rtn"]
    assert measured["qera-approx"] < measured["lqer"]
    options, on_gptq = solved("qera", weight, x, base="gptq", **wanted)
    assert on_gptq.loss(options[0].choice) < measured["qera"]
    options, alternating = solved("caldera", weight, x, **wanted)
    assert alternating.loss(options[0].choice) <= on_gptq.loss(options[0].choice) * (1 + 1e-9)
    assert alternating.loss(options[0].choice) == pytest.approx(error(weight, alternating.form(options[0].choice).dense(), x))


def test_more_rounds_never_make_caldera_worse():
    weight, x = problem(48, 64, tokens=400)
    losses = []
    for rounds in (1, 2, 5):
        options, solution = solved("caldera", weight, x, bits=3, rank=8, rounds=rounds, group_size=16)
        losses.append(solution.loss(options[0].choice))
    assert losses[0] >= losses[1] >= losses[2] and losses[0] > losses[2]


@pytest.mark.parametrize("code", ["e8", "trellis"])
def test_caldera_on_a_code_is_better_than_on_a_grid_of_the_same_bits_and_than_its_code_alone(code):
    weight, x = problem(64, 96, tokens=400)
    of_the_code = {"code": code} | ({"state_bits": 8} if code == "trellis" else {})
    asked = {"bits": 2, "rank": 6, "rounds": 3, "factor_bits": 4, "group_size": 32}
    (option,), solution = solved("caldera", weight, x, **asked, **of_the_code)
    (of_grid,), on_grid = solved("caldera", weight, x, **asked)
    assert option.nbytes < of_grid.nbytes
    form = solution.form(option.choice)
    assert solution.loss(option.choice) == pytest.approx(error(weight, form.dense(), x))
    assert solution.loss(option.choice) < on_grid.loss(of_grid.choice)
    assert solution.loss(option.choice) < solution.loss(Choice(rank=0))
    alone = get_method("trellis")
    (bare,) = alone.options(Shape(64, 96, 2), settings := alone.settings(bits=2, **of_the_code), 1)
    assert solution.loss(Choice(rank=0)) == alone.solve(weight, statistics(x), settings).loss(bare.choice)
    stored = form.with_bias(torch.ones(64)).stored(torch.bfloat16)
    module = fill_module(build_module(stored.spec(), 96, 64, torch.bfloat16), stored.tensors())
    inputs = x[:5].bfloat16()
    expected = inputs.double() @ stored.dense().double().T + 1
    assert torch.allclose(module(inputs).double(), expected, atol=0.02 * float(expected.abs().max()))


@pytest.mark.parametrize(("key", "bits"), [("code", "bits"), ("factor_code", "factor_bits")])
def test_caldera_with_bits_that_its_code_does_not_have(key, bits):
    with pytest.raises(RecipeError, match=f"e8 has 2, 3, 4 bits, and {bits} is 8; null takes a grid"):
        load_recipe("caldera", {f"settings.{key}": "e8", f"settings.{bits}": 8})


@pytest.mark.parametrize("rank", [4, 12, 20])
def test_factors_in_a_code_lose_less_than_on_a_grid_of_as_many_bits(rank):
    weight, x = problem(64, 96, tokens=400)
    stats, gram = statistics(x), x.T @ x / len(x)
    picked = get_method("svd-llm")
    form = picked.solve(weight, stats, picked.settings()).form(Choice(rank=rank))
    best = error(weight, form.dense(), x)

    def lost(bits, rounds=3):
        """What quantizing adds to the error."""
        product = quantize_factors(weight, form.left, form.right, Metric.of(stats), bits, rounds)
        assert len(product.right.dense()) == rank
        return error(weight, product.dense(), x) - best

    on_grid = lost(OnGrid(Grid(4, 64), compensator(gram)))
    trellis, lattice = (InOneCode.of(Code.of(kind, 4, 10), 11, gram, 0.01) for kind in ("trellis", "e8"))
    assert 0 < lost(trellis) < 0.6 * on_grid
    assert lost(trellis) < lost(trellis, rounds=1)
    assert lost(lattice) < 1.3 * on_grid  # it has no scale for each row, and a third of a bit less


def test_factors_are_quantized_with_the_left_one_refitted():
    weight, x = problem(50, 70, tokens=400)
    stats = statistics(x)
    picked = get_method("svd-llm")
    form = picked.solve(weight, stats, picked.settings()).form(Choice(rank=20))
    metric, ready = Metric.of(stats), compensator(stats.group.gram)
    at = {}
    for base, by in (("rtn", None), ("gptq", ready)):
        product = quantize_factors(weight, form.left, form.right, metric, OnGrid(Grid(3, 16), by)).with_bias(torch.ones(50))
        at[base] = error(weight, product.dense(), x)
        assert torch.equal(product.left.bias, torch.ones(50, dtype=torch.float64))
        assert product.stored(torch.float16).nbytes == Grid(3, 16).nbytes(20, 70, 2) + Grid(3, 16).nbytes(50, 20, 2)
    apart = Quantized.nearest(form.left, Grid(3, 16)).dense() @ Quantized.nearest(form.right, Grid(3, 16)).dense()
    assert at["gptq"] < at["rtn"] < error(weight, apart, x)
    eight = quantize_factors(form.dense(), form.left, form.right, metric, OnGrid(Grid(8, 16), ready))
    assert error(weight, eight.dense(), x) == pytest.approx(error(weight, form.dense(), x), rel=1e-2)


def test_steps_that_float16_cannot_hold_are_rounded_before_codes_are_chosen():
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 3e-5
    form = Quantized.nearest(weight, Grid(4, 16)).stored(torch.float16)
    steps = form.scales.steps.double().repeat_interleave(16, 1)
    assert float(((weight - form.dense().double()).abs() / steps).max()) <= 0.6
    assert torch.isfinite(Quantized.nearest(weight * 1e-4, Grid(4, 16)).stored(torch.float16).dense()).all()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"settings.bits": 7}, "2, 3, 4, 5, 6 or 8"),
        ({"settings.grid": "mxint", "settings.symmetric": False}, "settings.symmetric: an mxint grid is symmetric"),
        ({"settings.group_size": -1}, "settings.group_size"),
        ({"settings.groupsize": 64}, "Did you mean 'group_size'"),
    ],
)
def test_settings_that_make_no_grid_are_refused(wrong, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe("qera", wrong)
