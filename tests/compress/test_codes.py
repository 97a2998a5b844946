"""Rotations, codes and error feedback, against matrices and searches written out in float64."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import scipy.linalg
import torch
from problems import gaussian, problem, solved_trellis, statistics

from lrc.compress.base import get_method
from lrc.compress.forms.codes.code import BITS, TILE, Code, from_tiles, to_tiles
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


def test_values_of_a_trellis_are_sums_of_the_bytes_of_a_product():
    sums = np.array([sum((state * FACTOR % 2**32).to_bytes(4, "little")) - 510 for state in range(1 << 12)])
    values = trellis_values(12, CPU).double().numpy()
    assert np.allclose(values, sums / np.sqrt(np.mean(np.square(sums, dtype=float))), rtol=1e-6)
    assert abs(values.mean()) < 0.01


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


@pytest.mark.parametrize("code", ["trellis", "e8", "scalar"])
def test_rotation_and_feedback_each_lower_the_loss_of_a_weight_with_outliers(code):
    weight, x = problem(96, 96, 600, seed=1)
    weight[:, ::31] *= 12
    losses = {
        (rotated, feedback): solved_trellis(weight, x, code=code, bits=3, rotate=rotated, feedback=feedback)[1].loss(
            Choice(bits=3)
        )
        for rotated, feedback in product((False, True), repeat=2)
    }
    assert losses[True, False] < losses[False, False]
    assert losses[False, True] < losses[False, False]
    assert losses[True, True] < min(losses[True, False], losses[False, True])


def test_losses_are_output_errors_and_fall_with_bits():
    weight, x = problem(48, 64, 500, seed=5)
    options, solution = solved_trellis(weight, x, bits=None)
    losses = [solution.loss(option.choice) for option in options]
    assert [option.choice.bits for option in options] == [1, 2, 3, 4, 5, 6]
    assert losses == sorted(losses, reverse=True)
    error = weight.double() - solution.form(Choice(bits=3)).dense()
    assert losses[2] == pytest.approx(Metric(statistics(x).group.gram).energy(error))
    again = solved_trellis(weight, x, bits=3)[1].form(Choice(bits=3))
    assert torch.equal(again.codes, solution.form(Choice(bits=3)).codes), "nothing depends on what was asked before"


def test_losses_are_measured_at_two_bits_and_more_where_there_are_enough():
    every = code_options(Shape(64, 64, 2), get_method("trellis").settings(bits=None), 1)
    measured = [[options[index].choice.bits for index in coarsest(3)(options, 0)] for options in (every, every[1:], every[:3])]
    assert measured == [[2, 3, 4], [2, 3, 4], [1, 2, 3]]


def test_seeds_differ_between_targets_and_follow_the_setting():
    weight, x = problem(16, 32, 100, seed=6)
    form = lambda weight, **chosen: solved_trellis(weight, x, bits=2, **chosen)[1].form(Choice(bits=2))  # noqa: E731
    assert form(weight).seed == form(weight).seed
    assert len({form(weight).seed, form(weight + 1).seed, form(weight, seed=1).seed}) == 3
    assert form(weight, rotate=False).seed is None


def test_a_weight_of_zeros_and_one_that_is_not_finite():
    _, x = problem(16, 32, 100, seed=6)
    form = solved_trellis(torch.zeros(16, 32), x, bits=2)[1].form(Choice(bits=2))
    assert not form.dense().any()
    with pytest.raises(NonFiniteError, match="1 of 512 values"):
        solved_trellis(torch.zeros(16, 32).index_fill(1, torch.tensor([3]), 0.0).fill_diagonal_(0).index_put(
            (torch.tensor([2]), torch.tensor([3])), torch.tensor(torch.nan)), x, bits=2)  # fmt: skip


def test_a_recipe_with_bits_that_its_code_does_not_have_is_refused():
    with pytest.raises(RecipeError, match="code: e8 has 2, 3, 4 bits, not 5"):
        load_recipe("trellis", {"settings.code": "e8", "settings.bits": 5})
