"""Products by codes: compiled, of few rows and of many, with gains and gradients, against the matrix in float64."""

from __future__ import annotations

import pytest
import torch
from problems import gaussian, problem, solved_trellis
from pydantic import ValidationError

from lrc.compress.forms.base import build_module, fill_module
from lrc.compress.forms.codes import few_rows, reading
from lrc.compress.forms.codes.code import BITS, TILE, Code, from_tiles
from lrc.compress.forms.codes.encoded import Encoded
from lrc.compress.options import Choice

CODES = [Code("trellis", bits, 8) for bits in BITS["trellis"]] + [
    Code(kind, n) for kind in ("e8", "scalar") for n in BITS[kind]
]


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
        solved_trellis(weight, x, code=code, bits=3, gains=gains)[1]
        .form(Choice(bits=3))
        .with_bias(gaussian(40))
        .stored(torch.float32)
    )
    module = fill_module(build_module(form.spec(), 72, 40, torch.float32), form.tensors())
    inputs = gaussian(3, 100, 72).float()
    many, few = module(inputs), torch.stack([torch.stack([module(row) for row in each]) for each in inputs])
    assert torch.allclose(many, few, atol=1e-5 * float(few.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(24, 40), (40, 19)])
@pytest.mark.parametrize("code", CODES, ids=str)
def test_the_module_multiplies_by_the_matrix_and_holds_packed_codes(code, shape, dtype):
    weight, x = problem(*shape, 200, seed=3)
    settings = {"code": code.kind, "bits": code.bits}
    (option,), solution = solved_trellis(weight, x, **settings)
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
    plain, fitted = (solved_trellis(weight, x, bits=2, gains=gains) for gains in (False, True))
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
    _, solution = solved_trellis(weight, x, bits=2, gains=True)
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
