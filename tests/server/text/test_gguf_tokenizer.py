"""Tokenizers built from GGUF metadata, against transformers' own conversion and llama.cpp; fill-in-the-middle."""

import logging
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from tokenizers import models, normalizers, trainers
from transformers import CodeLlamaTokenizer
from transformers.integrations.gguf import gguf_tokenizer_mapping as reference

from engine.shared.gguf import GGUFFile
from server.text.gguf_tokenizer import PRE_TOKENIZERS, GGUFVocabulary, build_tokenizer, byte_alphabet, rebuild_merges
from server.text.tokenizer import MARKERS, FIMTokens, Tokenizer
from tests.server.text.test_tokenizer import TEXTS, texts
from tests.support.examples import num_examples
from tests.support.gguf_files import write_gguf
from tests.support.pruned_vocabulary import FOLDER, load, tokenizer_of
from tests.support.random_texts import LINES
from tests.support.tiny_tokenizer_model import VOCAB_SIZE, write_tiny_model
from tests.support.trained_tokenizers import byte_level_bpe

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6

some_texts = settings(max_examples=num_examples(20, 300), deadline=None)


@cache
def train(is_byte_level: bool) -> tuple[list[str], list[str]]:
    """Train a BPE on the corpus; return its tokens in the order of their ranks, and its merges."""
    if is_byte_level:
        tokenizer = byte_level_bpe(LINES * 3, 600)
    else:
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        words = [word for line in LINES for word in line.split(" ")]  # sentencepiece splits at spaces only
        tokenizer.train_from_iterator(words * 3, trainers.BpeTrainer(vocab_size=600, show_progress=False))
    vocab = tokenizer.get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    cuts = [(token[:cut], token[cut:]) for token in tokens for cut in range(1, len(token))]
    return tokens, [f"{left} {right}" for left, right in cuts if left in vocab and right in vocab]


def byte_level_metadata(**changes: Any) -> dict[str, Any]:
    tokens, merges = train(is_byte_level=True)
    tokens = [*tokens, "<s>", "</s>", "<think>"]
    types = [NORMAL] * (len(tokens) - 3) + [CONTROL, CONTROL, USER_DEFINED]
    return _metadata("gpt2", tokens, types, {"merges": merges} | changes)


def sentencepiece_metadata(**changes: Any) -> dict[str, Any]:
    """Return metadata as in Llama 2: unknown, control, 256 bytes, pieces whose scores are their ranks, no merges."""
    pieces, _ = train(is_byte_level=False)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "<think>"]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(pieces), USER_DEFINED]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(pieces))] + [0.0]
    return _metadata("llama", tokens, types, {"scores": scores, "unknown_token_id": 0} | changes)


def gemma_4_metadata() -> dict[str, Any]:
    merges = train(is_byte_level=False)[1]
    return sentencepiece_metadata(scores=..., merges=merges, model="gemma4", add_bos_token=True)


def _metadata(model: str, tokens: list[str], types: list[int], more: dict[str, Any]) -> dict[str, Any]:
    """Write a GGUF file with changed metadata; a change to `...` removes the key."""
    ids = {"bos_token_id": tokens.index("<s>"), "eos_token_id": tokens.index("</s>")}
    values = {"model": model, "tokens": tokens, "token_type": types} | ids | more
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not ...}


def write(folder: Path, metadata: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    return write_gguf(folder / "tokenizer.gguf", metadata)


def build(path: Path) -> tokenizers.Tokenizer:
    with GGUFFile(path) as file:
        return build_tokenizer(GGUFVocabulary(file.metadata, str(path)), architecture="llama")


def convert(path: Path) -> tokenizers.Tokenizer:
    """Return transformers' tokenizer for the file, without BOS."""
    architecture, vocabulary, _ = reference.get_gguf_tokenizer(str(path))
    backend, _ = reference.convert_gguf_tokenizer(architecture, vocabulary)
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
    names = sorted({"gpt-2", *reference.GGUF_PRE_TOKENIZER_SPLITS} & set(PRE_TOKENIZERS))
    paths = {pre: write(folder / pre, byte_level_metadata(pre=pre)) for pre in names}
    return {pre: (build(path), convert(path)) for pre, path in paths.items()}


@some_texts
@given(text=texts)
def test_splits_as_transformers_does(text: str, both_splits: dict[str, tuple[tokenizers.Tokenizer, ...]]) -> None:
    assert len(both_splits) > 12
    for pre, (ours, expected) in both_splits.items():
        assert splits(ours, text) == splits(expected, text), pre


def test_splits_that_transformers_does_not_know(tmp_path: Path) -> None:
    for pre, text, expected in (
        ("smollm", "In  2024 x", ["In", "  ", "2", "0", "2", "4", " x"]),
        ("deepseek-v3", "x = 12345;日本", ["x", " =", " ", "123", "45", ";", "日本"]),
    ):
        assert splits(build(write(tmp_path, byte_level_metadata(pre=pre))), text) == expected


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


def test_sentencepiece_without_space_prefix(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_model(write(tmp_path, sentencepiece_metadata(add_space_prefix=False)))
    for text in TEXTS:
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(map(tokenizer.token_bytes, token_ids)) == text.encode()
        assert tokenizer.decode(token_ids) == text


def small_sentencepiece(pieces: list[str], scores: list[float]) -> dict[str, Any]:
    more = {"scores": [0.0, 0.0, *scores], "add_space_prefix": False, "add_bos_token": False}
    return _metadata("llama", ["<s>", "</s>", *pieces], [CONTROL] * 2 + [NORMAL] * len(pieces), more)


def test_merges_of_the_file_come_before_scores(tmp_path: Path) -> None:
    metadata = small_sentencepiece(["a", "b", "c", "ab", "bc"], [-9.0, -9.0, -9.0, -1.0, -2.0])
    assert Tokenizer.from_model(write(tmp_path, metadata)).encode("abc") == [5, 4]
    metadata["tokenizer.ggml.merges"] = ["b c", "a b"]
    assert Tokenizer.from_model(write(tmp_path, metadata)).encode("abc") == [2, 6]


def test_plain_text_never_merges_into_a_special_token(tmp_path: Path) -> None:
    metadata = small_sentencepiece(["<", "s", ">", "s>", "<s"], [0.0] * 5)
    tokenizer = Tokenizer.from_model(write(tmp_path, metadata))
    assert tokenizer.encode("<s>") == [0]
    assert tokenizer.special_ids.isdisjoint(tokenizer.encode("<s>", parse_special=False))


# Both.


BOS = [
    (byte_level_metadata, {}, False),
    (byte_level_metadata, {"add_bos_token": True}, True),
    (byte_level_metadata, {"pre": "llama-bpe"}, True),
    (byte_level_metadata, {"pre": "llama-bpe", "add_bos_token": False}, False),
    (sentencepiece_metadata, {}, True),
    (sentencepiece_metadata, {"add_bos_token": False}, False),
    (sentencepiece_metadata, {"bos_token_id": ...}, False),
    (gemma_4_metadata, {}, False),
]


@pytest.mark.parametrize(("make", "changes", "add_bos"), BOS)
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
    bos, eos = (tokenizer.bos_token, tokenizer.bos_token_id), (tokenizer.eos_token, tokenizer.eos_token_id)
    size = tokenizer.vocab_size
    assert (bos, eos) == (("<s>", size - 3), ("</s>", size - 2))
    assert (tokenizer.special_tokens, tokenizer.special_ids) == (("<s>", "</s>"), frozenset((size - 3, size - 2)))
    assert tokenizer.encode("<think>", parse_special=False) == [size - 1]
    tokenizer = Tokenizer.from_model(write(tmp_path, sentencepiece_metadata(add_eos_token=True)))
    assert tokenizer.encode("")[-1] == tokenizer.eos_token_id


REFUSED = [
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
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path, byte_level_metadata(**changes))
    with pytest.raises(ValueError, match=rf"tokenizer\.gguf: {message}"):
        Tokenizer.from_model(path)


# Merges that the file does not have.


def test_a_token_that_has_too_many_cuts() -> None:
    with pytest.raises(ValueError, match="a token of 257 characters without merges"):
        rebuild_merges(["a", "a" * 256, "b" * 257], [NORMAL] * 3, [0.0] * 3)


# Vocabularies of real models in GGUF files: token ids are those of llama.cpp.

REAL = sorted(path.stem for path in FOLDER.glob("*.json"))


@pytest.mark.parametrize("name", REAL)
def test_token_ids_are_those_of_llama_cpp(name: str) -> None:
    metadata, cases = load(name)
    tokenizer = tokenizer_of(metadata, name)
    assert len(cases) >= 46
    encoded = [(text, tokenizer.encode(text, add_special_tokens=False).ids) for text, _ in cases]
    assert encoded == cases
    assert [tokenizer.decode(token_ids) for _, token_ids in cases] == [text for text, _ in cases]


# Prompts with fill-in-the-middle tokens, against prompts written by hand as the models' papers and cards have them.


def with_tokens(folder: Path, *tokens: str) -> Tokenizer:
    """Return the tokenizer of bytes with further special tokens, from id VOCAB_SIZE on."""
    return Tokenizer.from_model(write_tiny_model(folder, *tokens))


@pytest.mark.parametrize("markers", MARKERS)
def test_tokens_are_found_by_name(tmp_path: Path, markers: tuple[str, str, str, bool]) -> None:
    *names, is_suffix_first = markers
    fim = with_tokens(tmp_path, *names).fim
    assert fim is not None
    assert is_suffix_first == (names[0] == "<[fim-prefix]>")  # of Seed-Coder
    prefix, suffix, middle = range(VOCAB_SIZE, VOCAB_SIZE + 3)
    first = [suffix, *b"cd", prefix, *b"ab"] if is_suffix_first else [prefix, *b"ab", suffix, *b"cd"]
    assert fim.join([*b"ab"], [*b"cd"]) == [*first, middle]


def test_models_without_all_three_tokens(tmp_path: Path, smollm2_path: Path) -> None:
    assert with_tokens(tmp_path, "<fim_prefix>", "<fim_suffix>", "<|fim_middle|>").fim is None
    assert Tokenizer.from_model(smollm2_path).fim is None


@pytest.mark.parametrize("keys", [("fim_pre", "fim_suf", "fim_mid"), ("prefix", "suffix", "middle")])
def test_keys_of_gguf_files(keys: tuple[str, ...], tmp_path: Path) -> None:
    named = {f"{name}_token_id": number for name, number in zip(keys, (11, 12, 13), strict=True)}
    tokenizer = Tokenizer.from_model(write(tmp_path, byte_level_metadata(**named)))
    assert tokenizer.fim == FIMTokens(11, 12, 13, is_suffix_first=False)
    prompt = tokenizer.fim.join(
        tokenizer.encode_plain("def add("), tokenizer.encode_plain(" the", is_continuation=True)
    )
    assert prompt == [11, *tokenizer.encode("def add("), 12, *tokenizer.encode(" the"), 13]


def test_code_llama(tmp_path: Path) -> None:
    """As Meta's code: the prefix begins with a space, as every text, but the suffix does not."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *map(chr, range(33, 127)), "▁a", "▁ab"]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(["<unk>", "<s>", "</s>", *pieces]))}
    merges: Any = [("▁", "a"), ("▁a", "b")]
    CodeLlamaTokenizer(vocab=vocab, merges=merges).save_pretrained(tmp_path)
    tokenizer = Tokenizer.from_model(tmp_path)
    assert tokenizer.fim is not None
    ids = tokenizer.fim.join(tokenizer.encode_plain("ab("), tokenizer.encode_plain("ab\n", is_continuation=True))
    expected = ["▁<PRE>", "▁ab", "(", "▁<SUF>", "a", "b", "<0x0A>", "▁<MID>"]
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert [backend.id_to_token(token_id) for token_id in ids] == expected
