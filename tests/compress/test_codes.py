"""Rotations, codes and error feedback, against matrices and searches written out in float64."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import scipy.linalg
import torch
from problems import problem, statistics
from pydantic import ValidationError

from lrc.compress.base import get_method
from lrc.compress.forms.base import build_module, fill_module
from lrc.compress.forms.codes import few_rows, reading
from lrc.compress.forms.codes.code import BITS, TILE, Code, from_tiles, to_tiles
from lrc.compress.forms.codes.encoded import Encoded
from lrc.compress.forms.codes.rotation import rotate, rotate_back, rotate_both, rotate_both_back, signs
from lrc.compress.forms.codes.tables import FACTOR, lattice_vectors, scalar_levels, small_lattice_vectors, trellis_values
from lrc.compress.metric import Metric
from lrc.compress.options import Choice, Shape, coarsest
from lrc.compress.quantize.encoding.compiled import viterbi_compiled
from lrc.compress.quantize.encoding.feedback import encode_columns
from lrc.compress.quantize.encoding.nearest import encode_lattice, encode_scalar, nearest_in_lattice
from lrc.compress.quantize.encoding.viterbi import encode_trellis, viterbi
from lrc.compress.quantize.gptq import compensator
from lrc.compress.quantize.trellis import code_options
from lrc.errors import NonFiniteError, RecipeError
from lrc.plan.load_recipe import load_recipe

CPU = torch.device("cpu")
CODES = [Code("trellis", bits, 8) for bits in BITS["trellis"]] + [
    Code(kind, n) for kind in ("e8", "scalar") for n in BITS[kind]
]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation_matrix(size: int, seed: int) -> np.ndarray:
    """Q as an explicit matrix: (Hadamard of the power of two ⊗ Hartley of the odd factor) · diag(signs)."""
    power = size & -size
    odd = size // power
    turn = 2 * np.pi * np.outer(np.arange(odd), np.arange(odd)) / odd
    mixing = np.kron(scipy.linalg.hadamard(power) / power**0.5, (np.cos(turn) + np.sin(turn)) / odd**0.5)
    return mixing * signs(size, seed, CPU, torch.float64).numpy()


@pytest.mark.parametrize("size", [1, 2, 9, 24, 129, 192, 576, 1536])
def test_a_rotation_is_its_explicit_matrix_and_spreads_every_unit_vector(size):
    matrix = rotation_matrix(size, 5)
    x = gaussian(3, 2, size)
    assert np.allclose(rotate(x, 5).numpy(), x.numpy() @ matrix.T, atol=1e-10)
    assert np.allclose(rotate_back(x, 5).numpy(), x.numpy() @ matrix, atol=1e-10)
    assert np.allclose(matrix @ matrix.T, np.eye(size), atol=1e-10)
    assert np.abs(matrix).max() <= (2 / size) ** 0.5 + 1e-9


def test_both_sides_are_rotated_and_signs_differ_between_seeds():
    weight = gaussian(24, 40)
    turned = rotate_both(weight, 7)
    assert np.allclose(turned.numpy(), rotation_matrix(24, 8) @ weight.numpy() @ rotation_matrix(40, 7).T, atol=1e-10)
    assert torch.allclose(rotate_both_back(turned, 7), weight, atol=1e-10)
    drawn = torch.stack([signs(4096, seed, CPU, torch.float64) for seed in range(20)])
    assert (drawn.mean(1).abs() < 5 / 64).all()
    assert ((drawn @ drawn.T / 4096 - torch.eye(20)).abs() < 5 / 64).all()


def test_an_outlier_is_gone_after_a_rotation():
    weight = gaussian(64, 96)
    weight[3, 5], weight[:, 9] = 500.0, weight[:, 9] * 30
    turned = rotate_both(weight, 1)
    assert weight.abs().max() / weight.square().mean().sqrt() > 50
    assert turned.abs().max() / turned.square().mean().sqrt() < 6


def lloyd_max(bits: int) -> np.ndarray:
    """Levels by Lloyd's iteration on a million quantiles of a Gaussian."""
    from scipy.stats import norm

    points = norm.ppf((np.arange(1_000_000) + 0.5) / 1_000_000)
    levels = np.quantile(points, (np.arange(2**bits) + 0.5) / 2**bits)
    for _ in range(300):
        edges = np.searchsorted(points, (levels[1:] + levels[:-1]) / 2)
        levels = np.array([part.mean() for part in np.split(points, edges)])
    return levels


@pytest.mark.parametrize("bits", [2, 3])
def test_scalar_levels_are_those_of_lloyd_and_max(bits):
    assert np.allclose(scalar_levels(bits, CPU).numpy(), lloyd_max(bits), atol=2e-3)


def test_lattice_codes_are_points_of_e8():
    vectors = lattice_vectors(CPU).double()
    assert len(vectors.unique(dim=0)) == 1 << 16
    up = torch.arange(1 << 16) >> 15 == 1
    for shifted, shift in ((vectors[up], 0.25), (vectors[~up], -0.25)):
        halves = shifted - shift
        assert torch.equal(halves % 1, torch.full_like(halves, 0.5)), "half-integers"
        assert (halves.sum(1) % 2 == 0).all(), "with an even sum"
    small = small_lattice_vectors(CPU).double()
    assert len(small.unique(dim=0)) == 256
    assert ((small % 1 == 0).all(1) | (small % 1 == 0.5).all(1)).all() and (small.sum(1) % 2 == 0).all()


def test_the_nearest_vector_of_e8p_is_that_of_a_search_over_all():
    vectors = gaussian(300, 8) * 1.2
    table = lattice_vectors(CPU).double()
    found = (table[nearest_in_lattice(vectors.float())] - vectors).square().sum(1)
    assert torch.allclose(found, torch.cdist(vectors, table).min(1).values.square(), atol=1e-5)


def cheapest_of_all(values: np.ndarray, code: Code, ring: int | None) -> float:
    """The least squared error over every sequence of states, in float64."""
    table, count = trellis_values(code.state_bits, CPU).double().numpy(), 1 << code.state_bits
    low = 1 << (code.state_bits - code.bits)
    best = np.inf
    before = range(low) if ring is None else [ring]
    for kept, symbols in product(before, product(range(1 << code.bits), repeat=len(values))):
        cost = 0.0
        for value, symbol in zip(values, symbols, strict=True):
            state = (kept << code.bits | symbol) % count
            cost, kept = cost + (value - table[state]) ** 2, state % low
        if ring is None or kept == ring:
            best = min(best, cost)
    return best


@pytest.mark.parametrize("ring", [None, 11])
@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("search", [viterbi, viterbi_compiled])
def test_viterbi_finds_the_best_of_all_sequences(search, bits, ring):
    if search is viterbi_compiled:
        pytest.importorskip("numba")
    code, values = Code("trellis", bits, 6), gaussian(4 if bits == 2 else 3, 3)
    given = None if ring is None else torch.tensor([ring % (1 << (6 - bits))] * 3)
    ring = None if ring is None else int(given[0])
    states = search(values.float(), code, given)
    low = 1 << (6 - bits)
    assert torch.equal(states[1:] >> bits, states[:-1] % low), "each state continues the one before"
    if ring is not None:
        assert (states[0] >> bits == ring).all() and (states[-1] % low == ring).all()
    found = (trellis_values(6, CPU)[states].double() - values).square().sum(0)
    assert np.allclose(found.numpy(), [cheapest_of_all(column, code, ring) for column in values.T.numpy()], atol=1e-5)


@pytest.mark.parametrize("bits", BITS["trellis"])
def test_a_tile_of_a_trellis_is_a_ring_that_costs_its_bits(bits):
    code = Code("trellis", bits, 9)
    packed = encode_trellis(gaussian(3, TILE), code)
    assert packed.shape == (3, TILE * bits // 8) and packed.dtype == torch.uint8
    states = code.states(packed).long()
    assert torch.equal(states >> bits, states.roll(1, 1) % (1 << (9 - bits))), "the last state continues in the first"


def distortion(code: Code, tiles: int) -> float:
    encode = {"trellis": encode_trellis, "e8": encode_lattice, "scalar": encode_scalar}[code.kind]
    values = gaussian(tiles, TILE, seed=12)
    return float((code.values(encode(values, code)) - values).square().mean())


# Theoretical for single values (Max 1960). Published: E8P 0.089 (QuIP#), trellises of 2^16 states 0.069 at 2 bits (QTIP). No
# code of b bits is below 4^-b.
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (Code("scalar", 2), 0.1175), (Code("scalar", 3), 0.03454), (Code("scalar", 4), 0.009497),
        (Code("e8", 2), 0.0912), (Code("e8", 3), 0.0297), (Code("e8", 4), 0.0085),
        (Code("trellis", 1, 10), 0.2909),
        (Code("trellis", 2, 10), 0.0780), (Code("trellis", 3, 10), 0.0210), (Code("trellis", 4, 10), 0.0060),
    ],
    ids=str,
)  # fmt: skip
def test_distortion_on_a_gaussian_is_the_published_one(code, expected):
    found = distortion(code, 128)
    assert found == pytest.approx(expected, rel=0.03)
    assert found > 4.0**-code.bits


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "expected"), [(2, 0.069), (3, 0.0178), (4, 0.0046)])
def test_a_trellis_of_65536_states_comes_close_to_the_bound(bits, expected):
    assert distortion(Code("trellis", bits, 16), 60) == pytest.approx(expected, rel=0.04)


@pytest.mark.parametrize("state_bits", [6, 12, 16])
@pytest.mark.parametrize("bits", BITS["trellis"])
def test_compiled_codes_are_read_as_by_torch_to_the_last_bit(bits, state_bits, monkeypatch):
    pytest.importorskip("numba")
    code = Code("trellis", bits, state_bits)
    codes = torch.randint(0, 256, (5, 3, code.nbytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    expected = from_tiles(code.values(codes.flatten(0, 1)).view(5, 3, TILE))
    assert reading.can_read(code, codes)
    assert torch.equal(reading.read_trellis(code, codes), expected)
    monkeypatch.setattr(reading, "_ALONE", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(reading.read_trellis(code, codes), expected)
    finally:
        torch.set_num_threads(before)


def test_values_of_a_trellis_are_sums_of_the_bytes_of_a_product():
    sums = np.array([sum((state * FACTOR % 2**32).to_bytes(4, "little")) - 510 for state in range(1 << 12)])
    values = trellis_values(12, CPU).double().numpy()
    assert np.allclose(values, sums / np.sqrt(np.mean(np.square(sums, dtype=float))), rtol=1e-6)
    assert abs(values.mean()) < 0.01


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("shape", [(24, 40), (40, 19), (96, 72), (16, 64)])
@pytest.mark.parametrize("bits", BITS["trellis"])
def test_few_rows_are_multiplied_by_compiled_code(bits, shape, seed, threads, monkeypatch):
    """Odd factors, edges within a tile, powers of two, one row and several, one thread and more; against float64."""
    pytest.importorskip("numba")
    monkeypatch.setattr(few_rows, "_ALONE", 0)
    code = Code("trellis", bits, 12)
    rows, columns = -(-shape[0] // 16), -(-shape[1] // 16)
    draw = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 256, (rows, columns, code.nbytes), dtype=torch.uint8, generator=draw)
    form = Encoded(code, codes, gaussian(columns).abs(), shape, seed, gaussian(shape[0]), gaussian(shape[0])).stored(
        torch.float32
    )
    module = fill_module(build_module(form.spec(), shape[1], shape[0], torch.float32), form.tensors())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for count in (1, 2, 7):
            inputs = gaussian(count, shape[1]).float()
            assert not few_rows.can_multiply(code, module.weight, inputs, shape, seed is not None), "there may be gradients"
            with torch.inference_mode():
                assert few_rows.can_multiply(code, module.weight, inputs, shape, seed is not None)
                found = module(inputs)
            expected = inputs.double() @ form.dense().double().T + form.bias.double()
            assert (found - expected).norm() < 1e-6 * expected.norm()
            assert torch.allclose(found, module(inputs), atol=1e-4 * float(expected.abs().max())), (
                "and as by torch's operations"
            )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize("code", ["trellis", "scalar"])
def test_many_rows_multiply_as_few_do(code, gains):
    """Beyond some rows the matrix is rotated back instead of inputs and outputs: the same product."""
    weight, x = problem(40, 72, 200, seed=3)
    form = (
        solved(weight, x, code=code, bits=3, gains=gains)[1].form(Choice(bits=3)).with_bias(gaussian(40)).stored(torch.float32)
    )
    module = fill_module(build_module(form.spec(), 72, 40, torch.float32), form.tensors())
    inputs = gaussian(3, 100, 72).float()
    many, few = module(inputs), torch.stack([torch.stack([module(row) for row in each]) for each in inputs])
    assert torch.allclose(many, few, atol=1e-5 * float(few.abs().max()))


def test_tiles_hold_every_value_and_zeros_beyond_the_edge():
    matrix = gaussian(37, 50)
    tiles = to_tiles(matrix)
    assert tiles.shape == (3, 4, TILE)
    whole = from_tiles(tiles)
    assert torch.equal(whole[:37, :50], matrix) and whole.square().sum() == matrix.square().sum()
    assert torch.equal(tiles[1, 2].view(16, 16), whole[16:32, 32:48])


def test_feedback_makes_each_block_the_nearest_to_what_cancels_the_errors_before_it():
    """The definition, with inverses: Ŵ_own is nearest to W_own + E_before R_before R_own⁻¹."""
    weight, x = problem(48, 40, 400, seed=2)
    factor = compensator(statistics(x).group.gram, 0.01, act_order=False).factor
    code = Code("scalar", 2)
    codes, scales = encode_columns(weight.double(), factor, code)
    found = (from_tiles(code.values(codes.flatten(0, 1)).view(*codes.shape[:2], TILE)).double() * scales.repeat_interleave(16))[
        :, :40
    ]
    errors, levels = weight.double() - found, scalar_levels(2, CPU).double()
    for start in range(0, 40, 16):
        own = slice(start, min(start + 16, 40))
        wanted = weight.double()[:, own] + errors[:, :start] @ factor[:start, own] @ torch.linalg.inv(factor[own, own])
        scale = scales[start // 16]
        assert float(scale) == pytest.approx(float(wanted.square().mean().sqrt()), rel=2**-8)
        nearest = levels[(wanted[..., None] / scale - levels).abs().argmin(-1)] * scale
        assert (nearest - found[:, own]).abs().max() < 1e-5 * float(scale)


def solved(weight, x, **chosen):
    picked = get_method("trellis")
    settings = picked.settings(**{"state_bits": 8} | chosen)
    return picked.options(Shape(*weight.shape, 2), settings, 1), picked.solve(weight, statistics(x), settings)


@pytest.mark.parametrize("code", ["trellis", "e8", "scalar"])
def test_rotation_and_feedback_each_lower_the_loss_of_a_weight_with_outliers(code):
    weight, x = problem(96, 96, 600, seed=1)
    weight[:, ::31] *= 12
    losses = {
        (rotated, feedback): solved(weight, x, code=code, bits=3, rotate=rotated, feedback=feedback)[1].loss(Choice(bits=3))
        for rotated, feedback in product((False, True), repeat=2)
    }
    assert losses[True, False] < losses[False, False]
    assert losses[False, True] < losses[False, False]
    assert losses[True, True] < min(losses[True, False], losses[False, True])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(24, 40), (40, 19)])
@pytest.mark.parametrize("code", CODES, ids=str)
def test_the_module_multiplies_by_the_matrix_and_holds_packed_codes(code, shape, dtype):
    weight, x = problem(*shape, 200, seed=3)
    settings = {"code": code.kind, "bits": code.bits}
    (option,), solution = solved(weight, x, **settings)
    form = solution.form(option.choice).with_bias(gaussian(shape[0])).stored(dtype)
    assert form.nbytes == option.nbytes == 2 * (-(-shape[1] // 16)) + form.codes.numel() * 1 if dtype != torch.float32 else True
    module = fill_module(build_module(form.spec(), shape[1], shape[0], dtype), form.tensors())
    assert sum(p.numel() * p.element_size() for p in module.parameters() if p.dtype == torch.uint8) == form.codes.numel()
    assert torch.equal(form.scales.double(), solution.form(option.choice).scales), "every dtype holds the scales exactly"
    slack = 1e-5 if dtype == torch.float32 else 0.02
    exact = form.dense().double()
    assert torch.allclose(
        module.matrix(torch.float32).double(), exact, atol=max(1e-5, torch.finfo(dtype).eps) * exact.abs().max()
    )
    inputs = gaussian(2, 3, shape[1]).to(dtype)
    expected = inputs.double() @ exact.T + form.bias.double()
    assert torch.allclose(module(inputs).double(), expected, atol=slack * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gains_are_the_least_squares_of_each_output_and_cost_their_bytes(dtype):
    weight, x = problem(40, 64, 200, seed=3)
    plain, fitted = (solved(weight, x, bits=2, gains=gains) for gains in (False, True))
    choice = plain[0][0].choice
    before, form = plain[1].form(choice), fitted[1].form(choice)
    outputs, wanted = x @ before.dense().T, x @ weight.T
    for row in range(40):
        expected = torch.linalg.lstsq(outputs[:, row : row + 1], wanted[:, row]).solution
        assert float(form.gains[row]) == pytest.approx(float(expected), rel=1e-6)
    assert fitted[1].loss(choice) < plain[1].loss(choice)
    assert fitted[0][0].nbytes == plain[0][0].nbytes + 2 * 40 == form.stored(torch.bfloat16).nbytes
    stored = form.with_bias(gaussian(40)).stored(dtype)
    module = fill_module(build_module(stored.spec(), 64, 40, dtype), stored.tensors())
    inputs = gaussian(3, 64).to(dtype)
    exact = inputs.double() @ stored.dense().double().T + stored.bias.double()
    slack = 1e-5 if dtype == torch.float32 else 0.02
    assert torch.allclose(module(inputs).double(), exact, atol=slack * float(exact.abs().max()))
    assert torch.allclose(
        module.matrix(torch.float32).double(), stored.dense().double(), atol=slack * float(weight.abs().max())
    )


def test_scales_gains_and_inputs_have_gradients():
    weight, x = problem(24, 40, 100, seed=3)
    _, solution = solved(weight, x, bits=2, gains=True)
    form = solution.form(Choice(bits=2)).stored(torch.float32)
    module = fill_module(build_module(form.spec(), 40, 24, torch.float32), form.tensors())
    module.scales.requires_grad_(True)
    module.gains.requires_grad_(True)
    inputs = gaussian(5, 40).float().requires_grad_(True)
    module(inputs).square().sum().backward()
    outputs = inputs.detach().double() @ form.dense().double().T
    assert torch.allclose(inputs.grad.double(), 2 * outputs @ form.dense().double(), rtol=1e-3, atol=1e-3)
    # y is linear in the scales and in the gains: Σ scale · ∂f/∂scale = 2 f
    for factor in (module.scales, module.gains):
        assert float((factor.detach() * factor.grad).sum()) == pytest.approx(2 * float(outputs.square().sum()), rel=1e-4)


def test_losses_are_output_errors_and_fall_with_bits():
    weight, x = problem(48, 64, 500, seed=5)
    options, solution = solved(weight, x, bits=None)
    losses = [solution.loss(option.choice) for option in options]
    assert [option.choice.bits for option in options] == [1, 2, 3, 4, 5, 6]
    assert losses == sorted(losses, reverse=True)
    error = weight.double() - solution.form(Choice(bits=3)).dense()
    assert losses[2] == pytest.approx(Metric(statistics(x).group.gram).energy(error))
    again = solved(weight, x, bits=3)[1].form(Choice(bits=3))
    assert torch.equal(again.codes, solution.form(Choice(bits=3)).codes), "nothing depends on what was asked before"


def test_losses_are_measured_at_two_bits_and_more_where_there_are_enough():
    every = code_options(Shape(64, 64, 2), get_method("trellis").settings(bits=None), 1)
    measured = [[options[index].choice.bits for index in coarsest(3)(options, 0)] for options in (every, every[1:], every[:3])]
    assert measured == [[2, 3, 4], [2, 3, 4], [1, 2, 3]]


def test_seeds_differ_between_targets_and_follow_the_setting():
    weight, x = problem(16, 32, 100, seed=6)
    form = lambda weight, **chosen: solved(weight, x, bits=2, **chosen)[1].form(Choice(bits=2))  # noqa: E731
    assert form(weight).seed == form(weight).seed
    assert len({form(weight).seed, form(weight + 1).seed, form(weight, seed=1).seed}) == 3
    assert form(weight, rotate=False).seed is None


def test_a_weight_of_zeros_and_one_that_is_not_finite():
    _, x = problem(16, 32, 100, seed=6)
    form = solved(torch.zeros(16, 32), x, bits=2)[1].form(Choice(bits=2))
    assert not form.dense().any()
    with pytest.raises(NonFiniteError, match="1 of 512 values"):
        solved(torch.zeros(16, 32).index_fill(1, torch.tensor([3]), 0.0).fill_diagonal_(0).index_put(
            (torch.tensor([2]), torch.tensor([3])), torch.tensor(torch.nan)), x, bits=2)  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"seed": -1}, {"seed": 1 << 40}, {"seed": "1"}, {"bias": 1}, {"code": {"kind": "e8", "bits": 5, "state_bits": 0}},
        {"code": {"kind": "trellis", "bits": 2, "state_bits": 40, "version": 2}},
        {"code": {"kind": "trellis", "bits": 2, "state_bits": 12}},
        {"code": {"kind": "trellis", "bits": 2, "state_bits": 12, "version": 3}},
        {"code": {"kind": "e8", "bits": 2, "state_bits": 12}},
        {"code": {"kind": "hybrid", "bits": 2, "state_bits": 12}}, {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_forged_spec_is_refused(change):
    spec = {"kind": Encoded.kind, "code": Code("trellis", 2, 12).spec(), "seed": 3, "bias": False}
    build_module(spec, 40, 24)
    with pytest.raises((ValidationError, ValueError)):
        build_module(spec | change, 40, 24)


def test_a_recipe_with_bits_that_its_code_does_not_have_is_refused():
    with pytest.raises(RecipeError, match="code: e8 has 2, 3, 4 bits, not 5"):
        load_recipe("trellis", {"settings.code": "e8", "settings.bits": 5})
