"""Every form: the same product for any number of rows; compiled, one graph without breaks, and none more for another length."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graphs import graphs_of

from lrc.compress.forms.base import Form, LowRank, build_module, fill_module
from lrc.compress.forms.codes.code import Code, Kind
from lrc.compress.forms.codes.corrected import EncodedLowRank
from lrc.compress.forms.codes.encoded import Encoded
from lrc.compress.forms.dictionary import Dictionary
from lrc.compress.forms.grids import Grid
from lrc.compress.forms.product import Product
from lrc.compress.forms.quantized import Quantized, QuantizedLinear, QuantizedLowRank
from lrc.compress.forms.shared import SharedDictionary, SharedLowRank

IN, OUT = 128, 64
WEIGHT = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))


def coded(bits: int, group: int = 64, **how: object) -> Quantized:
    return Quantized.nearest(WEIGHT, Grid(bits, group, **how))


def in_code(kind: Kind, state_bits: int) -> Encoded:
    code = Code(kind, 2, state_bits)
    codes = torch.randint(0, 256, (OUT // 16, IN // 16, code.nbytes), dtype=torch.uint8)
    return Encoded(code, codes, torch.ones(IN // 16), (OUT, IN), seed=3)


def dictionary() -> Dictionary:
    mask = WEIGHT[:, :32] > 0.5
    return Dictionary.of(WEIGHT[:, :32] * mask, mask, WEIGHT[:32])


LOW_RANK = LowRank(WEIGHT[:, :16].clone(), WEIGHT[:16].clone())
FACTORS = Product(Quantized.nearest(WEIGHT[:, :32], Grid(8, 0)), Quantized.nearest(WEIGHT[:32], Grid(8)), 32)
# the form, and the graphs that it may take: for one row, for several, and for many where these are multiplied differently
FORMS: dict[str, tuple[Callable[[], Form], int]] = {
    "low-rank": (lambda: LOW_RANK, 2),
    "shared-low-rank": (lambda: SharedLowRank(LOW_RANK.left, LOW_RANK.right, lends=True), 2),
    "4 bits": (lambda: coded(4, symmetric=False), 3),
    "8 bits": (lambda: coded(8), 3),
    "4 bits, no kernel": (lambda: coded(4, 20), 2),
    "mxint": (lambda: coded(4, 32, kind="mxint"), 3),
    "4 bits + low rank": (lambda: QuantizedLowRank(coded(4), LOW_RANK), 3),
    "product": (lambda: FACTORS, 3),
    "dictionary": (dictionary, 3),
    "trellis": (lambda: in_code("trellis", 12), 4),
    "e8": (lambda: in_code("e8", 0), 4),
    "trellis + low rank": (lambda: EncodedLowRank(in_code("trellis", 12), LOW_RANK), 4),
    "e8 + product": (lambda: EncodedLowRank(in_code("e8", 0), FACTORS), 5),
    "shared-dictionary": (lambda: SharedDictionary(dictionary(), lends=True), 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMS)
def test_any_number_of_rows_is_multiplied_by_the_matrix_that_is_stored(name, dtype):
    """How a form multiplies depends on the number of rows: packed, decoded, rotated back as a whole."""
    form = FORMS[name][0]().with_bias(torch.ones(OUT)).stored(dtype)
    module = fill_module(build_module(form.spec(), IN, OUT, dtype), form.tensors()).eval()
    for part in module.modules():
        if isinstance(part, QuantizedLinear):
            part.pack()
    generator = torch.Generator().manual_seed(1)
    for rows in (1, 5, 17, 90, 700):
        x = torch.randn(rows, IN, generator=generator).to(dtype)
        expected = x.double() @ form.dense().double().T + 1
        atol = (1e-4 if dtype == torch.float32 else 0.02) * float(expected.abs().max())
        assert torch.allclose(module(x).double(), expected, rtol=0, atol=atol), rows


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_one_graph_for_all_lengths(name):
    make, most = FORMS[name]
    form = make().stored(torch.bfloat16)
    module = fill_module(build_module(form.spec(), IN, OUT, torch.bfloat16), form.tensors()).eval()
    for part in module.modules():
        if isinstance(part, QuantizedLinear):
            part.pack()
    inputs = [torch.randn(1, length, IN, dtype=torch.bfloat16) for length in (7, 9, 1, 30, 70, 90, 130, 1, 600, 700)]
    assert len(graphs_of(module, inputs, 0.05)) <= most
