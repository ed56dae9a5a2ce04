"""Tokenizers of other files than tokenizer.json, against the libraries that write them."""

import base64
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
from llguidance import LLTokenizer

from engine.grammar.compiler import GrammarCompiler
from engine.parts.tokenizers.files import read_tekken, read_tiktoken
from server.parts.tokenizers.build import TIKTOKEN_PATTERNS
from server.text.gguf_tokenizer import LLAMA3, PRE_TOKENIZERS, byte_alphabet
from server.text.tokenizer import Tokenizer
from tests.server.text.test_tokenizer import without_merges
from tests.support.examples import num_examples
from tests.support.random_texts import LINES, random_texts
from tests.support.trained_tokenizers import byte_level_bpe, sentencepiece_model, streamed_text
from tests.support.wheel_members import wheel_member

MISTRAL_COMMON, DATA = "mistral-common==1.13.1", "mistral_common/data"
SYMBOLS = ["<sep>", "<a>", "<sep>x", "ab", "\u2581\u2581"]
PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": PLAIN | {"byte_fallback": True},
    "unknown characters": PLAIN | {"byte_fallback": False},
    "symbols": PLAIN | {"byte_fallback": True, "user_defined_symbols": SYMBOLS},
    "gemma": PLAIN | {"byte_fallback": True, "user_defined_symbols": SYMBOLS, "add_dummy_prefix": False},
    "one space": {"normalization_rule_name": "identity", "byte_fallback": True, "user_defined_symbols": SYMBOLS[:4]},
    "nfkc": {"byte_fallback": True},
}


def train(algorithm: str, options: dict[str, Any]) -> bytes:
    """Train a model of 700 pieces on the lines that the random texts are made of."""
    return sentencepiece_model(LINES * 3, vocab_size=700, model_type=algorithm, **options)


def write(folder: Path, model: bytes, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer_config.json").write_text(json.dumps(config or {}))
    return folder


def assert_same(tokenizer: Tokenizer, reference: Any, text: str, *, has_ties: bool = False) -> None:
    """Compare ids, decoded text and streamed text. The library decodes an unknown character as a symbol of its own."""
    token_ids, expected = tokenizer.encode(text, add_special_tokens=False, parse_special=False), reference.encode(text)
    # In a unigram model, rounding decides between segmentations into the same pieces in another order, and unknown
    # characters beside a special token's text are not joined to one token.
    unknown = reference.unk_id()
    is_tie = has_ties and sorted(join_runs(token_ids, unknown)) == sorted(join_runs(expected, unknown))
    assert token_ids == expected or is_tie, repr(text)
    if reference.unk_id() not in token_ids:
        assert tokenizer.decode(token_ids) == reference.decode(token_ids), repr(text)
        streamed = streamed_text(tokenizer, token_ids)
        prefix = " " if tokenizer.encode("x", add_special_tokens=False) != reference.encode("x") else ""
        assert prefix + streamed in (reference.decode(token_ids), " " + reference.decode(token_ids)), repr(text)


def join_runs(token_ids: list[int], joined: int) -> list[int]:
    """Return the ids with each run of `joined` replaced by one."""
    return [id for index, id in enumerate(token_ids) if id != joined or token_ids[index - 1 : index] != [joined]]


@pytest.mark.drawn
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_trained_models(algorithm: str, variant: str, tmp_path: Path, rng: random.Random) -> None:
    model = train(algorithm, VARIANTS[variant])
    tokenizer = Tokenizer.from_model(write(tmp_path, model))
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert tokenizer.vocab_size == reference.get_piece_size()
    symbols = [symbol for symbol in SYMBOLS if symbol in VARIANTS[variant].get("user_defined_symbols", ())]
    for text in random_texts(rng, num_examples(150, 10_000)):
        if variant == "nfkc" and not has_simple_graphemes(text):
            continue
        if variant in ("one space", "nfkc") and text.lstrip(" ").startswith("\u2581"):
            continue  # sentencepiece decodes it without the space that this character stands for
        for symbol in rng.sample(symbols, min(len(symbols), rng.randrange(3))):
            at = rng.randrange(len(text) + 1)
            text = text[:at] + symbol + text[at:]  # noqa: PLW2901
        if not {text.strip(" "), text.replace(" ", "\u2581")}.intersection(SYMBOLS):  # such a text gets no prefix
            assert_same(tokenizer, reference, text, has_ties=algorithm == "unigram")


def has_simple_graphemes(text: str) -> bool:
    """Return whether all characters are of the ranges in which the library's and sentencepiece's rules agree.

    The tokenizers library normalises a short grapheme as a whole; sentencepiece does not know graphemes.
    """
    return all(ord(character) < 0x250 or 0x4E00 <= ord(character) < 0xA000 for character in text)


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def model(request: pytest.FixtureRequest) -> bytes:
    return train(request.param, VARIANTS["symbols"] | {"control_symbols": ["<call>"]})


def test_special_tokens(model: bytes, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_model(write(tmp_path, model))
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    named = (tokenizer.bos_token, tokenizer.bos_token_id, tokenizer.eos_token, tokenizer.eos_token_id)
    assert named == ("<s>", reference.bos_id(), "</s>", reference.eos_id())
    assert set(tokenizer.special_tokens) == {"<unk>", "<s>", "</s>", "<call>"}
    assert tokenizer.encode("Alice") == [reference.bos_id(), *reference.encode("Alice")]
    call = reference.piece_to_id("<call>")
    alice, was = reference.encode("Alice"), reference.encode("was")
    assert tokenizer.encode("Alice<call>was") == [tokenizer.bos_token_id, *alice, call, *was]
    for text in ("<s>", "<call>", "x</s>", "<unk>", "<0x41>"):
        token_ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
        assert tokenizer.special_ids.isdisjoint(token_ids)
        assert tokenizer.decode(token_ids) == text


def test_flags(model: bytes, tmp_path: Path) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    alice, without_prefix = reference.encode("Alice"), reference.encode("<a>Alice")[2:]
    flags = {"add_bos_token": False, "add_eos_token": True}
    assert Tokenizer.from_model(write(tmp_path, model, flags)).encode("Alice") == [*alice, reference.eos_id()]
    tokenizer = Tokenizer.from_model(write(tmp_path, model, {"legacy": False}))
    assert tokenizer.encode("Alice</s>Alice")[1:] == [*alice, reference.eos_id(), *without_prefix]
    tokenizer = Tokenizer.from_model(write(tmp_path, model, {"add_prefix_space": False}))
    assert tokenizer.encode("Alice")[1:] == without_prefix
    assert tokenizer.decode(without_prefix) == "Alice"


def test_added_tokens(model: bytes, tmp_path: Path) -> None:
    """Tokens beyond those of the file have the ids that the configuration gives them, with or without gaps."""
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    size = reference.get_piece_size()
    added: dict[int, Any] = {0: {"content": "<unk>", "special": True}, reference.piece_to_id("<a>"): {"content": "<a>"}}
    added[size] = {"content": "<|user|>", "special": True, "rstrip": True}
    added[size + 3] = {"content": "<think>", "special": False, "normalized": True}
    config = {"added_tokens_decoder": added, "eos_token": {"content": "<|user|>"}, "pad_token": "<|user|>"}
    tokenizer = Tokenizer.from_model(write(tmp_path, model, config))
    assert (tokenizer.vocab_size, tokenizer.eos_token_id) == (size + 4, size)
    assert "<think>" not in tokenizer.special_tokens
    alice = reference.encode("Alice")
    assert tokenizer.encode("Alice<|user|>  Alice<think>")[1:] == [*alice, size, *alice, size + 3]
    assert tokenizer.encode("<think>", parse_special=False)[1:] == [size + 3]
    assert tokenizer.token_bytes(size + 3) == b"<think>"
    assert tokenizer.encode("Alice<a> x")[1:] == reference.encode("Alice<a> x")
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|user|>": size}))
    tokenizer = Tokenizer.from_model(tmp_path)
    assert tokenizer.encode("Alice<|user|>Alice")[1:] == [*alice, size, *alice]


@pytest.mark.parametrize("variant", ["llama", "symbols", "gemma"])
@pytest.mark.parametrize("config", [{}, {"legacy": False}])
@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_grammars_know_the_tokens(algorithm: str, config: dict[str, Any], variant: str, tmp_path: Path) -> None:
    """Forced text is encoded without the space that is put before a text, and each token has the same bytes."""
    tokenizer = Tokenizer.from_model(write(tmp_path, train(algorithm, VARIANTS[variant]), config))
    compiler = GrammarCompiler(tokenizer.to_json(), [2])
    forced = compiler.compile('start: "Alice was  absent"').compute_ff_tokens()
    assert b"".join(map(tokenizer.token_bytes, forced)).startswith(b"Alice was  a")
    reference = LLTokenizer(tokenizer.to_json())
    for token_id in set(range(tokenizer.vocab_size)) - tokenizer.special_ids:
        if (data := tokenizer.token_bytes(token_id)) != b"\xff":  # llguidance's mark of special tokens
            assert reference.decode_bytes([token_id]) == data


def test_refused(model: bytes, tmp_path: Path) -> None:
    """At each character, the library would read on for as long as the long piece matches: 27 s for 25 kB of text."""
    suffix = train("bpe", {"treat_whitespace_as_suffix": True})
    damaged = [(each, "") for each in (b"", b"\0", model[:100], b"x" * 100, model[:-20])]
    long = train("unigram", VARIANTS["llama"]) + protobuf_bytes(1, protobuf_bytes(1, b"a" * 600))
    for data, message in [
        *damaged,
        (train("char", {}), "the algorithm char is not supported"),
        (suffix, "treat_whitespace_as_suffix=true is not supported"),
        (long, r"a token of 600 characters is not supported \(at most 512\)"),
    ]:
        with pytest.raises(ValueError, match=rf"tokenizer\.model: {message}"):
            Tokenizer.from_model(write(tmp_path, data))
    (tmp_path / "added_tokens.json").write_text('{"<x>": 1000000}')
    with pytest.raises(ValueError, match="token 1000000 is far"):
        Tokenizer.from_model(write(tmp_path, model))


def protobuf_bytes(number: int, value: bytes) -> bytes:
    """Encode a field of bytes of less than 16 KiB."""
    length = bytes([len(value) & 0x7F | 0x80, len(value) >> 7])
    return bytes([number << 3 | 2]) + length + value


# Ranks of tiktoken, and tekken.json.


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


def check_same(
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
    check_same(Tokenizer.from_model(write), ranks, pattern, texts, 30 if is_tekken else 0)


MISTRAL_MODELS = ("240216.model.v2", "240323.model.v3", "241114.model.v7")
REAL = [
    *((MISTRAL_COMMON, f"{DATA}/mistral_instruct_tokenizer_{each}", "tokenizer.model") for each in MISTRAL_MODELS),
    ("llama-models==0.3.0", "llama_models/llama3/tokenizer.model", "tokenizer.model"),
    *((MISTRAL_COMMON, f"{DATA}/tekken_{version}.json", "tekken.json") for version in ("240718", "240911")),
]


@pytest.mark.drawn
@pytest.mark.long
@pytest.mark.parametrize(("requirement", "member", "name"), REAL)
def test_real_files(requirement: str, member: str, name: str, tmp_path: Path, rng: random.Random) -> None:
    """For tekken.json, the reference is what mistral-common makes of the file."""
    file = wheel_member(requirement, member)
    (tmp_path / name).symlink_to(file)
    tokenizer, texts = Tokenizer.from_model(tmp_path), random_texts(rng, 5000)
    if requirement == MISTRAL_COMMON and name == "tokenizer.model":
        reference = sentencepiece.SentencePieceProcessor(model_file=str(file))
        for text in texts:
            assert_same(tokenizer, reference, text)
    elif name == "tekken.json":
        tekken = read_tekken(tmp_path / name)
        check_same(tokenizer, tekken.ranks, tekken.pattern, texts, 1000)
    else:
        check_same(tokenizer, read_tiktoken(tmp_path / name), TIKTOKEN_PATTERNS[name], texts)


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
    check_same(Tokenizer.from_model(folder), ranks, LLAMA3, random_texts(rng, 100))


@pytest.mark.parametrize("pattern", [r"\p{N}{1,3}+|.", r"\s++$|.", r"^a|."])
def test_patterns_that_mean_something_else_are_refused(pattern: str, ranks: dict[bytes, int], tmp_path: Path) -> None:
    folder = write_tiktoken(tmp_path / "other.tiktoken", ranks, {"pat_str": pattern})
    with pytest.raises(ValueError, match=r"the pattern .* is not supported, because of"):
        Tokenizer.from_model(folder)


# Which file is read, and what completes it.

RANKS = b"".join(b"%s %d\n" % (base64.b64encode(bytes([byte])), byte) for byte in range(256))


def test_tokenizer_json_comes_first(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(RANKS)
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"bos_token": "<nope>", "add_eos_token": true}')
    tokenizer = Tokenizer.from_model(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.encode("a")) == (256, [ord("a")])
    without_merges(**{"a": 0, "<s>": 1}).save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_model(tmp_path).vocab_size == 2


def test_the_config_completes_other_files(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(RANKS)
    names = {"eos_token": {"content": "<e>"}, "bos_token": "<e>", "pad_token": None}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    added = {"256": {"content": "<e>", "special": True}, "257": {"content": "<b>"}}
    config = {"added_tokens_decoder": added, "chat_template": "{{ messages }}", "bos_token": {"content": "<b>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_model(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.vocab_size) == ("<b>", "<e>", 258)
    assert tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.encode("a<e>") == [257, ord("a"), 256]
