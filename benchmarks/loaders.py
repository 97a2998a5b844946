"""The table of docs/loaders.md: every kind of result and of export in every way of loading it, on tiny models.

    python benchmarks/loaders.py                          # prints the cells and writes the table into docs/loaders.md
    python benchmarks/loaders.py --results FILE.json      # keeps the cells there, and goes on with those that are missing
    python benchmarks/loaders.py --kind codes --loader plain   # cells by name, printed only

"works" means that logits, greedy tokens or log-likelihoods were compared with those of the result as lrc opens it. "refused" is
an exception or an exit code, with its message below the table. "WRONG" is a defect: it opened, and the numbers are others. Each
cell is a process of its own; those of transformers without lrc have never imported it. Half an hour on one core.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "loaders.md"
LIMIT = 180  # seconds of one cell
IDS = torch.arange(3, 40)[None]
PROMPT = torch.arange(3, 12)[None]
EXACT = 1e-4
ROUNDED = {torch.bfloat16: 0.06, torch.float16: 0.02}
EVEN = {"hidden_size": 64, "intermediate_size": 96}  # GPTQ packs 32 rows and 32 columns into whole words


@dataclass(frozen=True)
class Kind:
    """A kind of result, or an export of one.

    Args:
        recipe, settings: how it is made.
        family, changes: the tiny model.
        to: the format of the export; empty for the result itself.
    """

    recipe: str
    settings: dict[str, Any]
    family: str = "llama"
    changes: dict[str, Any] | None = None
    to: str = ""


CODES: dict[str, Any] = {"settings__group_size": 16}
KINDS = {
    "low rank": Kind("svd-llm", {"ratio": 0.3}),
    "shared input": Kind("shared-input", {"ratio": 0.3}),
    "narrow, plain": Kind("narrow", {"ratio": 0.2}),
    "channels and low rank": Kind("lrc-fast", {"ratio": 0.3}),
    "dropped layers, plain": Kind("block-influence", {"ratio": 0.3}),
    "codes of 4 bits": Kind("rtn", CODES, changes=EVEN),
    "codes and correction": Kind("qera", CODES | {"settings__rank": 4}, changes=EVEN),
    "codes in a trellis": Kind("trellis", {"settings__bits": 3, "settings__state_bits": 8}, changes=EVEN),
    "codes in a lattice and correction": Kind("caldera", {"settings__rank": 4}, changes=EVEN),
    "dictionary": Kind("cospadi", {"ratio": 0.3}),
    "mixture, low rank": Kind("svd-llm", {"ratio": 0.3}, "mixtral"),
    "mixture, codes": Kind("rtn", CODES, "mixtral", EVEN),
    "export: dense": Kind("svd-llm", {"ratio": 0.3}, to="dense"),
    "export: self-contained": Kind("svd-llm", {"ratio": 0.3}, to="self-contained"),
    "export: self-contained, codes in a trellis": Kind("trellis", {"settings__state_bits": 8}, to="self-contained"),
    "export: compressed-tensors": Kind("rtn", CODES, changes=EVEN, to="compressed-tensors"),
    "export: compressed-tensors and adapter": Kind(
        "qera", CODES | {"settings__rank": 4}, changes=EVEN, to="compressed-tensors"
    ),
    "export: gptq": Kind("rtn", CODES, changes=EVEN, to="gptq"),
    "export: gguf": Kind("svd-llm", {"ratio": 0.3}, to="gguf"),
}


class WrongError(Exception):
    """It opened, and its numbers are others."""


@dataclass(frozen=True)
class Case:
    """One cell: the folder of a result or an export, what it must answer, and a folder for what is written."""

    folder: Path
    expected: dict[str, Any]
    scratch: Path
    trusted: bool

    def load(self, folder: Path | None = None, **more: Any) -> Any:
        """The model by the ordinary call of transformers."""
        settings = {"dtype": torch.float32, "trust_remote_code": self.trusted} | more
        if not (self.folder / "config.json").exists() and folder is None and (file := next(self.folder.glob("*.gguf"), None)):
            settings["gguf_file"] = file.name
        return AutoModelForCausalLM.from_pretrained(folder or self.folder, **settings).eval()

    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=self.trusted)

    @torch.no_grad()
    def require_same(self, model: Any, most: float = EXACT) -> None:
        """Compare the logits, and greedy tokens where nothing is rounded."""
        found, expected = model(IDS).logits.float(), self.expected["logits"]
        if most == EXACT:
            difference = float((found - expected).norm() / expected.norm())
        else:  # rounding sends some tokens of a mixture to other experts, in the original as well: the median token
            difference = float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median())
        if not difference <= most:
            raise WrongError(f"logits differ by {difference:.2%}")
        if most == EXACT:
            self.require_tokens(model)

    @torch.no_grad()
    def require_tokens(self, model: Any, **more: Any) -> None:
        found = model.generate(PROMPT, max_new_tokens=8, do_sample=False, **more)
        if not torch.equal(found, self.expected["tokens"]):
            raise WrongError("other greedy tokens")


# ---- ways of loading


def opened(case: Case) -> None:
    case.require_same(case.load())


def as_pipeline(case: Case) -> None:
    run = pipeline("text-generation", model=str(case.folder), dtype=torch.float32, trust_remote_code=case.trusted)
    prompt = run.tokenizer.decode(PROMPT[0])
    ids = run.tokenizer(prompt, return_tensors="pt").input_ids
    wanted = run.tokenizer.decode(case.load().generate(ids, max_new_tokens=8, do_sample=False)[0], skip_special_tokens=True)
    found = run(prompt, max_new_tokens=8, do_sample=False)[0]["generated_text"]
    case.require_same(run.model)
    if found.split() != wanted.split():
        raise WrongError(f"'{found}' in place of '{wanted}'")


def device_map(case: Case) -> None:
    for where in ("cpu", "auto", {"": "cpu"}):
        case.require_same(case.load(device_map=where))


def offloaded(case: Case) -> None:
    inner = "transformer.h" if hasattr(case.load(), "transformer") else "model"
    where = {f"{inner}.embed_tokens": "cpu", f"{inner}.norm": "cpu", f"{inner}.rotary_emb": "cpu", "lm_head": "cpu"}
    where |= {f"{inner}.layers.{layer}": "disk" if layer else "cpu" for layer in range(case.expected["layers"])}
    case.require_same(case.load(device_map=where, offload_folder=case.scratch))


def half_precisions(case: Case) -> None:
    for dtype, most in ROUNDED.items():
        model = case.load(dtype=dtype)
        if model.dtype != dtype:
            raise WrongError(f"{model.dtype} in place of {dtype}")
        case.require_same(model, most)


def static_cache(case: Case) -> None:
    case.require_tokens(case.load(), cache_implementation="static")


def compiled(case: Case) -> None:
    model = case.load()
    # inductor takes minutes for a model on a busy core; what it would be given is the same graphs
    case.require_same(torch.compile(model, backend="aot_eager"), EXACT)


def saved_again(case: Case) -> None:
    model = case.load()
    model.save_pretrained(case.scratch / "again")
    case.require_same(case.load(case.scratch / "again"))


def saved_and_evaluated(case: Case) -> None:
    from lrc.checkpoint.hf_quantizer import open_model

    case.load().save_pretrained(case.scratch / "again")
    case.tokenizer().save_pretrained(case.scratch / "again")
    case.require_same(open_model(str(case.scratch / "again"), dtype=torch.float32, trust_remote_code=case.trusted)[0])


def save(case: Case) -> None:
    case.load().save_pretrained(case.scratch / "again")


def opened_again(case: Case) -> None:
    case.require_same(case.load(case.scratch / "again"))


def dequantized(case: Case) -> None:
    model = case.load().dequantize()
    case.require_same(model)


def _lora(case: Case) -> Any:
    from peft import LoraConfig

    config = LoraConfig(target_modules=["q_proj", "o_proj"], r=4, task_type="CAUSAL_LM")
    if "lrc" in sys.modules:
        import lrc

        lrc.lora_config(config)
    return config


def with_peft(case: Case) -> None:
    from peft import PeftModel, get_peft_model

    model = get_peft_model(case.load(), _lora(case))
    case.require_same(model)
    _train(model)
    after = model(IDS).logits.detach()
    model.save_pretrained(case.scratch / "adapter")
    again = PeftModel.from_pretrained(case.load(), case.scratch / "adapter", config=_lora(case)).eval()
    if not torch.allclose(again(IDS).logits, after, atol=1e-4):
        raise WrongError("the saved adapter gives other logits")


def trained(case: Case) -> None:
    model = case.load()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    _train(model)


def _train(model: Any) -> None:
    """A few steps, which must lower the loss."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.Adam(parameters, lr=1e-3), []
    for _ in range(4):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        losses.append(float(loss))
        optimizer.step()
        optimizer.zero_grad()
    if not losses[-1] < losses[0]:
        raise WrongError(f"loss {losses[0]:.4f} before and {losses[-1]:.4f} after training")


def lm_eval(case: Case) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    more = {"trust_remote_code": True} if case.trusted else {}
    model = HFLM(pretrained=str(case.folder), device="cpu", dtype="float32", batch_size=1, **more)
    request = Instance("loglikelihood", {}, ("the quick brown", " fox jumps over"), 0)
    found = model.loglikelihood([request], disable_tqdm=True)[0][0]
    context, continuation = (model.tok_encode(text) for text in ("the quick brown", "the quick brown fox jumps over"))
    scores = case.load()(torch.tensor([continuation])).logits.log_softmax(-1)[0]
    wanted = sum(float(scores[place - 1, continuation[place]]) for place in range(len(context), len(continuation)))
    case.require_same(model.model)
    if abs(found - wanted) > 1e-3 * abs(wanted):
        raise WrongError(f"log-likelihood {found:.4f} in place of {wanted:.4f}")


_PARALLEL = """
import sys, torch
if sys.argv[3] == "True":
    import lrc
from transformers import AutoModelForCausalLM
held = torch.load(sys.argv[2])
trust = sys.argv[4] == "True"
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, tp_plan="auto", trust_remote_code=trust)
assert model._tp_size == 2
with torch.no_grad():
    found = model.eval()(torch.arange(3, 40)[None]).logits
found = found.full_tensor() if hasattr(found, "full_tensor") else found
difference = float((found - held["logits"]).norm() / held["logits"].norm())
sys.stdout.write(f"DIFFERENCE {difference}\\n")  # at once: two processes write
"""


def parallel(case: Case) -> None:
    script, held = case.scratch / "parallel.py", case.scratch / "expected.pt"
    script.write_text(_PARALLEL)
    torch.save(case.expected, held)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*torchrun, script, case.folder, held, "lrc" in sys.modules, case.trusted]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, cwd="/", timeout=LIMIT)
    found = [line.split() for line in done.stdout.splitlines() if line.startswith("DIFFERENCE")]
    if done.returncode or not found:
        said = re.findall(r"^\[rank\d\]: ((?:\w+\.)*\w*(?:Error|Exception).*)$", done.stderr, re.MULTILINE)
        raise RuntimeError(said[0] if said else done.stderr[-300:])
    if any(float(difference) > EXACT for _, difference in found):
        raise WrongError(f"logits differ by {max(float(difference) for _, difference in found):.2%}")


@dataclass(frozen=True)
class Loader:
    """A way of loading.

    Args:
        run: raises where it is refused, `WrongError` where it answers wrongly.
        lrc: whether the process imports lrc.
        before: run in a process of its own, with lrc, before.
    """

    run: Callable[[Case], None]
    lrc: bool = True
    before: Callable[[Case], None] | None = None


LOADERS = {
    "plain": Loader(opened, lrc=False),
    "with lrc": Loader(opened),
    "pipeline": Loader(as_pipeline),
    "device_map": Loader(device_map),
    "disk offload": Loader(offloaded),
    "16-bit dtypes": Loader(half_precisions),
    "static cache": Loader(static_cache),
    "torch.compile": Loader(compiled),
    "saved again": Loader(saved_again),
    "saved again, plain": Loader(opened_again, lrc=False, before=save),
    "saved again, lrc eval": Loader(saved_and_evaluated),
    "dequantize": Loader(dequantized),
    "PEFT": Loader(with_peft),
    "training": Loader(trained),
    "lm_eval hf": Loader(lm_eval),
    "tensor parallel": Loader(parallel),
}


# ---- the table


def made(kind: Kind, folder: Path) -> Path:
    """Make a result or an export; lrc is imported here."""
    sys.path.insert(0, str(ROOT / "tests"))
    from pipeline import compress
    from tiny import tiny_text, write_tiny

    from lrc.export.write import export

    text = folder / "text.txt"
    text.write_text(tiny_text(20_000))
    model = folder / "model"
    model.mkdir()
    write_tiny(model, kind.family, **(kind.changes or {}))
    compress(model, folder / "result", text, kind.recipe, **kind.settings)
    return export(folder / "result", kind.to, out=folder / "export").folder if kind.to else folder / "result"


def prepared(kind: Kind, folder: Path) -> None:
    """Make it, and keep what the result answers as lrc opens it."""
    import lrc  # noqa: F401

    made(kind, folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "result", dtype=torch.float32).eval()
    with torch.no_grad():
        tokens = model.generate(PROMPT, max_new_tokens=8, do_sample=False)
        held = {"logits": model(IDS).logits, "tokens": tokens, "layers": model.config.num_hidden_layers}
    torch.save(held, folder / "expected.pt")


def in_child(work: Callable[[], object], with_lrc: bool) -> str:
    """Run it in a forked process; 'works', 'WRONG: …' or 'refused: …'."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        said = "works"
        try:
            os.setsid()
            signal.alarm(LIMIT)
            null = os.open(os.devnull, os.O_WRONLY)
            for number in (1, 2):
                os.dup2(null, number)
            torch.set_num_threads(1)
            torch.manual_seed(0)
            if with_lrc:
                import lrc  # noqa: F401
            else:
                sys.modules["lrc"] = None  # type: ignore[assignment]
            work()
        except WrongError as error:
            said = f"WRONG: {error}"
        except BaseException as error:  # noqa: BLE001 (whatever a library raises is what a person would see)
            said = f"refused: {type(error).__name__}: {_line(error)}"
            if os.environ.get("TRACE"):
                said += "\n" + traceback.format_exc()
        os.write(write, said.encode()[:60_000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return said or f"refused: the process ended with {status}"


def _line(error: BaseException) -> str:
    text = re.sub(r"\S*/lrc-loaders-\w+/", "", " ".join(str(error).split()))
    return text if len(text) < 240 else text[:240] + " …"


def cells(asked: dict[str, list[str]]) -> Iterator[tuple[str, str, str]]:
    """(Kind, loader, answer), as they are ready; `asked` has the loaders of each kind."""
    for name, loaders in asked.items():
        with tempfile.TemporaryDirectory(prefix="lrc-loaders-") as place:
            folder, kind = Path(place), KINDS[name]
            said = in_child(lambda: prepared(kind, folder), with_lrc=True)  # noqa: B023 (called at once)
            if said != "works":
                yield name, "", said
                continue
            expected = torch.load(folder / "expected.pt")
            for loader in loaders:
                scratch = folder / "scratch"
                scratch.mkdir()
                where = folder / ("export" if kind.to else "result")
                case = Case(where, expected, scratch, kind.to == "self-contained")
                way = LOADERS[loader]
                answer = "works" if way.before is None else in_child(lambda: way.before(case), with_lrc=True)  # noqa: B023
                if answer == "works":
                    answer = in_child(lambda: way.run(case), way.lrc)  # noqa: B023
                yield name, loader, answer
                shutil.rmtree(scratch)


def table(found: dict[tuple[str, str], str]) -> str:
    """The table, and the refusals below it."""
    loaders = [loader for loader in LOADERS if any(loader == each for _, each in found)]
    notes: dict[str, int] = {}
    lines = ["| | " + " | ".join(loaders) + " |", "|---" * (len(loaders) + 1) + "|"]
    for kind in (kind for kind in KINDS if any(kind == each for each, _ in found)):
        row = []
        for loader in loaders:
            answer = found.get((kind, loader), "not run")
            state, _, why = answer.partition(": ")
            row.append(state if not why else f"{state} [{notes.setdefault(why, len(notes) + 1)}]")
        lines.append(f"| {kind} | " + " | ".join(row) + " |")
    return "\n".join(lines + [""] + [f"{number}. {why}" for why, number in notes.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="only this kind; may be repeated")
    parser.add_argument("--loader", action="append", choices=list(LOADERS), help="only this way; may be repeated")
    parser.add_argument("--results", type=Path, help="file of finished cells, read and written")
    asked = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    found: dict[tuple[str, str], str] = {}
    if asked.results and asked.results.exists():
        found = {(kind, loader): answer for kind, loader, answer in json.loads(asked.results.read_text())}
    started = time.perf_counter()
    loaders = asked.loader or list(LOADERS)
    missing = {kind: [loader for loader in loaders if (kind, loader) not in found] for kind in asked.kind or KINDS}
    for kind, loader, answer in cells({kind: left for kind, left in missing.items() if left}):
        print(f"{time.perf_counter() - started:6.0f} s  {kind} | {loader or 'made'} | {answer}", flush=True)
        found[kind, loader] = answer
        if asked.results:
            asked.results.write_text(json.dumps([[*key, answer] for key, answer in found.items()], indent=1))
    if not (asked.kind or asked.loader):
        with contextlib.suppress(FileNotFoundError):
            head = PAGE.read_text().partition("<!-- table -->")[0]
            packages = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch", "peft", "lm_eval"))
            PAGE.write_text(f"{head}<!-- table -->\n\n{packages}.\n\n{table(found)}\n")
    if any(answer.startswith("WRONG") for answer in found.values()):
        sys.exit("A cell is wrong.")


if __name__ == "__main__":
    main()
