"""Tokenizers of tiktoken's ranks and of tekken.json, against the tiktoken library."""

import base64
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import tiktoken

from engine.config.tokenizer_files import read_tekken, read_tiktoken
from server.text.folder_tokenizer import TIKTOKEN_PATTERNS
from server.text.gguf_tokenizer import LLAMA3, PRE_TOKENIZERS
from server.text.tiktoken_tokenizer import byte_alphabet
from server.text.tokenizer import Tokenizer
from tests.support.examples import num_examples
from tests.support.random_texts import LINES, random_texts
from tests.support.trained_tokenizers import byte_level_bpe, streamed_text
from tests.support.wheel_members import wheel_member

TEKKEN_PATTERN = PRE_TOKENIZERS["tekken"].patterns[0]


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    """Ranks of byte-level BPE, trained on the lines that the random texts are made of."""
    to_byte, vocab = byte_alphabet(), byte_level_bpe(LINES, 800).get_vocab()
    return {bytes(map(to_byte.__getitem__, token)): rank for token, rank in vocab.items()}


def write_tiktoken(path: Path, ranks: dict[bytes, int], config: dict[str, Any] | None = None) -> Path:
    lines = (b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items())
    path.write_bytes(b"".join(lines))
    (path.parent / "tokenizer_config.json").write_text(json.dumps(config or {}))
    return path.parent


def write_tekken(folder: Path, ranks: dict[bytes, int], special: list[str] | None, num_special: int = 30) -> Path:
    in_order = [*sorted(ranks, key=ranks.__getitem__), b"beyond the size"]
    vocab = [{"rank": rank, "token_bytes": base64.b64encode(token).decode()} for rank, token in enumerate(in_order)]
    config: dict[str, Any] = {"pattern": TEKKEN_PATTERN, "version": "v3" if special is None else "v11"}
    config |= {"num_vocab_tokens": len(ranks) + 1, "default_vocab_size": len(ranks) + num_special}
    tekken = {"config": config | {"default_num_special_tokens": num_special}, "vocab": vocab}
    if special is not None:
        tokens = [{"rank": rank, "token_str": text, "is_control": True} for rank, text in enumerate(special)]
        tekken["special_tokens"] = tokens
    (folder / "tekken.json").write_text(json.dumps(tekken))
    return folder


def assert_same(
    tokenizer: Tokenizer, ranks: dict[bytes, int], pattern: str, texts: Iterable[str], first_id: int = 0
) -> None:
    """Compare ids, decoded text and streamed text with those of the library for these ranks."""
    reference = tiktoken.Encoding("reference", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    for text in texts:
        token_ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
        assert token_ids == [rank + first_id for rank in reference.encode_ordinary(text)], repr(text)
        assert tokenizer.decode(token_ids) == streamed_text(tokenizer, token_ids) == text


@pytest.mark.drawn
@pytest.mark.parametrize("name", [*TIKTOKEN_PATTERNS, "tekken.json"])
def test_small_ranks(name: str, ranks: dict[bytes, int], tmp_path: Path, rng: random.Random) -> None:
    is_tekken, texts = name == "tekken.json", random_texts(rng, num_examples(200, 10_000))
    write = write_tekken(tmp_path, ranks, None) if is_tekken else write_tiktoken(tmp_path / name, ranks)
    pattern = TEKKEN_PATTERN if is_tekken else TIKTOKEN_PATTERNS[name]
    assert_same(Tokenizer.from_model(write), ranks, pattern, texts, 30 if is_tekken else 0)


REAL = [
    ("llama-models==0.3.0", "llama_models/llama3/tokenizer.model", "tokenizer.model"),
    ("dashscope==2.0.2", "dashscope/resources/qwen.tiktoken", "qwen.tiktoken"),
    ("mistral-common==1.13.1", "mistral_common/data/tekken_240718.json", "tekken.json"),
    ("mistral-common==1.13.1", "mistral_common/data/tekken_240911.json", "tekken.json"),
]


@pytest.mark.drawn
@pytest.mark.long
@pytest.mark.parametrize(("requirement", "member", "name"), REAL)
def test_real_files(requirement: str, member: str, name: str, tmp_path: Path, rng: random.Random) -> None:
    """For tekken.json, the reference is what mistral-common makes of the file."""
    (tmp_path / name).symlink_to(wheel_member(requirement, member))
    tokenizer, texts = Tokenizer.from_model(tmp_path), random_texts(rng, 5000)
    if name == "tekken.json":
        tekken = read_tekken(tmp_path / name)
        assert_same(tokenizer, tekken.ranks, tekken.pattern, texts, 1000)
    else:
        assert_same(tokenizer, read_tiktoken(tmp_path / name), TIKTOKEN_PATTERNS[name], texts)


def test_special_tokens_of_a_tekken(ranks: dict[bytes, int], tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_model(write_tekken(tmp_path, ranks, ["<unk>", "<s>", "</s>", "[INST]"]))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.add_bos) == (1, 2, True)
    assert tokenizer.vocab_size == len(ranks) + 30
    assert tokenizer.special_ids == set(range(30))
    assert tokenizer.encode("[INST]") == [1, 3]
    assert tokenizer.decode([29], skip_special_tokens=False) == "<SPECIAL_29>"
    assert tokenizer.special_ids.isdisjoint(tokenizer.encode("[INST]", add_special_tokens=False, parse_special=False))
    old = Tokenizer.from_model(write_tekken(tmp_path, ranks, None))
    ids = {"[INST]": 3, "[TOOL_CALLS]": 9, "[TOOL_CONTENT]": 19, "<SPECIAL_20>": 20}
    assert old.special_ids_in(ids) == ids


def test_special_tokens_of_qwen(ranks: dict[bytes, int], tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_model(write_tiktoken(tmp_path / "qwen.tiktoken", ranks))
    size = len(ranks)
    assert tokenizer.encode("<|im_start|><|im_end|><|extra_204|>") == [size + 1, size + 2, size + 207]
    assert tokenizer.vocab_size == size + 208
    assert not tokenizer.add_bos


def test_special_tokens_of_the_configuration(ranks: dict[bytes, int], tmp_path: Path) -> None:
    size = len(ranks)
    added = {str(size): {"content": "<|begin|>", "special": True}, str(size + 9): {"content": "<tool>"}}
    config = {"added_tokens_decoder": added, "bos_token": "<|begin|>"}
    tokenizer = Tokenizer.from_model(write_tiktoken(tmp_path / "tokenizer.model", ranks, config))
    assert tokenizer.vocab_size == size + 10
    assert tokenizer.encode("<tool>") == [size, size + 9]
    assert tokenizer.special_tokens == ("<|begin|>",)
    config["add_bos_token"] = False  # type: ignore[assignment]
    write_tiktoken(tmp_path / "tokenizer.model", ranks, config)
    assert Tokenizer.from_model(tmp_path).encode("<tool>") == [size + 9]


def test_a_special_token_that_is_also_made_by_merges(tmp_path: Path) -> None:
    """The special token has its own id, and plain text never becomes it."""
    ranks = {b"<": 0, b"s": 1, b">": 2, b"<s": 3, b"<s>": 4}
    config = {"added_tokens_decoder": {"5": {"content": "<s>", "special": True}}, "pat_str": r"[\s\S]+"}
    tokenizer = Tokenizer.from_model(write_tiktoken(tmp_path / "x.tiktoken", ranks, config))
    assert tokenizer.encode("<s><s") == [5, 3]
    assert tokenizer.encode("s<s>", parse_special=False) == [1, 3, 2]


def test_the_pattern_is_never_guessed(ranks: dict[bytes, int], tmp_path: Path, rng: random.Random) -> None:
    folder = write_tiktoken(tmp_path / "other.tiktoken", ranks)
    with pytest.raises(ValueError, match=r"other\.tiktoken: the pattern that splits text is missing: set `pat_str`"):
        Tokenizer.from_model(folder)
    write_tiktoken(tmp_path / "other.tiktoken", ranks, {"pat_str": LLAMA3})
    assert_same(Tokenizer.from_model(folder), ranks, LLAMA3, random_texts(rng, 100))


@pytest.mark.parametrize("pattern", [r"\p{N}{1,3}+|.", r"\s++$|.", r"^a|."])
def test_patterns_that_mean_something_else_are_refused(pattern: str, ranks: dict[bytes, int], tmp_path: Path) -> None:
    folder = write_tiktoken(tmp_path / "other.tiktoken", ranks, {"pat_str": pattern})
    with pytest.raises(ValueError, match=r"the pattern .* is not supported, because of"):
        Tokenizer.from_model(folder)
