"""`lrc generate`: what several models write after the same prompt."""

from __future__ import annotations

from typing import Annotated

import typer

from ...errors import together
from ..common.arguments import interruptible, quiet
from ..common.json_output import Json, answered, require_json
from ..common.options import Trust

Models = Annotated[list[str], typer.Argument(metavar="MODEL", help="Models and results, one or several.")]
Dtype = Annotated[
    str | None, typer.Option(show_default="each checkpoint's", help="Dtype of all: float32, bfloat16 or float16.")
]


def generate(
    models: Models,
    prompt: Annotated[str, typer.Option(help="The beginning of the text.")],
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens to write.")] = 40,
    seed: Annotated[
        int | None, typer.Option(show_default="the likeliest token each time", help="Draw tokens at random, by this seed.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, or auto.")] = "cpu",
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    json_file: Json = None,
) -> None:
    """Let models write after a prompt, side by side."""
    from ...checkpoint.opening import devices_of, dtype_of, located

    with together() as check:
        check(require_json, json_file)
        number = check(dtype_of, dtype)
        check(devices_of, device)
        for location in [check(located, name) for name in models]:
            if location is not None:
                check(location.require_tokenizer)
    quiet()
    from ...evaluation.side_by_side import HowToOpen, written

    how = HowToOpen(number, device.strip(), trust_remote_code)
    answers = []
    with interruptible("what was written is above"):
        for name in models:
            answer = written(name, prompt, tokens, how, seed)
            answers.append(answer)
            if json_file != "-":
                print(f"{name} ({answer['dtype']}, {answer['tokens_per_second']:.1f} tokens/s)")
                print(f"  {prompt}▸{answer['text']}\n")
    answered(json_file, {"prompt": prompt, "answers": answers})
