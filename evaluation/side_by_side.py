"""Several models beside each other: what each writes after a prompt, what each takes, and how far predictions differ.

One model is in memory at a time.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..calibrate.data import EvaluationText
from ..checkpoint.folder import RECORD, read_record
from ..checkpoint.hf_quantizer import open_model
from ..checkpoint.opening import located
from ..checkpoint.untrusted.files import size_of
from ..errors import RequestError
from ..model.divergence import divergence
from ..model.events import silent
from ..model.machine.precision import full_precision
from .perplexity import WindowedText, prepends_bos, token_perplexity, windowed
from .request import Request, Settings


@dataclass(frozen=True)
class HowToOpen:
    """How every one of the models is opened."""

    dtype: torch.dtype | None = None
    device: str = "cpu"
    trust_remote_code: bool = False

    def __call__(self, name: str) -> tuple[Any, Any]:
        """(model, tokenizer)."""
        return open_model(name, dtype=self.dtype, device=self.device, trust_remote_code=self.trust_remote_code)


@full_precision
def written(name: str, prompt: str, tokens: int, how: HowToOpen, seed: int | None = None) -> dict[str, Any]:
    """What a model writes after a prompt.

    Args:
        tokens: how many, unless the model ends the text before.
        seed: samples with this seed; None takes the likeliest token each time.

    Raises:
        LrcError: the model cannot be opened.
        RequestError: the prompt has no token.
    """
    model, tokenizer = how(name)
    given = tokenizer(prompt, return_tensors="pt").to(model.device)
    if not given["input_ids"].numel():
        raise RequestError("The prompt has no token.", "Give some text as --prompt.")
    inputs = {key: given[key] for key in ("input_ids", "attention_mask") if key in given}
    if seed is not None:
        torch.manual_seed(seed)
    started = time.perf_counter()
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=seed is not None, pad_token_id=tokenizer.eos_token_id)
    seconds = time.perf_counter() - started
    new = ids[0, inputs["input_ids"].shape[1] :]
    return {
        "model": name,
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "tokens": len(new),
        "tokens_per_second": len(new) / seconds,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def held(name: str) -> dict[str, Any]:
    """What a checkpoint takes on disk, and the forms of its matrices where lrc wrote it.

    Raises:
        LrcError: there is no such model, or its record is damaged.
    """
    location = located(name)
    files = [location.path / location.gguf] if location.gguf else sorted(location.path.glob("*.safetensors"))
    forms: Counter[str] = Counter()
    found: dict[str, Any] = {"model": name, "bytes": sum(path.stat().st_size for path in files)}
    if size_of(location.path / RECORD) is not None:
        record = read_record(location.path)
        for target in record["targets"]:
            forms[str(target["form"].get("kind", "dense"))] += 1
        found |= {"recipe": record["recipe"].get("method") or "several", "ratio": record["ratio"]}
    return found | {"forms": dict(forms)}


@full_precision
def compared(names: Sequence[str], text: EvaluationText, windows: int, length: int, how: HowToOpen) -> list[dict[str, Any]]:
    """Size, forms, perplexity, and divergence from the first model, of several models.

    The first model's logits over all windows are kept in memory: windows × length × vocabulary numbers in its dtype.

    Raises:
        LrcError: a model cannot be opened, or the text is too short.
    """
    found: list[dict[str, Any]] = [held(name) for name in names]
    request = Request(Settings(["text"], length=length, max_windows=windows), {"text": text}, None)
    first: tuple[WindowedText, list[torch.Tensor]] | None = None
    for entry in found:
        model, tokenizer = how(entry["model"])
        mine = windowed(model, tokenizer, "text", request, prepends_bos(tokenizer, "auto", []))
        with torch.inference_mode():
            result = token_perplexity(model, mine, 1, silent)
            same = first is None or torch.equal(first[0].windows, mine.windows)
            logits, far = [], 0.0
            for index, window in enumerate(mine.windows if same else ()):
                now = model(input_ids=window[None].to(model.device), use_cache=False).logits[0].cpu()
                if first is None:
                    logits.append(now)
                elif first[1][index].shape == now.shape:
                    far += divergence(first[1][index], now)
                else:
                    same = False
        entry |= {"perplexity": result.value, "stderr": result.stderr, "tokens": result.tokens}
        entry["divergence"] = far / mine.windows.numel() if same else None
        entry["tokens_per_second"] = result.protocol["tokens_per_second"]
        if first is None:
            first = (mine, logits)
        del model
    return found
