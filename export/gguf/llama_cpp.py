"""A script that runs llama.cpp on a GGUF file: what the check of an export compares.

It runs in a process of its own, because llama.cpp ends its process where a file is wrong. It knows nothing of lrc.

    python llama_cpp.py < request > /dev/null

The request is JSON: model, lora (a file or null), prompts (lists of tokens), texts, answer (a file). The answer is JSON:
log probabilities of all tokens after each prompt, and the tokens of each text.
"""

from __future__ import annotations

import json
import sys
from urllib.request import Request, urlopen


def main() -> None:
    """Answer the request on standard input."""
    import xllamacpp

    request = json.load(sys.stdin)
    params = xllamacpp.CommonParams()
    params.model.path = request["model"]
    params.n_ctx, params.n_parallel, params.warmup = 64, 1, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if request["lora"]:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = request["lora"], 1.0
        params.lora_adapters = [adapter]
    server = xllamacpp.Server(params)
    address = server.listening_address

    def ask(path: str, **content: object) -> dict:
        with urlopen(Request(address + path, json.dumps(content).encode(), {"Content-Type": "application/json"})) as answer:
            found: dict = json.load(answer)
        return found

    # The probabilities are those before sampling, so a bias does not change them. It makes a token that is a whole character
    # the next one: the server holds back the probabilities of others.
    shown = ask("/tokenize", content="a", add_special=False)["tokens"][-1]
    probabilities = []
    for prompt in request["prompts"]:
        done = ask(
            "/completion",
            prompt=prompt,
            n_predict=1,
            n_probs=request["vocabulary"],
            temperature=0,
            logit_bias=[[shown, 1000.0]],
        )
        row = [float("nan")] * request["vocabulary"]
        for each in done["completion_probabilities"][0]["top_logprobs"]:
            row[each["id"]] = each["logprob"]
        probabilities.append(row)
    tokens = [ask("/tokenize", content=text, add_special=True)["tokens"] for text in request["texts"]]
    with open(request["answer"], "w") as file:
        json.dump({"probabilities": probabilities, "tokens": tokens}, file)


if __name__ == "__main__":
    main()
