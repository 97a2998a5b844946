"""The tokenizer as llama.cpp reads it.

llama.cpp splits text by the name of a pre-tokenizer, not by what the tokenizer's file says. The name is found here from the
rules in that file, and the check of the export compares tokens of both.

Source: github.com/ggml-org/llama.cpp, src/llama-vocab.cpp.
"""

from __future__ import annotations

import json
from typing import Any

from ...errors import RequestError

_REMEDY = "Export to 'dense', and convert that with llama.cpp's convert_hf_to_gguf.py, which knows more tokenizers."
_CASES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# what comes before the merges -> its name in llama.cpp
PRE_TOKENIZERS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (_CASES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST, "bytes"): "llama-bpe",
    (_CASES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST, "bytes"): "qwen2",
}


def pre_tokenizer(content: dict[str, Any]) -> str:
    """The name that llama.cpp has for the rules that split text before byte-level merges.

    Args:
        content: of tokenizer.json.

    Raises:
        RequestError: it has none that is known here.
    """
    given = content.get("pre_tokenizer") or {}
    steps = given.get("pretokenizers", [given])
    rules: list[str] = []
    for step in steps:
        if step.get("type") == "ByteLevel":
            rules.append("ByteLevel" if step.get("use_regex", True) else "bytes")
        elif step.get("type") == "Digits" and step.get("individual_digits"):
            rules.append("Digits")
        elif step.get("type") == "Split" and not step.get("invert") and step.get("behavior") == "Isolated":
            rules.append(step["pattern"].get("Regex", json.dumps(step["pattern"])))
        else:
            rules.append(json.dumps(step))
    # "Digits" before a ByteLevel with the rule of GPT-2, the first of which may stand in a Split
    if (name := PRE_TOKENIZERS.get(tuple(rules))) is None or content.get("normalizer") not in (None, {"type": "NFC"}):
        raise RequestError(f"The tokenizer splits text by rules that have no name here for llama.cpp: {rules}.", _REMEDY)
    return name


def add_vocabulary(writer: Any, tokenizer: Any, rows: int) -> None:
    """Write the tokenizer's tokens, merges and special tokens.

    Args:
        writer: a GGUFWriter.
        tokenizer: of transformers, with a tokenizer.json behind it.
        rows: of the embedding; rows without a token get a name of their own.

    Raises:
        RequestError: llama.cpp has no tokenizer of this kind.
    """
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise RequestError(f"A {type(tokenizer).__name__} has no tokenizer.json to read tokens from.", _REMEDY)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise RequestError(f"The tokenizer is a {model['type']} model, and only BPE is written.", _REMEDY)
    merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
    if model.get("byte_fallback"):
        _require_sentencepiece(content)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        tokens, types = _tokens(content, rows, bytes_=True)
        writer.add_token_list(tokens)
        writer.add_token_scores(_scores(tokens, model["merges"]))
        writer.add_add_space_prefix(_adds_a_space(tokenizer))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer(content))
        tokens, types = _tokens(content, rows, bytes_=False)
        writer.add_token_list(tokens)
        writer.add_token_merges(merges)
    writer.add_token_types(types)
    _add_special(writer, tokenizer)


def _require_sentencepiece(content: dict[str, Any]) -> None:
    normal = json.dumps(content.get("normalizer") or content.get("pre_tokenizer") or {})
    if "\\u2581" not in normal:
        raise RequestError("The tokenizer has byte fallback, and does not write spaces as SentencePiece does.", _REMEDY)


def _tokens(content: dict[str, Any], rows: int, bytes_: bool) -> tuple[list[str], list[int]]:
    """Tokens by their numbers and the type of each."""
    from gguf import TokenType

    known = {number: text for text, number in content["model"]["vocab"].items()}
    added = {each["id"]: each for each in content.get("added_tokens", [])}
    tokens, types = [], []
    for number in range(rows):
        text = added[number]["content"] if number in added else known.get(number)
        if text is None:
            text, kind = f"[PAD{number}]", TokenType.UNUSED
        elif number in added:
            kind = TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED
            if bytes_ and text == content["model"].get("unk_token"):
                kind = TokenType.UNKNOWN
        elif bytes_ and len(text) == 6 and text.startswith("<0x"):
            kind = TokenType.BYTE
        else:
            kind = TokenType.NORMAL
        tokens.append(text)
        types.append(int(kind))
    return tokens, types


def _scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """Scores by which SentencePiece merges in the order of the merges: minus the first that makes a token."""
    first: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        first.setdefault(left + right, rank)
    return [-float(first.get(token, 0)) for token in tokens]


def _adds_a_space(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a space before a text."""
    (first, *_) = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False).input_ids)
    return bool(first.startswith("\u2581"))


def _add_special(writer: Any, tokenizer: Any) -> None:
    plain = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    before = whole[: -len(plain)] if whole[-len(plain) :] == plain else whole[: whole.index(plain[0])]
    writer.add_add_bos_token(bool(before) and before[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(whole) > len(before) + len(plain) and whole[-1] == tokenizer.eos_token_id)
    for name in ("bos", "eos", "pad", "unk"):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
