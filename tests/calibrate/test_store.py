"""Statistics on disk: half of a symmetric matrix."""

import pytest
import torch
from safetensors import safe_open

from lrc.calibrate.store import StatsStore, packed, unpacked
from lrc.compress.base import GroupStats, TargetStats
from lrc.errors import CheckpointError


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


def stats_of(width: int) -> TargetStats:
    return TargetStats(GroupStats(5, torch.eye(width)), output_gram=torch.eye(width + 1))


def opened(folder) -> StatsStore:
    return StatsStore(folder, {"of": "model"}, {})


def test_a_layer_in_several_chunks_reads_as_one_in_a_single_chunk(tmp_path):
    shared = stats_of(2)
    chunks = [{"a": shared, "b": TargetStats(shared.group)}, {"c": stats_of(3)}, {"d": stats_of(4)}]
    store = opened(tmp_path)
    with store.adding("layers.0") as add:
        for chunk in chunks:
            assert not store.has("layers.0"), "half a layer does not look finished"
            add(chunk)
    assert store.has("layers.0")
    found = opened(tmp_path).read("layers.0", ["d", "b", "a"])
    assert list(found) == ["d", "b", "a"] and found["a"].group is found["b"].group
    assert torch.equal(found["d"].group.gram, torch.eye(4)) and torch.equal(found["a"].output_gram, torch.eye(3))
    assert found["b"].output_gram is None and found["b"].group.tokens == 5
    store.write("layers.0", {"a": stats_of(6)})
    assert torch.equal(store.read("layers.0", ["a"])["a"].group.gram, torch.eye(6))
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["layers.0.safetensors"]


def test_what_reads_files_of_one_chunk_alone_does_not_misread_several(tmp_path):
    """An older lrc looks for every target in the layer's own file."""
    store = opened(tmp_path)
    with store.adding("layers.0") as add:
        add({"a": stats_of(2)})
        add({"b": stats_of(3)})
    with safe_open(tmp_path / "layers.0.safetensors", "pt") as file:
        assert "targets" not in file.metadata() and not list(file.keys())


def test_a_chunk_that_fails_and_a_chunk_that_is_gone(tmp_path):
    store = opened(tmp_path)

    def fail() -> None:
        with store.adding("layers.0") as add:
            add({"a": stats_of(2)})
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not store.has("layers.0")
    with store.adding("layers.0") as add:
        add({"b": stats_of(2)})
        add({"c": stats_of(2)})
    (tmp_path / "layers.0.part-1.safetensors").unlink()
    assert store.read("layers.0", ["b"])["b"].group.tokens == 5
    with pytest.raises(CheckpointError, match="collected anew"):
        store.read("layers.0", ["b", "c"])


def test_parts_of_another_models_layers_are_deleted_with_them(tmp_path):
    store = opened(tmp_path)
    with store.adding("layers.0") as add:
        add({"b": stats_of(2)})
        add({"c": stats_of(2)})
    del store, add  # which hold its lock
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    StatsStore(tmp_path, {"of": "another model"}, {})
    assert not list(tmp_path.glob("*.safetensors"))
