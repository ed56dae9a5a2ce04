"""Vocabularies of real models, reduced to what some texts need.

BPE joins neighbours only. So for given texts, only tokens and merges matter whose text occurs in one of them; a
vocabulary reduced to these, under the same ids, gives the same token ids for these texts as the whole one.

    python -m tests.support.pruned_vocabulary FOLDER...

writes the files in tests/server/text/vocabularies, from folders with llama.cpp's files `ggml-vocab-NAME.gguf`,
`.gguf.inp` (texts) and `.gguf.out` (the ids that llama.cpp gives them), which are in the folder `models` of
https://github.com/ggml-org/llama.cpp (MIT license, Copyright (c) 2023-2026 The ggml authors).
"""

import json
import sys
from array import array
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from engine.shared.gguf import GGUFFile
from server.text.gguf_tokenizer import SPACE, GGUFVocabulary, build_tokenizer
from tests.support.paths import ROOT

FOLDER = ROOT / "tests/server/text/vocabularies"
SEPARATOR = "\n__ggml_vocab_test__\n"
NORMAL = 1
LISTS = ("tokens", "token_type", "scores", "merges")


class PrunedVocabulary(NamedTuple):
    """A reduced vocabulary, as metadata of a GGUF file, and the texts for which it is whole, with their token ids."""

    metadata: dict[str, Any]
    cases: list[tuple[str, list[int]]]


def load(name: str) -> PrunedVocabulary:
    """Read a reduced vocabulary. Ids of tokens that were left out have fillers."""
    pruned = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    metadata: dict[str, Any] = pruned["metadata"]
    size = metadata.pop("num_tokens")
    tokens, types, scores = [f"[left out {index}]" for index in range(size)], [NORMAL] * size, [0.0] * size
    for token_id, token, token_type, *score in pruned["tokens"]:
        tokens[token_id], types[token_id], scores[token_id] = token, token_type, score[0] if score else 0.0
    metadata |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": array("i", types)}
    if pruned["has_scores"]:
        metadata["tokenizer.ggml.scores"] = array("f", scores)
    if pruned["merges"] is not None:
        metadata["tokenizer.ggml.merges"] = pruned["merges"]
    return PrunedVocabulary(metadata, [(text, token_ids) for text, token_ids in pruned["cases"]])


def tokenizer_of(metadata: dict[str, Any], source: str) -> tokenizers.Tokenizer:
    vocabulary = GGUFVocabulary(metadata, source)
    return build_tokenizer(vocabulary, architecture=metadata["general.architecture"])


def prune(path: Path) -> dict[str, Any]:
    """Return a reduced vocabulary and its cases, in the form of the files."""
    with GGUFFile(path) as file:
        metadata = dict(file.metadata)
    texts = path.with_suffix(".gguf.inp").read_text(encoding="utf-8").removesuffix(SEPARATOR).split(SEPARATOR)
    lines = path.with_suffix(".gguf.out").read_text(encoding="utf-8").splitlines()
    ids = [[int(token_id) for token_id in line.split()] for line in lines]
    lists = {key: metadata.pop(f"tokenizer.ggml.{key}", None) for key in LISTS}
    spelled = [spell(text, metadata) for text in texts]

    def occurs(token: str) -> bool:
        return any(token in text for text in spelled)

    rows = zip(lists["tokens"], lists["token_type"], lists["scores"] or [None] * len(lists["tokens"]), strict=True)
    tokens = [
        [index, token, kind, *([] if score is None else [score])]
        for index, (token, kind, score) in enumerate(rows)
        if kind != NORMAL or occurs(token)
    ]
    merges = lists["merges"] and [merge for merge in lists["merges"] if occurs(merge.replace(" ", ""))]
    return {
        "metadata": {key: metadata[key] for key in metadata if is_used(key)} | {"num_tokens": len(lists["tokens"])},
        "has_scores": lists["scores"] is not None,
        "tokens": tokens,
        "merges": merges,
        "cases": list(zip(texts, ids, strict=True)),
    }


def is_used(key: str) -> bool:
    return key == "general.architecture" or key.startswith("tokenizer.ggml.")


def spell(text: str, metadata: dict[str, Any]) -> str:
    """Return a text in the characters of the vocabulary: those that stand for bytes, or U+2581 for spaces."""
    if metadata["tokenizer.ggml.model"] != "gpt2":
        return SPACE + text.replace(" ", SPACE)
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return "".join(piece for piece, _ in byte_level.pre_tokenize_str(text))


def dump(pruned: dict[str, Any]) -> str:
    """Return JSON with a line for each token, merge and case."""

    def lines(values: Any) -> str:
        if not isinstance(values, list):
            return json.dumps(values, ensure_ascii=False)
        return "[\n" + ",\n".join(json.dumps(value, ensure_ascii=False) for value in values) + "\n]"

    return "{\n" + ",\n".join(f"{json.dumps(key)}: {lines(value)}" for key, value in pruned.items()) + "\n}\n"


def main() -> None:
    for path in sorted(path for folder in sys.argv[1:] for path in Path(folder).glob("ggml-vocab-*.gguf")):
        with GGUFFile(path) as file:
            algorithm = file.metadata["tokenizer.ggml.model"]
        if algorithm in ("gpt2", "llama", "gemma4") and path.with_suffix(".gguf.inp").is_file():
            name = path.stem.removeprefix("ggml-vocab-")
            (FOLDER / f"{name}.json").write_text(dump(prune(path)), encoding="utf-8")


if __name__ == "__main__":
    main()
