"""Statistics on disk: half of a symmetric matrix."""

import pytest
import torch

from lrc.calibrate.store import packed, unpacked


@pytest.mark.parametrize("n", [1, 2, 5, 127, 128, 129, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_half_of_a_symmetric_matrix_is_all_of_it(n, dtype):
    half = torch.randn(n, n, dtype=dtype, generator=torch.Generator().manual_seed(n))
    matrix = half + half.T
    triangle = packed(matrix)
    assert triangle.shape == (n * (n + 1) // 2,)
    assert torch.equal(triangle, matrix[torch.triu(torch.ones(n, n)).bool()])
    assert torch.equal(unpacked(triangle), matrix)


def test_what_is_no_triangle_is_refused():
    with pytest.raises(ValueError, match="5 numbers are no triangle"):
        unpacked(torch.zeros(5))
