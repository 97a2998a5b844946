"""Methods that solve several targets together, on the real path: every family, kills, probes, refusals."""

from __future__ import annotations

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from commandline import contents, run_lrc
from pipeline import IDS, compress, logits, place_of, stored
from safetensors.torch import load_file
from stock import refused_without_lrc
from tiny import CONFIGS
from transformers import AutoModelForCausalLM

from lrc.checkpoint.artifact import Artifact
from lrc.checkpoint.hf_quantizer import open_model
from lrc.compress.forms import experts
from lrc.compress.forms.base import linear_weight
from lrc.compress.forms.shared import Borrowing
from lrc.errors import CheckpointError
from lrc.run.verify import verify

JOINT = ["shared-input", "basis-sharing", "cospadi-group", "lorap", "nystrom", "nystrom-kfac"]
QUICK = {"cospadi-group": {"settings.iterations": 2, "settings.refits": 1}}


@pytest.fixture(scope="module")
def compressed(tiny_checkpoints, tiny_text_file, tmp_path_factory):
    """A function (method, family) -> (the plan, the artifact), made once."""
    made = {}

    def make(name, family, **more):
        key = (name, family, str(more))
        if key not in made:
            out = tmp_path_factory.mktemp(f"{name}-{family}") / "out"
            overrides = {key.replace(".", "__"): value for key, value in QUICK.get(name, {}).items()}
            made[key] = compress(tiny_checkpoints(family), out, tiny_text_file, name, ratio=0.3, **overrides | more), out
        return made[key]

    return make


def coded(values, support, atoms, out_features):
    mask = np.unpackbits(support.numpy(), bitorder="little")[: out_features * len(atoms)].reshape(out_features, -1).astype(bool)
    codes = np.zeros(mask.shape, dtype=np.float32)
    codes[mask] = values.numpy()
    return torch.tensor(codes) @ atoms


def dense_of(form, tensors, path, original, kept_rows):
    """The matrix that a stored target stands for, from the tensors in the files alone.

    `kept_rows`: which rows are left of the pruned targets so far, by the last part of their paths; a fitted one reads those.
    """
    kind, owner = form["kind"], form.get("owner", path)
    if kind == "low-rank":
        return tensors[f"{path}.left"] @ tensors[f"{path}.weight"]
    if kind == "shared-low-rank":
        return tensors[f"{path}.weight"] @ tensors[f"{owner}.right"]
    if kind == "dictionary":
        return coded(tensors[f"{path}.values"], tensors[f"{path}.support"], tensors[f"{path}.weight"], len(original))
    if kind == "shared-dictionary":
        return coded(tensors[f"{path}.weight"], tensors[f"{path}.support"], tensors[f"{owner}.dictionary"], len(original))
    assert kind == "pruned"
    kept, whole = tensors[f"{path}.weight"], torch.zeros_like(original)
    if kept.shape[0] < len(original):
        rows = (original[:, None] == kept[None]).all(-1).any(1)
        whole[rows] = kept
        kept_rows[path.rpartition(".")[2]] = rows
    else:
        number = path.rpartition(".")[2]  # of an expert; else the rows are those of the target before
        rows = kept_rows[number if number.isdigit() else next(reversed(kept_rows))]
        whole[:, rows[: original.shape[1]]] = kept
    assert int((whole != 0).any(0).sum()) * int((whole != 0).any(1).sum()) == kept.numel()
    return whole


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("name", JOINT)
def test_every_family_loads_back_to_what_the_files_say(name, family, compressed, tiny_checkpoints):
    if name == "cospadi-group" and family not in ("llama", "gpt2", "mixtral"):
        pytest.skip("the forms are the same in every family, and this method is slow")
    plan, out = compressed(name, family)
    record = verify(out)
    tensors = {key: value for shard in record["shards"] for key, value in load_file(out / shard).items()}
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == plan.whole_after
    assert 0.29 <= plan.ratio <= 0.36
    original, _ = open_model(str(tiny_checkpoints(family)))
    together, kept_rows = 0, {}
    with torch.no_grad():
        for entry in record["targets"]:
            stored, place = place_of(original, entry["name"])
            if entry["form"]["kind"] != "dense":
                place.copy_(dense_of(entry["form"], tensors, stored, place.clone(), kept_rows))
            together += entry["form"]["kind"] in ("shared-low-rank", "shared-dictionary", "pruned")
        expected = original(IDS).logits
    # the joint part is really there: one layer of three shares across layers with nobody; gpt2 has one reader per input
    assert together >= 2 or (name, family) in {("shared-input", f) for f in ("phi3", "gpt2", "gpt_neox")} | {
        ("lorap", "mixtral"),
        ("nystrom", "mixtral"),
    }
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        assert torch.allclose(model.eval()(IDS).logits, expected, atol=1e-4)


def test_feed_forwards_are_found_in_every_family(compressed):
    for family in CONFIGS:
        targets = verify(compressed("lorap", family)[1], hashes=False)["targets"]
        pruned = [entry for entry in targets if entry["form"]["kind"] == "pruned"]
        unknown = [entry for entry in targets if "neither attention nor a feed-forward" in entry["note"]]
        makers = 2 if family in ("llama", "mistral", "qwen3", "gemma3_text") else 1
        experts_here = 4 if family == "mixtral" else 1
        assert len(pruned) == 3 * (makers + 1) * experts_here
        assert not unknown
        assert not any("another build" in entry["note"] for entry in targets)


@pytest.mark.parametrize("kept", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("name", ["nystrom", "lorap"])
def test_a_feed_forward_of_which_a_part_stays_loses_no_channels(name, kept, tiny_checkpoints, tiny_text_file, tmp_path):
    model, out = tiny_checkpoints("llama"), tmp_path / "out"
    plan = compress(model, out, tiny_text_file, name, ratio=0.3, keep=[f"*{kept}"])
    assert 0.2 < plan.ratio <= 0.31
    kinds = {entry["name"].rpartition(".")[2]: entry["form"]["kind"] for entry in verify(out)["targets"]}
    assert kinds[kept] == "dense"
    assert "pruned" not in kinds.values()
    assert logits(out).isfinite().all()


@pytest.mark.parametrize("name", JOINT)
def test_the_whole_budget_is_the_dense_model(name, tiny_checkpoints, tiny_text_file, tmp_path):
    model = tiny_checkpoints("qwen3")
    more = {key.replace(".", "__"): value for key, value in QUICK.get(name, {}).items()}
    plan = compress(model, tmp_path / "out", tiny_text_file, name, ratio=0.0, **more)
    assert plan.whole_after == plan.whole_bytes
    assert torch.equal(logits(model), logits(tmp_path / "out"))


@pytest.mark.parametrize("name", JOINT)
def test_saving_and_loading_again_changes_nothing(name, compressed, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(compressed(name, "llama")[1]).eval()
    expected = model(IDS).logits
    stored = load_file_sizes(compressed(name, "llama")[1])
    assert sum(p.numel() for p in model.state_dict().values()) == stored + (  # tied embeddings are in the state twice
        model.get_input_embeddings().weight.numel()
    )
    model.save_pretrained(tmp_path / "again", max_shard_size="50KB")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert load_file_sizes(tmp_path / "again") == stored
    assert torch.equal(again.eval()(IDS).logits, expected)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():  # a copy lends from its own, not from the model that it was copied from
            parameter.zero_()
    assert torch.equal(twin(IDS).logits, expected)


def load_file_sizes(folder):
    return sum(tensor.numel() for shard in folder.glob("*.safetensors") for tensor in load_file(shard).values())


def test_without_lrc_every_joint_form_fails_loudly(compressed):
    folders = [compressed(name, "llama")[1] for name in JOINT] + [compressed("basis-sharing", "gpt2")[1]]
    assert refused_without_lrc(folders) == len(folders)


@pytest.mark.parametrize("name", ["basis-sharing", "shared-input"])
@pytest.mark.parametrize("finished", [1, 2])
def test_killed_between_layers_it_continues_to_the_same_bytes(
    name, finished, compressed, tiny_checkpoints, tiny_text_file, tmp_path, monkeypatch
):
    """After one layer a set of two is half written: the second half is solved anew."""
    write, done = Artifact.write, []

    def killed(self, *arguments):
        if len(done) == finished:
            raise KeyboardInterrupt
        done.append(write(self, *arguments))

    monkeypatch.setattr(Artifact, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        compress(tiny_checkpoints("llama"), tmp_path / "out", tiny_text_file, name, ratio=0.3)
    monkeypatch.undo()
    assert not (tmp_path / "out" / "config.json").exists()
    compress(tiny_checkpoints("llama"), tmp_path / "out", tiny_text_file, name, ratio=0.3)
    assert contents(tmp_path / "out") == contents(compressed(name, "llama")[1])


def test_sets_within_a_layer_go_with_compressed_inputs(compressed, tiny_checkpoints, tiny_text_file, tmp_path, monkeypatch):
    _, out = compressed("shared-input", "llama", propagate="compressed")
    write, done = Artifact.write, []

    def killed(self, *arguments):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(write(self, *arguments))

    monkeypatch.setattr(Artifact, "write", killed)
    arguments = (tiny_checkpoints("llama"), tmp_path / "out", tiny_text_file, "shared-input")
    with pytest.raises(KeyboardInterrupt):
        compress(*arguments, ratio=0.3, propagate="compressed")
    monkeypatch.undo()
    compress(*arguments, ratio=0.3, propagate="compressed")
    assert contents(tmp_path / "out") == contents(out)
    first, second = (stored(out, f"model.layers.{n}.") for n in (0, 1))
    one_shot = [stored(compressed("shared-input", "llama")[1], f"model.layers.{n}.") for n in (0, 1)]
    assert all(torch.equal(first[key], one_shot[0][key]) for key in first)
    assert not torch.equal(second["model.layers.1.mlp.up_proj.weight"], one_shot[1]["model.layers.1.mlp.up_proj.weight"])


@pytest.mark.parametrize(("name", "refine"), [("shared-input", ["block", "end-to-end"]), ("basis-sharing", ["end-to-end"])])
def test_shared_factors_are_trained_once(name, refine, compressed, tiny_checkpoints, tiny_text_file, tmp_path):
    quick = {"block": {"block": {"epochs": 1}}, "end-to-end": {"end-to-end": {"steps": 4, "every": 2}}}
    wanted = {key: value for each in refine for key, value in quick[each].items()}
    plan = compress(tiny_checkpoints("llama"), tmp_path / "out", tiny_text_file, name, ratio=0.3, samples=16, refine=wanted,
                    calibration__held_out=2)  # fmt: skip
    record = verify(tmp_path / "out")
    assert record["bytes"]["model_after"] == plan.whole_after
    plain, trained = (stored(folder, "model.layers.0.") for folder in (compressed(name, "llama")[1], tmp_path / "out"))
    assert plain.keys() == trained.keys()
    assert torch.isfinite(logits(tmp_path / "out")).all()


def test_only_what_is_shared_asks_for_the_dearer_statistics(compressed, tiny_checkpoints, tiny_text_file, tmp_path):
    """down_proj puts out 48 numbers of 80: alone it is solved from its outputs, and to the same matrix as by svd-llm."""
    plan, out = compressed("shared-input", "llama")
    wanted = plan.wanted(0)
    outputs = {name.rpartition(".")[2] for name in wanted.outputs}
    assert outputs == {"o_proj", "down_proj"}
    assert {group.rpartition(".")[2] for group, names in wanted.inputs.items() if "gram" in names} == {"q_proj", "gate_proj"}
    alone = tmp_path / "alone"
    compress(tiny_checkpoints("llama"), alone, tiny_text_file, "svd-llm", ratio=0.3)
    one, two = (stored(folder, "model.layers.1.") for folder in (out, alone))
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        assert torch.equal(one[f"model.layers.1.{name}.left"], two[f"model.layers.1.{name}.left"])


def test_a_feed_forward_that_loses_channels_asks_for_the_one_gram_that_is_read(compressed):
    plan, out = compressed("nystrom", "llama")
    read = {group for group, names in plan.wanted(0).inputs.items() if names}
    assert {group.rpartition(".")[2] for group in read} <= {"q_proj", "o_proj", "down_proj"}
    assert plan.wanted(0).inputs["model.layers.0.mlp.down_proj"] == {"gram"}
    tokens = {entry["name"].rpartition(".")[2]: entry["tokens"] for entry in verify(out)["targets"]}
    assert tokens["gate_proj"] is None and tokens["up_proj"] is None and tokens["down_proj"] > 0, "what was not read has none"


def test_devices_change_nothing_but_rounding(compressed, tiny_checkpoints, tiny_text_file, tmp_path):
    """Each device works on a copy of the layer, whose borrowers read from the copy's own lender."""
    cpu = torch.device("cpu")
    arguments = (tiny_checkpoints("llama"), tmp_path / "two", tiny_text_file, "shared-input", [cpu, cpu])
    compress(*arguments, samples=60, ratio=0.3, propagate="compressed")
    compress(*arguments[:1], tmp_path / "one", *arguments[2:4], samples=60, ratio=0.3, propagate="compressed")
    assert torch.allclose(logits(tmp_path / "one"), logits(tmp_path / "two"), atol=1e-3)


@pytest.mark.parametrize("name", ["basis-sharing", "lorap"])
def test_sixteen_bit_checkpoints_stay_sixteen_bit(name, tiny_checkpoints, tiny_text_file, tmp_path):
    plan = compress(tiny_checkpoints("opt", dtype=torch.bfloat16), tmp_path / "out", tiny_text_file, name, ratio=0.3)
    assert {tensor.dtype for tensor in stored(tmp_path / "out").values()} == {torch.bfloat16}
    assert verify(tmp_path / "out")["bytes"]["model_after"] == plan.whole_after


@pytest.mark.parametrize("name", ["shared-input", "basis-sharing", "lorap"])
def test_a_set_gets_one_choice_from_the_solver(name, tiny_checkpoints, tiny_text_file, tmp_path):
    model, kept = tiny_checkpoints("llama", num_hidden_layers=4), tmp_path / "statistics"
    plans = {}
    for out, keep in (("some", ["*.k_proj"]), ("all", [])):  # other sets than before, from the same folder of statistics
        overrides = {"calibration.source": f"text:{tiny_text_file}", "calibration.samples": 8, "calibration.length": 48}
        settings = [f"--set={key}={json.dumps(value)}" for key, value in {**overrides, "keep": keep}.items()]
        result = run_lrc("compress", model, "--recipe", name, "--ratio", 0.3, "--set", "allocation=spectrum", "--out",
                         tmp_path / out, "--statistics", kept, *settings)  # fmt: skip
        assert result.code == 0, result.err
        record = verify(tmp_path / out)
        plans[out] = {entry["name"]: entry for entry in record["targets"]}
        assert record["bytes"]["targets_after"] <= 0.7 * record["bytes"]["targets_before"]
        assert all(entry["form"]["kind"] == "dense" for key, entry in plans[out].items() if keep and "k_proj" in key)
    if name == "lorap":
        return
    for entry in plans["all"].values():
        if owner := entry["form"].get("owner"):
            assert plans["all"][owner]["form"]["rank"] == entry["form"]["rank"]
    assert len({entry["form"].get("rank") for entry in plans["all"].values()}) > 4  # the solver has chosen
    joined = [
        entry["form"]["kind"] for key, entry in plans["all"].items() if key.endswith(("1.mlp.gate_proj", "1.mlp.up_proj"))
    ]
    assert name != "shared-input" or len(set(joined)) == 1


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("shared-input", "llama"),
        ("lorap", "mixtral"),
        ("nystrom", "llama"),
        ("basis-sharing", "llama"),
        ("basis-sharing", "gpt2"),
    ],
)
def test_a_set_is_probed_as_one(name, family, tiny_checkpoints, tiny_text_file, tmp_path, monkeypatch):
    """The divergences that `kl` measures, against whole models in which one set alone is compressed."""
    import lrc.run.losses.probe

    seen, forms = {}, {}
    told = lrc.run.losses.probe.Probing.run
    made = lrc.run.losses.probe.forms_at

    def run(self, *arguments):
        seen["probing"], seen["found"] = self, told(self, *arguments)
        return seen["found"]

    def forms_at(unit, solution, choice):
        forms[unit.name, choice] = made(unit, solution, choice)
        return forms[unit.name, choice]

    monkeypatch.setattr(lrc.run.losses.probe.Probing, "run", run)
    monkeypatch.setattr(lrc.run.losses.probe, "forms_at", forms_at)
    model = tiny_checkpoints(family)
    plan = compress(model, tmp_path / "out", tiny_text_file, name, ratio=0.3, allocation="kl")
    assert plan.targets_after <= 0.7 * plan.targets_before
    verify(tmp_path / "out")
    probing = seen["probing"]
    probes = [(group, option) for part in probing._passes for group in part for option in probing._probed(group)]
    original, _ = open_model(str(model))
    for group, option in probes[:2] + probes[-2:]:
        changed = copy.deepcopy(original)
        with torch.no_grad():
            for unit in group.units:
                for target, form in forms[unit.name, probing._options[unit.name][option].choice].items():
                    if target.expert is None:
                        place = linear_weight(changed.get_submodule(target.module))
                    else:
                        place = changed.get_parameter(target.name.rpartition(".")[0])[target.expert]
                    place.copy_(form.dense())
            skip = min(16, probing._tokens.shape[1] // 2)
            p, q = (torch.log_softmax(m(probing._tokens).logits[:, skip:].double(), -1) for m in (original, changed))
            expected = float((p.exp() * (p - q)).sum(-1).mean())
        assert seen["found"][group.name][option] == pytest.approx(expected, rel=1e-3, abs=5e-6)  # float32 sums
    sizes = {len(unit.targets) for group, _ in probes for unit in group.units}
    expected = {"shared-input": {3, 2}, "lorap": {4, 2}, "nystrom": {3, 1}, "nystrom-kfac": {3, 1}, "basis-sharing": {2, 1}}
    assert sizes >= expected[name]


def test_a_changed_owner_is_refused(compressed, tmp_path):
    """What config.json says of owners must fit the model."""
    for wrong in ("model.layers.0.self_attn.o_proj", "model.layers.7.mlp.up_proj", "model.layers.0.mlp.gate_proj"):
        folder = tmp_path / wrong
        shutil.copytree(compressed("shared-input", "llama")[1], folder)
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["modules"]["model.layers.0.self_attn.v_proj"]["owner"] = wrong
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=f"v_proj' shares a factor of .* with '{wrong}'"):
            AutoModelForCausalLM.from_pretrained(folder)


def test_a_lender_whose_weights_are_away_says_so(compressed):
    model = AutoModelForCausalLM.from_pretrained(compressed("basis-sharing", "llama")[1])
    borrowers = {m.owner for m in model.modules() if isinstance(m, Borrowing) and m.owner}
    model.get_submodule(sorted(borrowers)[0]).to("meta")
    borrower = next(m for m in model.modules() if isinstance(m, Borrowing) and m.owner == sorted(borrowers)[0])
    with pytest.raises(CheckpointError, match="not in memory"):
        borrower(torch.zeros(1, 48))


def test_a_factor_is_lent_while_accelerate_keeps_it_elsewhere(compressed):
    """`device_map` puts what does not fit on the CPU or the disk and brings in one module at a time."""
    import accelerate

    for name in JOINT:
        model = AutoModelForCausalLM.from_pretrained(compressed(name, "llama")[1]).eval()
        with torch.no_grad():
            expected = model(IDS).logits
            accelerate.cpu_offload(model, torch.device("cpu"))
            assert model.model.layers[1].mlp.up_proj.weight.is_meta
            assert torch.equal(model(IDS).logits, expected)


def test_experts_share_nothing(compressed):
    _, out = compressed("basis-sharing", "mixtral")
    model, _ = open_model(str(out))
    forms = [m for m in model.modules() if experts.expert_parameters(m) == {} and isinstance(m, Borrowing)]
    assert {form.owner is None for form in forms} == {True, False}  # attention shares
    assert not any("experts" in name for name, m in model.named_modules() if isinstance(m, Borrowing))
