"""Tokenizers built from GGUF metadata, against transformers' own conversion, on small trained vocabularies."""

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, trainers
from transformers.integrations.gguf.gguf_tokenizer_mapping import (
    GGUF_PRE_TOKENIZER_SPLITS,
    convert_gguf_tokenizer,
    get_gguf_tokenizer,
)

from engine.shared.gguf import GGUFFile
from server.text import gguf_tokenizer
from server.text.gguf_tokenizer import PRE_TOKENIZERS, GGUFVocabulary, build_tokenizer, rebuild_merges
from server.text.tiktoken_tokenizer import byte_alphabet
from server.text.tokenizer import Tokenizer
from tests.support.examples import num_examples
from tests.support.gguf_files import write_gguf
from tests.support.growth import check_growth

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog was not amused, the fox was.",
    "def add(first, second):\n    return first + second  # the sum\n",
    "In 2024 the price rose by 12.5 %, from 1,000 to 1,125 euros.",
    "Die Größe der Straße überrascht. L'été est là, ça va ? ¿Qué tal?",
    "日本語のテキスト。中文文本。 한국어 텍스트",
]
TEXTS = [
    *CORPUS,
    "",
    " ",
    "   leading and trailing   ",
    "don't DON'T we'll WE'LL it's",
    "a\n\n\nb\r\n\tc \n d",
    "x 1 22 333 4444 ½ x² Ⅷ",
    "😀👩‍👩‍👧 zalgo h\u0301e\u0302 \u200b\ufeff",
    "snake_case CamelCase kebab-case path/to/file.txt",
    "the <s> fox </s><s> the",
]

texts = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("  \n\tabcETHhe123'.,_-/é日")), max_size=40)
some_texts = settings(max_examples=num_examples(20, 300), deadline=None)


@cache
def train(is_byte_level: bool, vocab_size: int = 600) -> tuple[list[str], list[tuple[str, str]]]:
    """Train a BPE on the corpus; return its tokens in the order of their ranks, and its merges."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    if is_byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        alphabet = []
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    words = [word for line in CORPUS for word in line.split(" ")]  # sentencepiece splits at spaces only
    tokenizer.train_from_iterator((CORPUS if is_byte_level else words) * 3, trainer)
    model = tokenizer.model
    assert isinstance(model, models.BPE)
    vocab = tokenizer.get_vocab()
    merges = [
        (left, right)
        for token in sorted(vocab, key=vocab.__getitem__)
        for left, right in ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        if left in vocab and right in vocab
    ]
    return sorted(vocab, key=vocab.__getitem__), merges


def byte_level_metadata(**changes: Any) -> dict[str, Any]:
    tokens, merges = train(is_byte_level=True)
    tokens = [*tokens, "<s>", "</s>", "<think>"]
    types = [NORMAL] * (len(tokens) - 3) + [CONTROL, CONTROL, USER_DEFINED]
    return _metadata("gpt2", tokens, types, {"merges": [" ".join(merge) for merge in merges]} | changes)


def sentencepiece_metadata(**changes: Any) -> dict[str, Any]:
    """Return metadata as in Llama 2: unknown, control, 256 bytes, pieces whose scores are their ranks, no merges."""
    pieces, _ = train(is_byte_level=False)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "<think>"]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(pieces), USER_DEFINED]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(pieces))] + [0.0]
    return _metadata("llama", tokens, types, {"scores": scores, "unknown_token_id": 0} | changes)


def gemma_4_metadata() -> dict[str, Any]:
    merges = [" ".join(merge) for merge in train(is_byte_level=False)[1]]
    return sentencepiece_metadata(scores=..., merges=merges, model="gemma4", add_bos_token=True)


def _metadata(model: str, tokens: list[str], types: list[int], more: dict[str, Any]) -> dict[str, Any]:
    """Write a GGUF file with changed metadata; a change to `...` removes the key."""
    ids = {"bos_token_id": tokens.index("<s>"), "eos_token_id": tokens.index("</s>")}
    values = {"model": model, "tokens": tokens, "token_type": types} | ids | more
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not ...}


def write(folder: Path, metadata: dict[str, Any], arch: str = "llama") -> Path:
    return write_gguf(folder / "tokenizer.gguf", metadata, arch=arch)


def convert(path: Path, arch: str | None = None) -> tokenizers.Tokenizer:
    """Return transformers' tokenizer for the file, without BOS."""
    file_arch, vocabulary, _ = get_gguf_tokenizer(str(path))
    backend, _ = convert_gguf_tokenizer(arch or file_arch, vocabulary)
    assert isinstance(backend, tokenizers.Tokenizer)
    return backend


# Byte-level BPE.


def splits(tokenizer: tokenizers.Tokenizer, text: str) -> list[str]:
    assert tokenizer.pre_tokenizer is not None
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    alphabet = byte_alphabet()
    return [bytes(alphabet[character] for character in piece).decode("utf-8", "replace") for piece in pieces]


@pytest.fixture(scope="module")
def both_splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[tokenizers.Tokenizer, ...]]:
    """Return our tokenizer and that of transformers for each pre-tokenizer that both support."""
    folder = tmp_path_factory.mktemp("pre")
    pairs: dict[str, tuple[tokenizers.Tokenizer, ...]] = {}
    for pre in sorted({"gpt-2", *GGUF_PRE_TOKENIZER_SPLITS} & set(PRE_TOKENIZERS)):
        path = write(folder, byte_level_metadata(pre=pre))
        with GGUFFile(path) as file:
            vocabulary = GGUFVocabulary(file.metadata, str(path))
        pairs[pre] = (build_tokenizer(vocabulary, architecture="llama"), convert(path))
    return pairs


@some_texts
@given(text=texts)
def test_splits_as_transformers_does(text: str, both_splits: dict[str, tuple[tokenizers.Tokenizer, ...]]) -> None:
    assert len(both_splits) > 12
    for pre, (ours, expected) in both_splits.items():
        assert splits(ours, text) == splits(expected, text), pre


def test_splits_that_transformers_does_not_know() -> None:
    for pre, text, expected in (
        ("smollm", "In  2024 x", ["In", "  ", "2", "0", "2", "4", " x"]),
        ("deepseek-v3", "x = 12345;日本", ["x", " =", " ", "123", "45", ";", "日本"]),
    ):
        vocabulary = GGUFVocabulary(_as_read(byte_level_metadata(pre=pre)), "a file")
        assert splits(build_tokenizer(vocabulary, architecture="llama"), text) == expected


@some_texts
@given(text=texts, pre=st.sampled_from(sorted(PRE_TOKENIZERS)))
def test_no_split_loses_text(text: str, pre: str) -> None:
    metadata = _as_read({"tokenizer.ggml.pre": pre, **MINIMAL})
    pre_tokenizer = build_tokenizer(GGUFVocabulary(metadata, "a file"), architecture="llama").pre_tokenizer
    assert pre_tokenizer is not None
    pieces = "".join(piece for piece, _ in pre_tokenizer.pre_tokenize_str(text))
    assert bytes(byte_alphabet()[character] for character in pieces) == text.encode()


MINIMAL = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b", "ab"], "tokenizer.ggml.merges": ["a b"]}


def _as_read(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata as GGUFFile returns it, as far as these tests need it."""
    return {key: value for key, value in metadata.items() if not key.endswith("token_type")}


def test_unknown_split_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tokenizer = Tokenizer.from_model(write(tmp_path, byte_level_metadata(pre="brand-new")))
    assert "brand-new" in caplog.text
    expected = Tokenizer.from_model(write(tmp_path, byte_level_metadata(pre="gpt-2")))
    assert [tokenizer.encode(text) for text in TEXTS] == [expected.encode(text) for text in TEXTS]


def test_whole_words_come_before_merges_in_llama_3(tmp_path: Path) -> None:
    tokens = ["a", "b", "c", "ab", "abc", "<s>", "</s>"]
    metadata = _metadata("gpt2", tokens, [NORMAL] * 5 + [CONTROL] * 2, {"merges": ["a b"], "add_bos_token": False})
    llama3 = Tokenizer.from_model(write(tmp_path, metadata | {"tokenizer.ggml.pre": "llama-bpe"}))
    gpt2 = Tokenizer.from_model(write(tmp_path, metadata | {"tokenizer.ggml.pre": "gpt-2"}))
    assert (llama3.encode("abc"), gpt2.encode("abc")) == ([4], [3, 2])


# Sentencepiece BPE.


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_model(write(tmp_path_factory.mktemp("spm"), sentencepiece_metadata()))


def test_sentencepiece_bytes(sentencepiece: Tokenizer) -> None:
    token_ids = sentencepiece.encode("\U0001f9ff", add_special_tokens=False)
    expected = [b" ", *(bytes([byte]) for byte in "\U0001f9ff".encode())]
    assert [sentencepiece.token_bytes(token_id) for token_id in token_ids] == expected
    assert [sentencepiece.token_bytes(token_id) for token_id in range(3)] == [b"<unk>", b"<s>", b"</s>"]
    assert [sentencepiece.token_bytes(token_id) for token_id in range(3, 259)] == [bytes([b]) for b in range(256)]
    assert sentencepiece.token_bytes(10**6) == sentencepiece.token_bytes(-1) == b""


def test_sentencepiece_without_space_prefix(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_model(write(tmp_path, sentencepiece_metadata(add_space_prefix=False)))
    for text in TEXTS[:8]:
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(map(tokenizer.token_bytes, token_ids)) == text.encode()
        assert tokenizer.decode(token_ids) == text


def test_merges_of_the_file_come_before_scores(tmp_path: Path) -> None:
    tokens = ["<s>", "</s>", "a", "b", "c", "ab", "bc"]
    types, scores = [CONTROL] * 2 + [NORMAL] * 5, [0.0, 0.0, -9.0, -9.0, -9.0, -1.0, -2.0]
    metadata = _metadata("llama", tokens, types, {"scores": scores, "add_space_prefix": False, "add_bos_token": False})
    assert Tokenizer.from_model(write(tmp_path, metadata)).encode("abc") == [5, 4]
    metadata["tokenizer.ggml.merges"] = ["b c", "a b"]
    assert Tokenizer.from_model(write(tmp_path, metadata)).encode("abc") == [2, 6]


def test_plain_text_never_merges_into_a_special_token(tmp_path: Path) -> None:
    tokens = ["<s>", "</s>", "<", "s", ">", "s>", "<s"]
    types, scores = [CONTROL] * 2 + [NORMAL] * 5, [0.0] * 7
    metadata = _metadata("llama", tokens, types, {"scores": scores, "add_space_prefix": False, "add_bos_token": False})
    tokenizer = Tokenizer.from_model(write(tmp_path, metadata))
    assert tokenizer.encode("<s>") == [0]
    assert tokenizer.special_ids.isdisjoint(tokenizer.encode("<s>", parse_special=False))


# Both.


@pytest.mark.parametrize(
    ("make", "changes", "add_bos"),
    [
        (byte_level_metadata, {}, False),
        (byte_level_metadata, {"add_bos_token": True}, True),
        (byte_level_metadata, {"pre": "llama-bpe"}, True),
        (byte_level_metadata, {"pre": "llama-bpe", "add_bos_token": False}, False),
        (sentencepiece_metadata, {}, True),
        (sentencepiece_metadata, {"add_bos_token": False}, False),
        (sentencepiece_metadata, {"bos_token_id": ...}, False),
        (gemma_4_metadata, {}, False),
    ],
)
def test_bos(make: Any, changes: dict[str, Any], add_bos: bool, tmp_path: Path) -> None:
    metadata = make(**changes)
    tokenizer = Tokenizer.from_model(write(tmp_path, metadata))
    assert tokenizer.add_bos is add_bos
    plain = tokenizer.encode("The fox", add_special_tokens=False)
    for parse_special in (True, False):
        token_ids = tokenizer.encode("The fox", parse_special=parse_special)
        assert token_ids == ([tokenizer.bos_token_id, *plain] if add_bos else plain)


def test_named_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_model(write(tmp_path, byte_level_metadata()))
    size = tokenizer.vocab_size
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<s>", size - 3)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("</s>", size - 2)
    assert tokenizer.special_tokens == ("<s>", "</s>")
    assert tokenizer.special_ids == {size - 3, size - 2}
    assert tokenizer.encode("<think>", parse_special=False) == [size - 1]
    tokenizer = Tokenizer.from_model(write(tmp_path, sentencepiece_metadata(add_eos_token=True)))
    assert tokenizer.encode("")[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model: 'bert' is not supported .supported: gpt2, llama, gemma4"),
        ({"model": ...}, "tokenizer.ggml.model: 'missing' is not supported"),
        ({"model": 3}, "tokenizer.ggml.model: must be a string"),
        ({"tokens": ...}, "tokenizer.ggml.tokens: must be a non-empty array of strings"),
        ({"token_type": [1, 2]}, "tokenizer.ggml.token_type: must be an array of"),
        ({"bos_token_id": 10**6}, "tokenizer.ggml.bos_token_id: must be a token id below"),
        ({"add_bos_token": "yes"}, "tokenizer.ggml.add_bos_token: must be true or false"),
        ({"merges": ...}, "tokenizer.ggml.merges: are missing"),
        ({"merges": ["a b", "abc"]}, "tokenizer.ggml.merges: merge 1 is not two tokens"),
        ({"merges": ["zzz zzz"]}, "tokenizer.ggml.merges: do not fit the vocabulary"),
        ({"model": "llama", "merges": ...}, "tokenizer.ggml.scores: are missing"),
        ({"model": "llama", "merges": ..., "scores": [1.0]}, "tokenizer.ggml.scores: must be an array of"),
    ],
)
def test_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path, byte_level_metadata(**changes))
    with pytest.raises(ValueError, match=rf"tokenizer\.gguf: {message}"):
        Tokenizer.from_model(path)


# Merges that the file does not have.


def all_merges(tokens: list[str], ranks: list[float]) -> list[tuple[str, str]]:
    """Return the merges by the definition: every cut of a token into two others is tried."""
    rank_of = dict(zip(tokens, ranks, strict=True))
    cuts = [(rank, cut, token) for token, rank in rank_of.items() for cut in range(1, len(token))]
    merges = [each for each in cuts if each[2][: each[1]] in rank_of and each[2][each[1] :] in rank_of]
    merges.sort(key=lambda merge: (merge[0], merge[1], len(merge[2]) - merge[1]), reverse=True)
    return [(token[:cut], token[cut:]) for _, cut, token in merges]


@given(
    tokens=st.lists(st.text("ab", max_size=7) | st.integers(0, 12).map("a".__mul__), unique=True, max_size=40),
    ranks=st.lists(st.integers(0, 3), min_size=40, max_size=40),
    short=st.sampled_from([0, 2, 4, 128]),
)
@some_texts
def test_rebuilt_merges(tokens: list[str], ranks: list[float], short: int) -> None:
    ranks = ranks[: len(tokens)]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(gguf_tokenizer, "SHORT", short)
        assert rebuild_merges(tokens, [NORMAL] * len(tokens), ranks) == all_merges(tokens, ranks)


@pytest.mark.long
@pytest.mark.parametrize("unit", ["a", "ab"])
def test_a_long_token_is_read_in_linear_time(unit: str) -> None:
    """Trying each cut would take half a minute."""

    def prepare(size: int) -> Callable[[], object]:
        tokens = ["a", "b", "aa", "ab", unit * size]
        return lambda: rebuild_merges(tokens, [NORMAL] * len(tokens), [0.0, 0.0, -1.0, -2.0, -1e9])

    check_growth(prepare, 50_000)
