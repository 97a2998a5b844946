"""Shards by size: the layout, the bytes, and results with many, one, and old shards."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from commandline import contents, lrc_ok, run_lrc
from faults import killed_before
from hypothesis import given
from hypothesis import strategies as st
from pipeline import logits, stored
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lrc.checkpoint.artifact import Artifact
from lrc.checkpoint.merging import layout, merge, sizes

INDEX = "model.safetensors.index.json"
SMALL = ("--max-shard-size", "45kB")  # two of the three parts are larger, one is smaller


@given(
    st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=5), min_size=1, max_size=8),
    st.integers(1, 100),
)
def test_a_layout_holds_every_tensor_once_and_no_shard_is_too_large(parts, most):
    named = {f"p{i}": {f"p{i}.t{j}": nbytes for j, nbytes in enumerate(part)} for i, part in enumerate(parts)}
    groups = layout(named, most)
    held = [name for group in groups for name in group.tensors]
    assert held == [name for part in named.values() for name in part]
    assert all(sum(group.tensors.values()) <= most or len([n for n in group.tensors.values() if n]) == 1 for group in groups)
    assert [key for group in groups for key in group.done] == list(named)
    kept = set(named)
    for group in groups:  # a part goes only when all of it is in shards
        assert kept.issuperset(group.parts)
        kept -= set(group.done)
    files = [group.file for group in groups]
    count = len(files)
    wanted = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    assert files == (["model.safetensors"] if count == 1 else wanted)


def test_a_merged_file_is_that_of_the_library(tmp_path):
    """Mixed dtypes, odd sizes and empty tensors: as `save_file` would write them, and with its hash."""
    first = {"a": torch.randn(3, 5).bfloat16(), "c": torch.arange(7, dtype=torch.uint8), "e": torch.empty(0, 4)}
    second = {"b": torch.randn(4), "d": torch.arange(3), "f": torch.ones(5, dtype=torch.bool), "g": torch.randn(2).half()}
    save_file(first, tmp_path / "1", {"format": "pt"})
    save_file(second, tmp_path / "2", {"format": "pt"})
    told = []
    names = sizes(tmp_path / "1") | sizes(tmp_path / "2")
    merge(tmp_path / "out", [tmp_path / "1", tmp_path / "2"], names, lambda *each: told.append(each))
    data = (tmp_path / "out").read_bytes()
    assert told == [(hashlib.sha256(data).hexdigest(), len(data))]
    found, wanted = load_file(tmp_path / "out"), first | second
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) and found[name].dtype == wanted[name].dtype for name in wanted)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert all((8 + length + header[name]["data_offsets"][0]) % wanted[name].element_size() == 0 for name in wanted)


@pytest.fixture(scope="module")
def model(tiny_checkpoints) -> Path:
    return tiny_checkpoints("llama", num_hidden_layers=2)


def test_one_file_where_one_suffices_else_shards_with_an_index(model, request_for, tmp_path):
    lrc_ok(*request_for(model, tmp_path / "one"))
    lrc_ok(*request_for(model, tmp_path / "many", *SMALL))
    assert [path.name for path in tmp_path.glob("one/*.safetensors*")] == ["model.safetensors"]
    shards = sorted(path.name for path in tmp_path.glob("many/*.safetensors"))
    assert shards == [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)] and len(shards) > 3
    held = {name: [t.nbytes for t in load_file(tmp_path / "many" / name).values() if t.nbytes] for name in shards}
    assert all(sum(sizes) <= 45_000 or len(sizes) == 1 for sizes in held.values())
    one, many = stored(tmp_path / "one"), stored(tmp_path / "many")
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in many.values())
    assert index["weight_map"].keys() == many.keys() and set(index["weight_map"].values()) == set(shards)
    assert torch.equal(logits(tmp_path / "one"), logits(tmp_path / "many"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "many") is not None
    for folder in ("one", "many"):
        lrc_ok("verify", tmp_path / folder)
    refused = run_lrc(*request_for(model, tmp_path / "one", *SMALL))
    assert refused.code == 2 and "max_shard_bytes" in refused.err


def test_the_plan_says_what_disk_merging_takes(model):
    printed = lrc_ok("plan", model, "--recipe", "svd", "--ratio", 0.3, "--max-shard-size", "1MB")
    assert "disk: " in printed and "more while the parts are merged into files of at most 1.0 MB" in printed
    assert "--max-shard-size 'x'" in run_lrc("plan", model, "--ratio", 0.3, "--max-shard-size", "x").err


def test_killed_while_it_merges_it_comes_to_the_same_shards(model, request_for, tmp_path):
    lrc_ok(*request_for(model, tmp_path / "whole", *SMALL))
    expected, out, operation, merging = contents(tmp_path / "whole"), tmp_path / "out", 20, 0
    while killed_before(operation, out, request_for(model, out, *SMALL)):
        merging += any(out.glob("model-*.safetensors"))
        if any(out.glob("model-*.safetensors")) or any(out.glob("lrc.part-00003*")):
            lrc_ok(*request_for(model, out, *SMALL))
            assert contents(out) == expected, f"killed before change {operation}"
            for path in sorted(out.rglob("*"), reverse=True):
                path.unlink()
        operation += 7
    assert merging > 2


def test_a_shard_that_was_damaged_after_its_parts_were_gone_is_made_anew(model, request_for, tmp_path):
    lrc_ok(*request_for(model, tmp_path / "whole", *SMALL))
    out, operation = tmp_path / "out", 30
    while not list(out.glob("model-00003*")):
        assert killed_before(operation, out, request_for(model, out, *SMALL))
        operation += 2
    assert not list(out.glob("lrc.part-00001*"))
    shard = out / sorted(path.name for path in out.glob("model-00001*"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    printed = lrc_ok(*request_for(model, out, *SMALL))
    assert f"{shard} is missing or has changed" in printed and printed.count("finished earlier, replayed") == 1
    assert contents(out) == contents(tmp_path / "whole")


def test_restart_and_another_request_know_the_single_file_as_their_own(model, request_for, tmp_path):
    out = tmp_path / "out"
    lrc_ok(*request_for(model, out))
    before = contents(out)
    lrc_ok(*request_for(model, out, *SMALL, "--restart"))
    assert not (out / "model.safetensors").exists()
    lrc_ok(*request_for(model, out, "--restart"))
    assert contents(out) == before


def test_a_run_that_an_older_lrc_began_keeps_one_shard_a_layer(tmp_path):
    with Artifact(tmp_path / "out", {"of": "this"}) as artifact:
        for number in (1, 2):
            artifact.write(str(number), f"model-{number:05d}-of-00002.safetensors", {f"t{number}": torch.ones(3)}, {})
    with Artifact(tmp_path / "out", {"of": "this"}) as artifact:
        artifact.merge(10**9, None)
        artifact.finish({}, {}, "card", {}, lambda: None)
    files = [path.name for path in sorted((tmp_path / "out").glob("*.safetensors*"))]
    assert files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX]
    assert stored(tmp_path / "out").keys() == {"t1", "t2"}
