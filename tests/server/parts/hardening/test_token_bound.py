"""The lower bound of a text's number of tokens: never more than there are, and close to it for ordinary texts."""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from server.text.gguf_tokenizer import split_into_bytes
from server.text.tokenizer import Tokenizer, TokenizerConfig
from tests.server.generation.test_prompts import LONG, LONG_MESSAGES
from tests.server.parts.tokenizers.test_other_files import VARIANTS, train, write
from tests.server.text.test_tokenizer import byte_level, sentencepiece
from tests.support.clients import CHAT, COMPLETIONS, ask
from tests.support.examples import num_examples
from tests.support.paths import ROOT
from tests.support.pruned_vocabulary import FOLDER, load, tokenizer_of
from tests.support.random_texts import random_texts
from tests.support.serving import RunningServer, check_error

ENGLISH = (ROOT / "tests/bench/english.txt").read_text(encoding="utf-8")
CODE = (ROOT / "server/text/tokenizer.py").read_text(encoding="utf-8")
UNITS = [*"a \né的\u3000\u2581ﬁ\0\u0338각", "  \n", "ab ", "e\u0301", "ẹ\u0307", "=\n", "👍🏽", "the ", "<é>", "<s>"]
UNITS += ["<s \u2581s>", " <think> ", "<0x0A>", "\u1100\u1161\u11a8"]
REAL = sorted(path.stem for path in FOLDER.glob("*.json"))
FEW = ("gemma-4", "llama-bpe", "phi-3")  # of those, for `make test`

# Repeated units, which few long tokens may cover, between other characters.
runs = st.lists(st.tuples(st.sampled_from(UNITS), st.integers(1, 40)).map(lambda run: run[0] * run[1]), max_size=5)
texts = st.tuples(runs, st.text(max_size=10), runs).map(lambda parts: "".join([*parts[0], parts[1], *parts[2]]))


def tokenizer_from(backend: tokenizers.Tokenizer) -> Tokenizer:
    vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    return Tokenizer(backend, TokenizerConfig(None, None, None, vocab_size))


def min_tokens(tokenizer: Tokenizer, text: str) -> int:
    return tokenizer.min_tokens(text, enough=len(text.encode()))


def check(tokenizer: Tokenizer, text: str) -> None:
    for parse_special in (True, False):
        token_ids = tokenizer.encode(text, add_special_tokens=False, parse_special=parse_special)
        assert min_tokens(tokenizer, text) <= len(token_ids), text


def check_all(tokenizer: Tokenizer) -> None:
    """Check texts of all kinds, and that the bound is not just 0."""

    @settings(max_examples=num_examples(40, 2000), deadline=None)
    @given(texts)
    def check_any(text: str) -> None:
        check(tokenizer, text)

    check_any()
    drawn = random_texts(random.Random(1), num_examples(200, 5000))
    for text in [*drawn, ENGLISH, CODE, *(unit * 999 for unit in UNITS)]:
        check(tokenizer, text)
    assert min_tokens(tokenizer, "a b " * 1000) > 0


def is_close(tokenizer: Tokenizer, text: str, factor: float) -> bool:
    return factor * min_tokens(tokenizer, text) > len(tokenizer.encode(text, add_special_tokens=False))


def test_smollm2(smollm2_path: Path) -> None:
    tokenizer = check_model(smollm2_path)
    assert is_close(tokenizer, "中文文本" * 100, 1.1)
    assert is_close(tokenizer, "a" * 1000, 7)
    # A long text is only read until it is certainly too long.
    assert tokenizer.min_tokens("a b " * 1_000_000, enough=1000) < 100_000
    assert min_tokens(tokenizer, "a b " * 1_000_000) >= 2_000_000


def test_gemma_3(gemma3_path: Path) -> None:
    check_model(gemma3_path)


def check_model(path: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_model(path)
    check_all(tokenizer)
    assert is_close(tokenizer, ENGLISH, 1.1)
    assert is_close(tokenizer, CODE, 1.4)
    return tokenizer


@pytest.mark.parametrize("name", [each if each in FEW else pytest.param(each, marks=pytest.mark.long) for each in REAL])
def test_vocabularies_of_real_models(name: str) -> None:
    metadata, cases = load(name)
    tokenizer = tokenizer_from(tokenizer_of(metadata, name))
    for text, _ in cases:
        check(tokenizer, text * 50)
    check_all(tokenizer)


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
@pytest.mark.parametrize("variant", ["llama", "symbols", "gemma"])
def test_sentencepiece(algorithm: str, variant: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_model(write(tmp_path, train(algorithm, VARIANTS[variant])))
    check_all(tokenizer)
    assert is_close(tokenizer, ENGLISH, 3)


def with_normalizer(normalizer: normalizers.Normalizer) -> tokenizers.Tokenizer:
    backend = byte_level()
    backend.normalizer = normalizer
    return backend


def with_added(backend: tokenizers.Tokenizer, *tokens: str, **flags: bool) -> tokenizers.Tokenizer:
    flags = {"normalized": False} | flags
    backend.add_special_tokens([AddedToken(token, special=True, **flags) for token in tokens])
    return backend


def without_some_bytes() -> tokenizers.Tokenizer:
    """Return a tokenizer that drops some characters, and has a token with a space inside."""
    tokens = [*"abcdefgh\u0120\u010a", "\u0120a", "ab", "b\u0120a", "\u0120\u0120"]
    merges = [("\u0120", "a"), ("a", "b"), ("b", "\u0120a"), ("\u0120", "\u0120")]
    backend = tokenizers.Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    split_into_bytes(backend, [r"\n"])
    return backend


KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte-level": byte_level,
    "sentencepiece": sentencepiece,
    **{form: partial(with_normalizer, getattr(normalizers, form)()) for form in ("NFC", "NFD", "NFKC", "NFKD")},
    "strips to the left": lambda: with_added(byte_level(), "<s>", lstrip=True, normalized=True),
    "strips to the right": lambda: with_added(byte_level(), "<s>", rstrip=True),
    "drops bytes": without_some_bytes,
    "added tokens": lambda: with_added(byte_level(), "<é>"),
    "added tokens with a space": lambda: with_added(sentencepiece(), "<é>", "<s \u2581s>"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_folders(kind: str) -> None:
    check_all(tokenizer_from(KINDS[kind]()))


def test_what_is_dropped_or_joined_does_not_count() -> None:
    tokenizer = tokenizer_from(without_some_bytes())
    assert min_tokens(tokenizer, "\U0001f600" * 1000) == 0
    swallowing, swallowed = tokenizer_from(KINDS["strips to the right"]()), "<s>" + " " * 1000
    assert len(swallowing.encode(swallowed, add_special_tokens=False)) == min_tokens(swallowing, swallowed) == 1
    composing = tokenizer_from(KINDS["NFC"]())
    assert min_tokens(composing, "e\u0301" * 1000) == 0
    assert min_tokens(composing, "é" * 1000) > 100


DROPPING = [
    (normalizers.Strip(), None),
    (normalizers.Lowercase(), None),
    (normalizers.Replace(Regex(" +"), "\u2581"), None),
    (normalizers.Replace(" ", ""), None),
    (None, pre_tokenizers.WhitespaceSplit()),
    (None, pre_tokenizers.Split(" ", "removed")),
    (None, pre_tokenizers.Metaspace("_")),
]


@pytest.mark.parametrize(("normalizer", "pre_tokenizer"), DROPPING)
def test_tokenizers_that_may_drop_text_have_no_bound(normalizer: Any, pre_tokenizer: Any) -> None:
    for backend in (byte_level(), sentencepiece()):
        if normalizer is not None:
            backend.normalizer = normalizer
        else:
            kept = [] if backend.pre_tokenizer is None else [backend.pre_tokenizer]
            backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizer, *kept])
        assert min_tokens(tokenizer_from(backend), "a b " * 1000) == 0


def test_without_tokens_for_unknown_characters_there_is_no_bound(tmp_path: Path) -> None:
    """Any number of unknown characters become one token."""
    tokenizer = Tokenizer.from_model(write(tmp_path, train("bpe", VARIANTS["unknown characters"])))
    assert len(tokenizer.encode("\U0001f9ff" * 1000, add_special_tokens=False)) < 4
    assert min_tokens(tokenizer, "\U0001f9ff" * 1000) == 0
    backend = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    backend.decoder = decoders.Metaspace()
    assert min_tokens(tokenizer_from(backend), "a b " * 1000) == 0


def test_a_text_that_is_certainly_too_long_is_not_tokenized(server: RunningServer) -> None:
    rows: list[tuple[str, str, Any]] = [
        *((COMPLETIONS, "prompt", prompt) for prompt in (LONG, ["Hi", LONG])),
        *((CHAT, "messages", LONG_MESSAGES + more) for more in ([], [{"role": "user", "content": "<|im_end|>"}])),
    ]
    for path, noun, value in rows:
        error = check_error(ask(server.url, path, **{noun: value}), 400)
        assert (error["code"], error["param"]) == ("context_length_exceeded", noun)
        assert f"your {noun} resulted in at least " in error["message"]  # tokenizing would give the exact number
