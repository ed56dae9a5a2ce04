"""Reading tokenizer files, against the libraries that they are of."""

import base64
import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models

from engine.config.tokenizer_files import num_token_ids, tokenizer_file
from engine.parts.tokenizers.files import read_sentencepiece, read_tiktoken
from server.text.tokenizer import Tokenizer
from tests.support.trained_tokenizers import sentencepiece_model, tekken

LINES = ["the quick brown fox jumps over the lazy dog", "a b c d e f g h i j k l m n o p q r s t u v w x y z"]
RANKS = b"".join(b"%s %d\n" % (base64.b64encode(bytes([byte])), byte) for byte in range(256))


OPTIONS = {**dict.fromkeys(("add_dummy_prefix", "remove_extra_whitespaces"), False), "bos_id": -1}
OPTIONS |= {"treat_whitespace_as_suffix": True}
PIECE_TYPES = {"is_unknown": 2, "is_control": 3, "is_unused": 5, "is_byte": 6}


@pytest.mark.parametrize(("algorithm", "options"), [("bpe", OPTIONS), ("unigram", {}), ("char", {})])
def test_models_of_sentencepiece(algorithm: str, options: dict[str, Any], tmp_path: Path) -> None:
    path, symbols = tmp_path / "tokenizer.model", {"user_defined_symbols": ["<a>"], "control_symbols": ["<b>"]}
    path.write_bytes(
        sentencepiece_model(LINES * 20, model_type=algorithm, byte_fallback=bool(options), **symbols, **options)
    )
    model, reference = read_sentencepiece(path), sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert model.algorithm == algorithm
    assert len(model.pieces) == reference.get_piece_size()
    for index, piece in enumerate(model.pieces):
        assert (piece.text, piece.score) == (reference.id_to_piece(index), reference.get_score(index))
        kinds = [kind for name, kind in PIECE_TYPES.items() if getattr(reference, name)(index)]
        assert piece.type == (kinds[0] if kinds else 4 if piece.text == "<a>" else 1)
    named = (reference.unk_id(), reference.bos_id(), reference.eos_id())
    assert (model.unk_id, model.bos_id, model.eos_id) == named
    for name, value in OPTIONS.items():
        assert (getattr(model, name) == value) == bool(options)
    assert model.charsmap


def test_fields_that_protobuf_leaves_out_have_their_defaults(tmp_path: Path) -> None:
    """One piece without text, score and type of the right types, an unknown field of each wire type, no other piece."""
    piece = b"\x08\x01\x12\x01x\x1a\x01x\x0a\x02hi"
    unknown = b"\x98\x06\x96\x01" + b"\x99\x06" + bytes(8) + b"\x9d\x06" + bytes(4) + b"\x9a\x06\x01x"
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\x0a" + struct.pack("B", len(piece)) + piece + unknown)
    model = read_sentencepiece(path)
    assert model.pieces == [("hi", 0.0, 1)]
    assert (model.algorithm, model.bos_id, model.eos_id) == ("unigram", 1, 2)
    assert model.add_dummy_prefix
    assert model.escape_whitespaces


def test_random_bytes_are_refused(tmp_path: Path) -> None:
    rng, path, model = random.Random(0), tmp_path / "tokenizer.model", sentencepiece_model(LINES * 20, model_type="bpe")
    for _ in range(100):
        damaged = bytearray(model[: rng.randrange(400)])
        for _ in range(rng.randrange(1, 20)):
            damaged[rng.randrange(len(damaged)) : 0] = rng.randbytes(1)
        path.write_bytes(damaged if rng.random() < 0.8 else rng.randbytes(rng.randrange(50)))
        try:
            read_sentencepiece(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: neither a model of sentencepiece nor ranks of tiktoken")  # noqa: PT017


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it has no tokens"),
        (b"YQ== 0\nYQ==\n", "line 2: must be a token in base64 and its rank"),
        (b"YQ== 0\nYg== -1\n", "line 2"),
        (b"YQ== 1048576\n", "line 1: must be a token in base64 and its rank, below 1048576"),
        (b"YQ== 7\nYg== 7\n", "line 2: must be a token in base64 and its rank, below 1048576, which no other"),
        (b"YQ== 7\nYg== 8\nYQ== 9\n", "1 of 3 tokens occur more than once"),
    ],
)
def test_ranks_that_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.tiktoken").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.tiktoken: {message}"):
        read_tiktoken(tmp_path / "a.tiktoken")


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([b"\x0a\x01a", b"\x0a\x01b", b"\x0a\x01a"], "piece 2 occurs before: 'a'"),
        ([b"\x0a\x01a", b"\x0a\x00"], "piece 1 is empty"),
        ([b"\x0a\x01a\x18" + b"\xff" * 10 + b"\x01"], "an integer of more than 10 bytes at byte 4"),
        ([b"\x08\x01"], "piece 0 is empty"),
    ],
)
def test_models_that_sentencepiece_refuses_too(pieces: list[bytes], message: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    unknown = [b"\x0a\x03unk\x18\x02", b"\x0a\x01x"]

    def write(pieces: list[bytes]) -> None:
        path.write_bytes(b"".join(b"\x0a%c%b" % (len(piece), piece) for piece in pieces))

    write(unknown)
    sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert [piece.text for piece in read_sentencepiece(path).pieces] == ["unk", "x"]
    write([*pieces, *unknown])
    with pytest.raises((RuntimeError, OSError)):
        sentencepiece.SentencePieceProcessor(model_file=str(path))
    with pytest.raises(ValueError, match=message):
        read_sentencepiece(path)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"default_num_special_tokens": 10_001, "default_vocab_size": 20_000}, "Expected `int` <= 10000"),
        ({"default_vocab_size": 19}, "default_num_special_tokens: 20 of default_vocab_size 19"),
        ({"vocab": [{"rank": -1, "token_bytes": "YQ=="}]}, r"vocab\[0\]: its rank must be 0, not -1"),
        ({"vocab": [{"rank": n, "token_bytes": "YQ=="} for n in (0, 1)]}, "vocab: 1 of 2 tokens occur more than"),
        ({"special_tokens": [{"rank": n, "token_str": "<a>"} for n in (0, 5)]}, "special_tokens: 1 of 20 tokens occ"),
        ({"vocab": 1}, ""),
    ],
)
def test_fields_of_tekken_that_are_refused(parts: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tekken()
    (tmp_path / "tekken.json").write_text(json.dumps(file | parts | {"config": file["config"] | parts}))
    for read in (num_token_ids, Tokenizer.from_model):
        with pytest.raises(ValueError, match=rf"tekken\.json: not a tokenizer of mistral-common \({message}"):
            read(tmp_path)


def test_the_order_of_files(tmp_path: Path) -> None:
    assert tokenizer_file(tmp_path) is None
    assert num_token_ids(tmp_path) is None
    for name in ("b.tiktoken", "a.tiktoken", "tokenizer.model", "tekken.json", "tokenizer.json"):
        (tmp_path / name).touch()
        assert tokenizer_file(tmp_path) == tmp_path / name


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("tokenizer.model", sentencepiece_model(LINES * 20, model_type="bpe"), None),
        ("tokenizer.model", RANKS, 256),
        ("tekken.json", json.dumps(tekken()).encode(), 276),
    ],
)
def test_the_number_of_ids_is_that_of_the_tokenizer(
    name: str, content: bytes, expected: int | None, tmp_path: Path
) -> None:
    """The engine computes it without a tokenizer."""
    (tmp_path / name).write_bytes(content)
    for added in ({}, {"500": {"content": "<x>"}}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
        assert num_token_ids(tmp_path) == Tokenizer.from_model(tmp_path).vocab_size
        assert expected is None or added or num_token_ids(tmp_path) == expected
    assert num_token_ids(tmp_path) == (276 if name == "tekken.json" else 501)


def test_the_number_of_ids_of_a_tokenizer_json(tmp_path: Path) -> None:
    values: dict[str, Any] = {"model": {"vocab": {"a": 0, "b": 7}}, "added_tokens": [{"id": 9, "content": "<x>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    assert num_token_ids(tmp_path) == 10
    models: list[Any] = [{"vocab": {"a": -5}}, {"vocab": {"a": "5"}}, {"vocab": 5}, [], 5]
    for model in models:
        (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
        with pytest.raises(ValueError, match=r"tokenizer\.json: (not a tokenizer|its highest token id)"):
            num_token_ids(tmp_path)


def test_an_id_for_which_tables_have_no_room_is_refused(tmp_path: Path) -> None:
    token_id = 1 << 20
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    (tmp_path / "tokenizer.json").write_text(backend.to_str().replace('"b":1', f'"b":{token_id}'))
    for read in (num_token_ids, Tokenizer.from_model):
        with pytest.raises(ValueError, match=rf"its highest token id must be from 0 to 1048575, not {token_id}$"):
            read(tmp_path)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"x": {"content": "a"}}, "added_tokens_decoder: x: must"),
        ({"1": "a"}, "added_tokens_decoder: 1: must be a token id"),
        ({"²": {"content": "a"}}, "added_tokens_decoder: ²: must"),
        ({"1048576": {"content": "a"}}, "added_tokens_decoder: 1048576: must be a token id below 1048576"),
        ({"<a>": "1"}, "<a>: must be a token id below 1048576, not '1'"),
        ({"<a>": -1}, "<a>: must be a token id below 1048576, not -1"),
        ({"<a>": 1 << 20}, "<a>: must be a token id below 1048576, not 1048576"),
    ],
)
def test_added_tokens_that_are_refused(added: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "qwen.tiktoken").write_bytes(RANKS)
    name = "added_tokens.json" if "<a>" in added else "tokenizer_config.json"
    (tmp_path / name).write_text(json.dumps(added if "<a>" in added else {"added_tokens_decoder": added}))
    for read in (num_token_ids, Tokenizer.from_model):
        with pytest.raises(ValueError, match=rf"{name}: {message}"):
            read(tmp_path)
