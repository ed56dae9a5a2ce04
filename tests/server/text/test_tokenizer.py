"""The tokenizer against transformers, on the real model and on folders that the tests write; sequences of tokens."""

import json
import random
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from engine.shared.messages import SequenceBreaker
from server.text.gguf_tokenizer import byte_alphabet
from server.text.token_sequences import SequenceBreakers, word_sequences
from server.text.tokenizer import Tokenizer
from tests.support.examples import num_examples
from tests.support.random_texts import random_texts
from tests.support.trained_tokenizers import byte_level_bpe

TEXTS = [
    "",
    " ",
    "Hello, world! It's a fine day, isn't it? We'LL see.",
    "The quick brown fox\njumps over\r\nthe lazy dog.\n\n\n",
    "def add(first, second):\n\treturn first + second  # the sum\n\n\nprint(add(1, 2))\n",
    "for (int i = 0; i < 100; ++i) { a[i] *= 3.14e-5; }",
    "1234567890 0.5 1,000,000 x2 v1.2.3 ½ x² Ⅷ ３４ ٣",
    "   leading,   inner and trailing spaces   ",
    "\t\ttabs \u00a0 no-break \u2003 em \u200b zero width \ufeff",
    "日本語のテキストと漢字。中文：你好，世界！ 한국어 텍스트입니다.",
    "Größe, naïve café, Ελληνικά, русский язык, עברית, العربية, हिन्दी, ไทย",
    "😀 👍🏽 👩‍👩‍👧‍👦 🇩🇪 e\u0301 \U0001f9ff",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start |> <|im_end <|endoftext|><|endoftext|>x",
    "a" * 500 + "!" * 100 + "\n" * 50 + " " * 77,
]
texts = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("  \n\tabcETHhe123'.,_-/é日")), max_size=40)


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return Tokenizer.from_model(smollm2_path)


@pytest.fixture(scope="module")
def transformers_smollm2(smollm2_path: Path) -> Any:
    """Return transformers' tokenizer of the file, with the pre-tokenizer of the model's own tokenizer.json.

    transformers does not support the pre-tokenizer `smollm` and splits as GPT-2 does, which differs before digits.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    return tokenizer


# The real model.


def test_smollm2(smollm2: Tokenizer, transformers_smollm2: Any) -> None:
    for text in TEXTS:
        token_ids = smollm2.encode(text)
        assert token_ids == transformers_smollm2.encode(text), text
        for skip in (True, False):
            expected = transformers_smollm2.decode(token_ids, skip_special_tokens=skip)
            assert smollm2.decode(token_ids, skip_special_tokens=skip) == expected


@settings(max_examples=num_examples(26, 400), deadline=None)
@given(text=texts)
def test_smollm2_with_any_text(text: str, smollm2: Tokenizer, transformers_smollm2: Any) -> None:
    assert smollm2.encode(text) == transformers_smollm2.encode(text)


@pytest.mark.drawn
@pytest.mark.long
def test_gemma_3(gemma3_path: Path, rng: random.Random) -> None:
    """A vocabulary of 262,144 tokens without merges. transformers takes a minute to convert it."""
    tokenizer = Tokenizer.from_model(gemma3_path)
    expected = AutoTokenizer.from_pretrained(gemma3_path.parent, gguf_file=gemma3_path.name)
    for text in [*TEXTS, "<start_of_turn>user\nHi<end_of_turn>\n", *random_texts(rng, 5000)]:
        token_ids = tokenizer.encode(text)
        assert token_ids == expected.encode(text), repr(text)
        assert tokenizer.decode(token_ids) == expected.decode(token_ids, skip_special_tokens=True)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.add_bos) == ("<bos>", "<eos>", True)
    assert tokenizer.special_ids >= set(tokenizer.encode("<start_of_turn><end_of_turn>"))


def test_bytes_of_every_token(smollm2: Tokenizer, transformers_smollm2: Any) -> None:
    spelling: Any = bytes_to_unicode
    alphabet = {character: byte for byte, character in spelling().items()}
    assert byte_alphabet() == alphabet
    for token_id, token in enumerate(transformers_smollm2.convert_ids_to_tokens(range(smollm2.vocab_size))):
        is_special = token_id in smollm2.special_ids
        expected = token.encode() if is_special else bytes(alphabet[character] for character in token)
        assert smollm2.token_bytes(token_id) == expected
    assert smollm2.token_bytes(smollm2.vocab_size) == smollm2.token_bytes(-1) == smollm2.token_bytes(2**40) == b""


def test_smollm2_attributes(smollm2: Tokenizer, transformers_smollm2: Any) -> None:
    assert smollm2.vocab_size == len(transformers_smollm2) == 49152
    named = (smollm2.bos_token, smollm2.bos_token_id, smollm2.eos_token, smollm2.eos_token_id, smollm2.add_bos)
    assert named == ("<|im_start|>", 1, "<|im_end|>", 2, False)
    assert smollm2.special_ids == set(range(17))
    assert smollm2.special_tokens[:3] == ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    assert smollm2.chat_template == transformers_smollm2.chat_template


def test_special_tokens_as_plain_text(smollm2: Tokenizer) -> None:
    for text in ("<|im_end|>", "a<|im_start|>user\n<|im_end|>b", "<|endoftext|>" * 3, "<|im_end", "x"):
        token_ids = smollm2.encode(text, parse_special=False)
        assert smollm2.special_ids.isdisjoint(token_ids)
        assert smollm2.decode(token_ids) == text
    assert smollm2.special_ids_in(["<|im_end|>", "<tool_call>", " the", "<|im_end"]) == {"<|im_end|>": 2}


@pytest.mark.checklist("F08")
def test_ids_outside_the_vocabulary_are_ignored_and_surrogates_refused(smollm2: Tokenizer) -> None:
    token_ids = smollm2.encode("Hello")
    assert smollm2.decode([-1, *token_ids, 49152, 2**40]) == "Hello"
    with pytest.raises(ValueError):
        smollm2.encode("\ud800")


def test_threads_do_not_disturb_each_other(smollm2: Tokenizer) -> None:
    def encode(index: int) -> list[int]:
        return smollm2.encode("a<|im_end|>b", parse_special=index % 2 == 0)

    assert encode(0) != encode(1)
    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(encode, range(400))] == [encode(0), encode(1)] * 200


# Folders.


SPECIAL = ("<s>", "</s>", "<pad>")


def byte_level() -> tokenizers.Tokenizer:
    tokenizer = byte_level_bpe(TEXTS[2:6], 400, SPECIAL)
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return tokenizer


def sentencepiece() -> tokenizers.Tokenizer:
    """Return a tokenizer in the form of Llama 2's tokenizer.json."""
    tokens = ["<unk>", *SPECIAL[:2], *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "H", "i", "Hi", "\u2581Hi"]
    vocab, merges = {token: index for index, token in enumerate(tokens)}, [("H", "i"), ("\u2581", "Hi")]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def without_merges(**vocab: int) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write(folder: Path, tokenizer: tokenizers.Tokenizer, config: dict[str, Any] | None = None) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {"tokenizer_class": "TokenizersBackend", "bos_token": "<s>", "eos_token": "</s>"} | (config or {})
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@pytest.mark.parametrize("flags", [{}, {"add_bos_token": True, "add_eos_token": True}, {"add_bos_token": False}])
def test_folder(make: Any, flags: dict[str, bool], tmp_path: Path) -> None:
    write(tmp_path, make(), flags)
    tokenizer, expected = Tokenizer.from_model(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, "<s>Hi</s>", "<think>Hi</think>"]:
        for add_special_tokens in (True, False):
            token_ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
            assert token_ids == expected.encode(text, add_special_tokens=add_special_tokens)
            assert tokenizer.decode(token_ids) == expected.decode(token_ids, skip_special_tokens=True)
    assert tokenizer.add_bos == (expected.encode("x")[0] == expected.bos_token_id)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (expected.bos_token_id, expected.eos_token_id)
    assert tokenizer.vocab_size == len(expected)
    if make is sentencepiece:
        found = [tokenizer.token_bytes(token_id) for token_id in (0, 1, 3, 258, 263)]
        assert found == [b"<unk>", b"<s>", b"\0", b"\xff", b" Hi"]


def test_vocabulary_with_a_gap(tmp_path: Path) -> None:
    backend = without_merges(a=0, b=7)
    tokenizer = Tokenizer.from_model(write(tmp_path, backend, {"bos_token": None, "eos_token": None}))
    assert tokenizer.vocab_size == 8
    assert [tokenizer.token_bytes(token_id) for token_id in (0, 3, 7, 8)] == [b"a", b"", b"b", b""]


def test_tokens_that_only_the_configuration_calls_special(tmp_path: Path) -> None:
    end = {"content": "<end>", "lstrip": False, "__type": "AddedToken"}
    config = {"bos_token": None, "eos_token": end, "additional_special_tokens": ["<tool>", "<unheard-of>"]}
    tokenizer = Tokenizer.from_model(write(tmp_path, without_merges(**{"a": 0, "<end>": 1, "<tool>": 2}), config))
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.bos_token) == ("<end>", 1, None)
    assert tokenizer.special_ids == {1, 2}
    assert tokenizer.encode("a<end><tool>") == [0, 1, 2]
    assert tokenizer.vocab_size == 3


def test_bos_that_is_no_token(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = Tokenizer.from_model(write(tmp_path, byte_level(), {"bos_token": "<nope>", "add_eos_token": True}))
    assert (tokenizer.bos_token, tokenizer.bos_token_id, tokenizer.add_bos) == (None, None, False)
    assert "<nope>" in caplog.text


def test_nothing_is_truncated_or_padded(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=10)
    tokenizer = Tokenizer.from_model(write(tmp_path, backend))
    for text in ("x", "The quick brown fox jumps"):
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


NAMED = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]


TEMPLATES = [
    ({}, {}, None),
    ({"chat_template": "C"}, {}, "C"),
    ({"chat_template": NAMED}, {}, "D"),
    ({"chat_template": NAMED[:1]}, {}, None),
    ({"chat_template": "C"}, {"chat_template.jinja": "é"}, "é"),
    ({}, {"chat_template.json": '{"chat_template": "J"}'}, "J"),
]


@pytest.mark.parametrize(("config", "files", "expected"), TEMPLATES)
def test_chat_template(config: dict[str, Any], files: dict[str, str], expected: str | None, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    assert Tokenizer.from_model(write(tmp_path, byte_level(), config)).chat_template == expected


REFUSED = [
    ({}, r"no tokenizer in this folder \(none of tokenizer\.json, tekken\.json, "),
    ({"tokenizer.json": "{}"}, r"tokenizer\.json: not a valid tokenizer"),
    ({"tokenizer_config.json": '{"chat_template": 7}'}, r"tokenizer_config\.json: chat_template"),
    ({"tokenizer_config.json": "[1]"}, r"tokenizer_config\.json: must hold a JSON object"),
    ({"tokenizer_config.json": "{"}, r"tokenizer_config\.json: not valid JSON"),
]


@pytest.mark.parametrize(("files", "message"), REFUSED)
def test_refused(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    if "tokenizer_config.json" in files:
        without_merges(a=0).save(str(tmp_path / "tokenizer.json"))
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_model(tmp_path)
    with pytest.raises(ValueError, match=r"none\.gguf: no such model"):
        Tokenizer.from_model(tmp_path / "none.gguf")


BAD_CONFIG = '{"additional_special_tokens": ["\\ud800"]}'


ERRORS = [
    ({"continuing_subword_prefix": "x" * 5000}, None, "", "not a valid tokenizer .range end index"),
    ({"unk_token": "<u>"}, None, "", "not a valid tokenizer .Unk token `<u>` not found"),
    ({}, "tokenizer_config.json", BAD_CONFIG, "not a valid tokenizer .*surrogates"),
    ({}, "chat_template.jinja", "\udcff", r"/chat_template\.jinja: not UTF-8"),
]


@pytest.mark.parametrize(("model", "file", "content", "message"), ERRORS)
def test_errors_of_the_library(model: Any, file: str | None, content: str, message: str, tmp_path: Path) -> None:
    """They name the model, whether it panics, fails at the first unknown character, or is given what is no text."""
    backend = json.loads(write(tmp_path, byte_level()).joinpath("tokenizer.json").read_text())
    backend["model"] |= {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]} | model
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend))
    if file is not None:
        (tmp_path / file).write_text(content, errors="surrogateescape")
    with pytest.raises(ValueError, match=rf"^{tmp_path}.*{message}"):
        Tokenizer.from_model(tmp_path)


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece(), decoders.BPEDecoder()])
def test_kinds_whose_bytes_are_not_known_are_refused(decoder: Any, tmp_path: Path) -> None:
    backend = byte_level()
    backend.decoder = decoder
    with pytest.raises(ValueError, match=r"decode with .* not supported"):
        Tokenizer.from_model(write(tmp_path, backend))


# The token sequences of words and of sequence breakers.


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Return a tokenizer with a byte-level vocabulary and merges trained on a few words."""
    texts = ["bad word, bad words: sword fights\n\n", "the end: over and out::\n", "a\nb\n\nc ### head ##\n"]
    folder = tmp_path_factory.mktemp("merged")
    byte_level_bpe(texts * 9, 330).save(str(folder / "tokenizer.json"))
    return Tokenizer.from_model(folder)


def test_a_word_is_encoded_at_the_start_and_after_a_space(merged: Tokenizer) -> None:
    for word in ("bad", " bad", "word", "bad word", "zebra"):
        found = [merged.decode(ids) for ids in word_sequences(merged, word)]
        assert found == [word.strip(), f" {word.strip()}"]
    assert [merged.decode(ids) for ids in word_sequences(merged, "  ")] == [" "]  # a space is a word, too
    assert word_sequences(merged, "bad")[0] == merged.encode("bad") != merged.encode(" bad")


def expanded(breakers: Iterable[SequenceBreaker]) -> set[tuple[int, ...]]:
    return {(first, *breaker.rest) for breaker in breakers for first in breaker.first_ids}


def searched(tokenizer: Tokenizer, vocabulary: Sequence[bytes], string: str) -> set[tuple[int, ...]]:
    """Return the sequences of a string by a pass over the vocabulary for each of its prefixes."""
    found: set[tuple[int, ...]] = set()
    for token_id, token in enumerate(vocabulary):
        if string.encode() in token:
            found.add((token_id,))
            continue
        for cut in range(1, len(string)):
            if token.endswith(string[:cut].encode()):
                rest = tokenizer.encode(string[cut:], add_special_tokens=False, parse_special=False)
                found.add((token_id, *rest))
    return found


def test_the_sequences_are_those_of_a_pass_over_the_vocabulary(merged: Tokenizer, rng: random.Random) -> None:
    """Also of characters of several bytes, which tokens have parts of."""
    breakers = SequenceBreakers(merged)
    vocabulary = [merged.token_bytes(token_id) for token_id in range(merged.vocab_size)]
    for _ in range(100):
        strings = ["".join(rng.choices("abdwor :\n#,é€😀Ā", k=rng.randrange(1, 9))) for _ in range(3)]
        found = breakers.find(strings)
        assert expanded(found) == set().union(*(searched(merged, vocabulary, string) for string in strings)), strings
        assert sum(len(breaker.first_ids) for breaker in found) == len(expanded(found)), strings
        assert all(sorted(breaker.first_ids) == list(breaker.first_ids) for breaker in found)
    assert breakers.find([]) == ()


def test_the_vocabulary_is_read_once_however_many_strings_there_are(merged: Tokenizer) -> None:
    """And what has been found is kept up to a size, the latest first."""
    tokenizer = Mock(wraps=merged, vocab_size=merged.vocab_size)
    breakers = SequenceBreakers(tokenizer)
    breakers._found.max_bytes = 4000
    for number in range(300):
        breakers.find([f"w{number}", "\n"])
    assert tokenizer.token_bytes.call_count == merged.vocab_size
    assert breakers._found.num_bytes <= 4000
    tokenizer.encode.reset_mock()
    breakers.find(["\n", "w299"])
    tokenizer.encode.assert_not_called()
    breakers.find(["w0"])
    tokenizer.encode.assert_called()
