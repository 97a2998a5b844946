"""Reading ahead: the next layer's bytes, in the direction of the loop; what is wrong with them is said by who needs them."""

from __future__ import annotations

import shutil

import pytest
from safetensors import safe_open

from lrc.checkpoint.location import locate
from lrc.checkpoint.reading.ahead import Extent, ReadAhead
from lrc.checkpoint.streamed import Checkpoint
from lrc.errors import CheckpointError


def layers_read(asked: list[list[str]]) -> list[int]:
    return [int(names[0].split(".layers.")[1].split(".")[0]) for names in asked]


@pytest.fixture
def opened(tiny_checkpoints, monkeypatch):
    """A checkpoint of four layers, and the extents that were read ahead."""
    view, asked = Checkpoint(locate(str(tiny_checkpoints("llama", num_hidden_layers=4)))), []
    real = view.source.extents

    def extents(names):
        asked.append(list(names))
        return real(names)

    monkeypatch.setattr(view.source, "extents", extents)
    return view, asked


def test_the_next_layer_is_read_in_either_direction(opened):
    view, asked = opened
    for name in view.layer_names:
        view.load(name)
    assert layers_read(asked) == [1, 2, 3]  # and nothing after the last
    asked.clear()
    for name in reversed(view.layer_names):
        view.load(name)
    assert layers_read(asked) == [1, 0]  # the turn is not foreseen


def test_extents_are_the_tensors_bytes(opened):
    view, _ = opened
    for name in view.source_names(view.layer_names[1]):
        (extent,) = view.source.extents([name])
        with extent.path.open("rb") as file:
            file.seek(extent.start)
            held = file.read(extent.length)
        with safe_open(extent.path, framework="pt") as shard:
            assert held == shard.get_tensor(name).numpy().tobytes()


def test_all_bytes_are_read_once(tmp_path, monkeypatch):
    file, read = tmp_path / "weights", []
    file.write_bytes(bytes(range(256)) * 100)
    monkeypatch.setattr("lrc.checkpoint.reading.ahead._PIECE", 1000)
    real = type(file).open

    def opened(path, *args, **more):
        held = real(path, *args, **more)

        class Counted:
            def __enter__(self):
                return self

            def __exit__(self, *error):
                held.close()

            seek = staticmethod(held.seek)

            @staticmethod
            def readinto(piece):
                read.append((held.tell(), len(piece)))
                return held.readinto(piece)

        return Counted()

    monkeypatch.setattr(type(file), "open", opened)
    ReadAhead().begin([Extent(file, 100, 2500), Extent(file, 20_000, 10)]).join(10)
    assert read == [(100, 1000), (1100, 1000), (2100, 500), (20_000, 10)]


def test_a_missing_or_short_file_is_left_to_whoever_needs_it(tmp_path):
    ahead, short = ReadAhead(), tmp_path / "short"
    short.write_bytes(b"1234")
    for extents in ([Extent(tmp_path / "gone", 0, 10)], [Extent(short, 0, 10**9)], [Extent(tmp_path, 0, 1)]):
        thread = ahead.begin(extents)
        thread.join(10)
        assert not thread.is_alive()


def test_a_shard_that_goes_while_layers_are_read_is_an_error_of_the_read(tiny_checkpoints, tmp_path):
    folder = shutil.copytree(tiny_checkpoints("llama", num_hidden_layers=3), tmp_path / "model")
    view = Checkpoint(locate(str(folder)))
    view.load(view.layer_names[0])
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError, match="Cannot read"):
        view.load(view.layer_names[1])


def test_a_shard_that_goes_before_it_was_looked_at_ahead_stops_nothing_yet(tiny_checkpoints, tmp_path):
    folder = shutil.copytree(tiny_checkpoints("llama", num_hidden_layers=3), tmp_path / "model")
    view = Checkpoint(locate(str(folder)))
    first, second = (
        {extent.path for extent in Checkpoint(view.location).source.extents(view.source_names(name))}
        for name in view.layer_names[:2]
    )
    sorted(second - first)[0].unlink()
    view.load(view.layer_names[0])
    with pytest.raises(CheckpointError, match="Cannot read"):
        view.load(view.layer_names[1])
