"""Which files are the model: lrc reads those that `from_pretrained` reads, or refuses and names the files that disagree."""

from __future__ import annotations

import glob
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from commandline import lrc_ok, run_lrc
from pipeline import IDS
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, get_gguf_hf_weights_map

from lrc.checkpoint.location import Location, locate
from lrc.checkpoint.reading.weights import SafetensorsSource
from lrc.checkpoint.streamed import Checkpoint

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def single(tiny_checkpoints, tmp_path) -> Path:
    """A copy of a tiny Llama in one file, with a head of its own."""
    made = tiny_checkpoints("llama", num_hidden_layers=2, shard="1GB", tie_word_embeddings=False)
    return shutil.copytree(made, tmp_path / "single")


@pytest.fixture
def tied(tiny_checkpoints, tmp_path) -> Path:
    """A copy of a tiny Llama in one file, with a tied head."""
    return shutil.copytree(tiny_checkpoints("llama", num_hidden_layers=2, shard="1GB"), tmp_path / "tied")


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def write_index(folder: Path, listed: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": listed}))


def split(folder: Path, scale: float = 1.0) -> list[str]:
    """Write two shards with an index beside model.safetensors, all values times `scale`; the shards' names."""
    tensors = {name: tensor * scale for name, tensor in load_file(folder / SINGLE).items()}
    names, files = sorted(tensors), ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    for file, half in zip(files, halves, strict=True):
        save_file({name: tensors[name] for name in half}, folder / file, metadata={"format": "pt"})
    write_index(folder, {name: file for file, half in zip(files, halves, strict=True) for name in half})
    return files


def what_lrc_reads(folder: Path) -> dict[str, torch.Tensor]:
    source = SafetensorsSource(folder)
    return source.read(source.names())


def what_transformers_reads(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def reads_the_same(folder: Path) -> bool:
    theirs, ours = what_transformers_reads(folder), what_lrc_reads(folder)
    return bool(ours) and all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())


def refusals(folder: Path, text: str, out: Path) -> list[str]:
    """What compress, plan and eval (as the model and as the baseline) say; each must refuse with the same message."""
    told = []
    commands = (
        ["compress", folder, "--recipe", "svd", "--ratio", 0.3, "--out", out],
        ["plan", folder, "--recipe", "svd", "--ratio", 0.3],
        ["eval", folder, "--tasks", text, "--length", 64],
    )
    for command in commands:
        result = run_lrc(*command)
        assert result.code in (1, 2) and not result.out, result
        assert result.err.count("\n") == 2, "what happened, and the remedy"
        told.append(result.err)
    assert len(set(told)) == 1, told
    assert not out.exists()
    return told


# ---- two sets of weights


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_two_complete_sets_are_refused(scale, single, text, tmp_path):
    shards = split(single, scale)
    message = refusals(single, text, tmp_path / "out")[0]
    assert SINGLE in message and INDEX in message and shards[0] in message


def test_a_baseline_is_refused_before_the_first_model_is_measured(single, tiny_checkpoints, text, no_forward):
    split(single)
    result = run_lrc("eval", tiny_checkpoints("llama", num_hidden_layers=2), "--baseline", single, "--tasks", text,
                     "--length", 64)  # fmt: skip
    assert result.code == 2 and INDEX in result.err


def test_an_index_of_shards_that_are_gone(single):
    for shard in split(single, 1.5):
        (single / shard).unlink()
    assert reads_the_same(single)


def test_an_index_that_lists_the_single_file(single):
    write_index(single, dict.fromkeys(load_file(single / SINGLE), SINGLE))
    assert reads_the_same(single)


def test_files_that_the_index_does_not_list_are_not_read_and_said(single):
    split(single)
    (single / SINGLE).rename(single / "model-00003-of-00003.safetensors")
    (single / "pytorch_model.bin").write_bytes(b"no pickle")
    assert reads_the_same(single)
    printed = lrc_ok("plan", single, "--recipe", "svd", "--ratio", 0.3)
    assert "weights: not read, as from_pretrained does not: model-00003-of-00003.safetensors, pytorch_model.bin" in printed


def test_config_json_may_name_the_file(single):
    split(single, 1.5)
    (single / SINGLE).rename(single / "other.safetensors")
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    theirs, read = what_transformers_reads(single), Checkpoint(locate(str(single))).source
    assert torch.equal(read.read([UP])[UP], theirs[UP])
    assert torch.equal(load_file(single / "other.safetensors")[UP], theirs[UP])


# ---- an index and its shards


def in_two_shards(folder: Path, scale: float, says: int) -> tuple[str, ...]:
    """UP is in both shards, times `scale` in the one that the index does not name."""
    files = split(folder)
    (folder / SINGLE).unlink()
    listed = json.loads((folder / INDEX).read_text())["weight_map"]
    value = load_file(folder / listed[UP])[UP]
    for number, file in enumerate(files):
        edit(folder / file, lambda held, number=number: held | {UP: value * (1 if number == says else scale)})
    write_index(folder, listed | {UP: files[says]})
    return UP, *files


@pytest.mark.parametrize(("scale", "says"), [(1.0, 0), (1.0, 1), (2.0, 1)])
def test_a_tensor_in_two_shards(scale, says, single):
    in_two_shards(single, scale, says)
    assert reads_the_same(single)


def test_a_tensor_with_two_values_of_which_the_index_names_the_other(single, text, tmp_path):
    names = in_two_shards(single, 2.0, 0)
    message = refusals(single, text, tmp_path / "out")[0]
    assert all(name in message for name in names)


def test_a_tensor_in_another_shard_than_the_index_says(single):
    files = split(single)
    (single / SINGLE).unlink()
    listed = json.loads((single / INDEX).read_text())["weight_map"]
    write_index(single, listed | {UP: next(file for file in files if file != listed[UP])})
    assert reads_the_same(single)


@pytest.mark.parametrize(
    ("text_of", "named"),
    [
        (lambda listed: {"metadata": {}, "weight_map": {}}, "lists no tensor"),
        (lambda listed: {"weight_map": listed}, "metadata"),
        (lambda listed: [listed], "is not an index"),
    ],
)
def test_an_index_that_is_none(text_of, named, single, text, tmp_path):
    split(single)
    (single / SINGLE).unlink()
    listed = json.loads((single / INDEX).read_text())["weight_map"]
    (single / INDEX).write_text(json.dumps(text_of(listed)))
    assert named in refusals(single, text, tmp_path / "out")[0]


def test_an_index_with_a_key_twice(single, text, tmp_path):
    files = split(single)
    (single / SINGLE).unlink()
    held = (single / INDEX).read_text()
    (single / INDEX).write_text(held.replace('"weight_map": {', f'"weight_map": {{"{UP}": "{files[0]}", ', 1))
    assert f"'{UP}' is given twice" in refusals(single, text, tmp_path / "out")[0]


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "consolidated.safetensors", "sub/model.safetensors"])
def test_weights_under_another_name(name, single, text, tmp_path):
    (single / name).parent.mkdir(exist_ok=True)
    (single / SINGLE).rename(single / name)
    assert (name if "/" not in name else "sub") in refusals(single, text, tmp_path / "out")[0]


def test_the_hub_gives_the_files_that_the_index_names(single, tmp_path, monkeypatch):
    """Patterns leave `consolidated*` out, which is a second copy of the weights, except where it is the only one."""
    split(single)
    (single / SINGLE).unlink()
    listed = json.loads((single / INDEX).read_text())["weight_map"]
    write_index(single, {name: f"consolidated-{file}" for name, file in listed.items()})
    for file in set(listed.values()):
        (single / file).rename(single / f"consolidated-{file}")
    cache = tmp_path / "cache"

    def snapshot(_name: str, allow_patterns: list[str] | None = None, ignore_patterns: list[str] | None = None) -> str:
        patterns = shutil.ignore_patterns(*(ignore_patterns or []))
        shutil.copytree(single, cache, ignore=patterns if ignore_patterns else None, dirs_exist_ok=True)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert sorted(SafetensorsSource(locate("some/model").path).names()) == sorted(listed)


# ---- adapters


def adapter(folder: Path, base: str, **described: str) -> None:
    held = {"peft_type": "LORA", "base_model_name_or_path": base, "r": 2, "target_modules": ["q_proj"]} | described
    (folder / "adapter_config.json").write_text(json.dumps(held))
    save_file({"base_model.model.x": torch.zeros(2)}, folder / "adapter_model.safetensors")


def test_an_adapter_beside_weights(single, text, tmp_path):
    adapter(single, "org/base")
    message = refusals(single, text, tmp_path / "out")[0]
    assert "a LoRA adapter (adapter_config.json), which from_pretrained adds" in message
    assert "merge_and_unload" in message and "move adapter_config.json" in message


def test_a_folder_with_an_adapter_alone(text, tmp_path):
    (tmp_path / "adapter").mkdir()
    adapter(tmp_path / "adapter", "org/base")
    message = refusals(tmp_path / "adapter", text, tmp_path / "out")[0]
    assert "LoRA adapter" in message and "its base model is 'org/base'" in message and "merge_and_unload" in message


@pytest.mark.parametrize("beside", [False, True])
def test_the_commands_that_merge_an_adapter(beside, single, text, tmp_path, monkeypatch):
    """They are run as they are printed; the merged model is what `from_pretrained` makes of base and adapter."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=64, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(single), config)
    model.save_pretrained(tmp_path / "lora")
    with torch.no_grad():
        expected = model(IDS).logits
    folder = tmp_path / "lora"
    if beside:
        folder = shutil.copytree(single, tmp_path / "both")
        for path in (tmp_path / "lora").glob("adapter_*"):
            shutil.copy(path, folder)
        with torch.no_grad():
            assert torch.allclose(AutoModelForCausalLM.from_pretrained(folder)(IDS).logits, expected, atol=1e-4)
    remedy = refusals(folder, text, tmp_path / "out")[0]
    monkeypatch.chdir(tmp_path)
    if beside:
        moved = re.search(r"mkdir ADAPTER && mv (\S+) ADAPTER && ", remedy)
        (tmp_path / "ADAPTER").mkdir()
        for path in map(Path, glob.glob(moved[1])):
            path.rename(tmp_path / "ADAPTER" / path.name)
    exec(re.search(r'python -c "([^"]+)"', remedy)[1], {})  # noqa: S102
    with torch.no_grad():
        assert torch.allclose(AutoModelForCausalLM.from_pretrained("MERGED")(IDS).logits, expected, atol=1e-4)
    lrc_ok("plan", "MERGED", "--ratio", 0.3)


def test_an_adapter_that_cannot_be_merged(text, tmp_path):
    (tmp_path / "adapter").mkdir()
    adapter(tmp_path / "adapter", "org/base", peft_type="PROMPT_TUNING")
    assert "cannot be merged" in refusals(tmp_path / "adapter", text, tmp_path / "out")[0]


def test_an_adapter_beside_a_gguf_file(tmp_path):
    adapter(tmp_path, "org/base")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    result = run_lrc("plan", tmp_path / "model.gguf", "--ratio", 0.3)
    assert result.code == 2 and "adapter" in result.err


def test_adapter_weights_without_their_configuration_are_not_read(single):
    """transformers looks for adapter_config.json alone."""
    save_file({"x": torch.zeros(2)}, single / "adapter_model.safetensors")
    assert reads_the_same(single)


# ---- tied heads


def with_head(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict], dict]:
    return lambda held: held | {HEAD: change(held[EMBEDDING]).contiguous()}


def compressed(folder: Path, out: Path, *more: object) -> str:
    return lrc_ok("compress", folder, "--recipe", "rtn", "--bits", 8, "--out", out, *more)


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(IDS).logits


def test_a_tied_flag_with_a_head_of_other_values(tied, tmp_path):
    edit(tied / SINGLE, with_head(lambda weight: torch.randn_like(weight)))
    printed = compressed(tied, tmp_path / "out")
    assert f"'{HEAD}' and '{EMBEDDING}' are tied in config.json and differ in the file: both are kept" in printed
    theirs, ours = logits(tied), logits(tmp_path / "out")
    assert (ours - theirs).norm() < 0.5 * theirs.norm()  # 8 bits cost a quarter of it here, another head more than all
    stored = load_all(tmp_path / "out")
    original = load_file(tied / SINGLE)
    assert all(torch.equal(stored[name], original[name]) for name in (HEAD, EMBEDDING))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    lrc_ok("verify", tmp_path / "out")


def test_a_tied_flag_with_a_head_of_the_same_values(tied, tmp_path):
    edit(tied / SINGLE, with_head(lambda weight: weight.clone()))
    assert "differ in the file" not in compressed(tied, tmp_path / "out")
    assert HEAD not in load_all(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_difference_that_the_dtype_rounds_away(tied):
    """transformers compares what it has loaded, in the dtype of the model."""
    edit(tied / SINGLE, lambda held: held | {EMBEDDING: held[EMBEDDING].bfloat16().float()})
    edit(tied / SINGLE, with_head(lambda weight: weight * (1 + 2**-14)))
    assert Checkpoint(locate(str(tied)), torch.float32).untied
    assert not Checkpoint(locate(str(tied)), torch.bfloat16).untied
    assert AutoModelForCausalLM.from_pretrained(tied, dtype=torch.bfloat16).all_tied_weights_keys


def test_a_head_that_stands_for_the_embedding(tied, tmp_path):
    """Only the copy of a tied pair is in the file: transformers takes it for both."""
    edit(tied / SINGLE, lambda held: {(HEAD if name == EMBEDDING else name): tensor for name, tensor in held.items()})
    compressed(tied, tmp_path / "out")
    theirs, ours = logits(tied), logits(tmp_path / "out")
    assert (ours - theirs).norm() < 0.5 * theirs.norm()  # 8 bits cost a quarter of it here, another head more than all
    assert {EMBEDDING} == load_all(tmp_path / "out").keys() & {HEAD, EMBEDDING}


def test_an_untied_flag_without_a_head(single, tmp_path, text):
    edit(single / SINGLE, lambda held: {name: tensor for name, tensor in held.items() if name != HEAD})
    for command in (["plan", single, "--ratio", 0.3], ["eval", single, "--tasks", text, "--length", 64]):
        result = run_lrc(*command)
        assert result.code == 1 and HEAD in result.err


def test_two_copies_of_which_one_is_tied(tied, monkeypatch):
    """Each pair is decided by itself: of two heads on one embedding, one is equal and one is not."""
    from transformers import LlamaForCausalLM

    class TwoHeads(LlamaForCausalLM):
        _tied_weights_keys = {HEAD: EMBEDDING, "second_head.weight": EMBEDDING}  # noqa: RUF012

        def __init__(self, config):
            super().__init__(config)
            self.second_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

        def post_init(self):  # the class above calls it before the second head is there
            if hasattr(self, "second_head"):
                super().post_init()

    monkeypatch.setattr("lrc.checkpoint.streamed._skeleton", skeleton_of(TwoHeads))
    edit(tied / SINGLE, lambda held: held | {HEAD: held[EMBEDDING] + 1, "second_head.weight": held[EMBEDDING].clone()})
    view = Checkpoint(Location(str(tied), tied))
    assert view.untied == {HEAD: EMBEDDING} and view.tied == {"second_head.weight": EMBEDDING}
    theirs = TwoHeads.from_pretrained(tied)
    assert theirs.all_tied_weights_keys == view.tied
    assert view.config.tie_word_embeddings, "a pair is still tied"
    view.load_end()
    assert torch.equal(view.model.lm_head.weight, theirs.lm_head.weight)


def skeleton_of(kind: type) -> Callable:
    def skeleton(config, *_):
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            model = kind(config)
        model.tie_weights()
        return model.eval().requires_grad_(False)

    return skeleton


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("same", [False, True])
def test_a_tied_flag_with_a_head_in_a_gguf_file(same, tmp_path):
    """transformers sets the flag for BLOOM whether the file holds a head or not."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", **sizes, tie_word_embeddings=True))
    tensors = dict(model.state_dict())
    tensors[HEAD] = tensors["transformer.word_embeddings.weight"] if same else torch.randn(64, 32)
    file = gguf.GGUFWriter(tmp_path / "bloom.gguf", "bloom")
    file.add_context_length(64)
    file.add_embedding_length(32)
    file.add_feed_forward_length(128)
    file.add_block_count(2)
    file.add_head_count(4)
    file.add_layer_norm_eps(1e-5)
    file.add_vocab_size(64)
    file.add_tokenizer_model("gpt2")
    file.add_token_list([f"t{number}" for number in range(64)])
    names = get_gguf_hf_weights_map(model, TENSOR_PROCESSORS["bloom"](config=model.config.to_dict()))
    for stored, name in names.items():
        file.add_tensor(stored, tensors[name].numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    view = Checkpoint(locate(str(tmp_path / "bloom.gguf")))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="bloom.gguf")
    assert bool(view.untied) is not same and view.tied == theirs.all_tied_weights_keys
    view.load_end()
    assert torch.equal(view.model.lm_head.weight, theirs.lm_head.weight)
