"""Read the tokenizer files of model folders: sentencepiece's tokenizer.model, tiktoken's ranks, Mistral's tekken.json.

Both processes need them: the API process makes a tokenizer of them, the engine must know the number of token ids.
"""

import base64
import binascii
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from engine.config.fields import shown

# Types of sentencepiece's pieces, which GGUF files use too.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# Fields of sentencepiece's protobuf messages (sentencepiece_model.proto).
MODEL_PIECES, MODEL_TRAINER, MODEL_NORMALIZER = 1, 2, 3
PIECE_TEXT, PIECE_SCORE, PIECE_TYPE = 1, 2, 3
TRAINER_MODEL_TYPE, TRAINER_SPACE_AS_SUFFIX, TRAINER_UNK_ID, TRAINER_BOS_ID, TRAINER_EOS_ID = 3, 24, 40, 41, 42
NORMALIZER_CHARSMAP, NORMALIZER_ADD_PREFIX, NORMALIZER_REMOVE_SPACES, NORMALIZER_ESCAPE_SPACES = 2, 3, 4, 5
ALGORITHMS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}

# The special tokens of a tekken.json that names none (before version v7).
OLD_TEKKEN_TOKENS = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"]
OLD_TEKKEN_TOKENS += ["[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"]
OLD_TEKKEN_TOKENS += ["[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"]

# The special tokens of Qwen 1, which follow its ranks; its files do not name them.
QWEN_SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{index}|>" for index in range(205))]


class Piece(NamedTuple):
    """A token of sentencepiece."""

    text: str
    score: float
    type: int


class SentencePieceModel(NamedTuple):
    """The parts of sentencepiece's model file that encoding depends on. The index of a piece is its token id."""

    algorithm: str  # bpe, unigram, word, char
    pieces: list[Piece]
    unk_id: int
    bos_id: int  # -1: none
    eos_id: int  # -1: none
    charsmap: bytes  # compiled rules of normalisation, empty for none
    add_dummy_prefix: bool  # a space is put before a text
    remove_extra_whitespaces: bool
    escape_whitespaces: bool
    treat_whitespace_as_suffix: bool


class TekkenModel(NamedTuple):
    """The parts of tekken.json that encoding depends on. Token ids are ranks, after those of the special tokens."""

    pattern: str  # splits text before merging
    ranks: dict[bytes, int]
    special_tokens: list[str]  # ids from 0


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read a model file of sentencepiece. Raises ValueError if it is none."""
    try:
        return _parse_sentencepiece(path.read_bytes())
    except (IndexError, struct.error, UnicodeDecodeError, TypeError, KeyError, _ProtobufError) as error:
        raise ValueError(f"{path}: neither a model of sentencepiece nor ranks of tiktoken ({shown(error)})") from error


def _parse_sentencepiece(data: bytes) -> SentencePieceModel:
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(data):
        if number == MODEL_PIECES:
            piece = dict(_fields(value))
            (score,) = struct.unpack("<f", piece.get(PIECE_SCORE, bytes(4)))
            pieces.append(Piece(piece[PIECE_TEXT].decode(), score, piece.get(PIECE_TYPE, NORMAL)))
        elif number == MODEL_TRAINER:
            trainer = dict(_fields(value))
        elif number == MODEL_NORMALIZER:
            normalizer = dict(_fields(value))
    if not pieces:
        raise _ProtobufError("it has no pieces")
    return SentencePieceModel(
        algorithm=ALGORITHMS[trainer.get(TRAINER_MODEL_TYPE, 1)],
        pieces=pieces,
        unk_id=next((index for index, piece in enumerate(pieces) if piece.type == UNKNOWN), 0),
        bos_id=_signed(trainer.get(TRAINER_BOS_ID, 1)),
        eos_id=_signed(trainer.get(TRAINER_EOS_ID, 2)),
        charsmap=normalizer.get(NORMALIZER_CHARSMAP, b""),
        add_dummy_prefix=bool(normalizer.get(NORMALIZER_ADD_PREFIX, True)),
        remove_extra_whitespaces=bool(normalizer.get(NORMALIZER_REMOVE_SPACES, True)),
        escape_whitespaces=bool(normalizer.get(NORMALIZER_ESCAPE_SPACES, True)),
        treat_whitespace_as_suffix=bool(trainer.get(TRAINER_SPACE_AS_SUFFIX, False)),
    )


class _ProtobufError(Exception):
    pass


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the fields of a protobuf message: integers as int, all others as their bytes.

    https://protobuf.dev/programming-guides/encoding/
    """
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        wire_type = tag & 7
        if wire_type == 0:
            value, position = _varint(data, position)
            yield tag >> 3, value
            continue
        if wire_type == 2:
            size, position = _varint(data, position)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise _ProtobufError(f"wire type {wire_type} at byte {position}")
        end = position + size
        if end > len(data):
            raise _ProtobufError(f"truncated at byte {position}")
        yield tag >> 3, data[position:end]
        position = end


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Return an integer of seven bits a byte, lowest first, and the position after it."""
    byte = data[position]
    value, shift = byte & 127, 7
    while byte & 128:
        position += 1
        byte = data[position]
        value |= (byte & 127) << shift
        shift += 7
    return value, position + 1


def _signed(value: int) -> int:
    """Return an int32 of protobuf, which is sign-extended to 64 bits."""
    return value - (1 << 64) if value >> 63 else value


def is_tiktoken(path: Path) -> bool:
    """Return whether a tokenizer.model has tiktoken's ranks: a line for each token, with its bytes in base64."""
    with path.open("rb") as file:
        token, _, rank = file.readline(1000).partition(b" ")
    return rank.strip().isdigit() and token[:1] != bytes([MODEL_PIECES << 3 | 2])


def read_tiktoken(path: Path) -> dict[bytes, int]:
    """Return the rank of each token, which is its id. Raises ValueError if the file has no ranks."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if line.strip():
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError as error:
                raise ValueError(f"{path}: line {number}: must be a token in base64 and its rank") from error
    if not ranks:
        raise ValueError(f"{path}: it has no tokens")
    return ranks


def read_tekken(path: Path) -> TekkenModel:
    """Read a tekken.json, of any version. Raises ValueError if it is none."""
    try:
        tekken = msgspec.json.decode(path.read_bytes())
        config = tekken["config"]
        num_special, size = config["default_num_special_tokens"], config["default_vocab_size"]
        vocab = tekken["vocab"][: size - num_special]
        ranks = {base64.b64decode(token["token_bytes"]): int(token["rank"]) for token in vocab}
        named = {token["rank"]: token["token_str"] for token in tekken.get("special_tokens") or ()}
        named = named or dict(enumerate(OLD_TEKKEN_TOKENS))
        special_tokens = [named.get(index, f"<SPECIAL_{index}>") for index in range(num_special)]
        return TekkenModel(str(config["pattern"]), ranks, special_tokens)
    except (msgspec.DecodeError, KeyError, TypeError, ValueError, binascii.Error) as error:
        raise ValueError(f"{path}: not a tokenizer of mistral-common ({shown(error)})") from error


def tokenizer_file(folder: Path) -> Path | None:
    """Return the file that defines the tokenizer of a folder; None if there is none."""
    named = [folder / name for name in ("tokenizer.json", "tekken.json", "tokenizer.model")]
    return next((path for path in [*named, *sorted(folder.glob("*.tiktoken"))] if path.is_file()), None)


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; {} if there is no such file. Raises ValueError."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must contain a JSON object")
    return values


def read_added_tokens(folder: Path) -> dict[int, dict[str, Any]]:
    """Return the tokens that are not in the tokenizer's file: objects with `content`, by token id. Raises ValueError.

    They are in `added_tokens_decoder` of tokenizer_config.json, in older folders in added_tokens.json.
    """
    older, config = folder / "added_tokens.json", folder / "tokenizer_config.json"
    added: dict[int, dict[str, Any]] = {}
    for text, token_id in read_json_object(older).items():
        if not isinstance(token_id, int) or token_id < 0:
            raise ValueError(f"{older}: {text}: must be a token id, not {shown(token_id)}")
        added[token_id] = {"content": text}
    decoder = read_json_object(config).get("added_tokens_decoder") or {}
    for token_id, token in decoder.items() if isinstance(decoder, dict) else ():
        if not token_id.isdigit() or not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise ValueError(f"{config}: added_tokens_decoder: {token_id}: must be a token id with an object")
        added[int(token_id)] = token
    return added


def num_token_ids(folder: Path) -> int | None:
    """Return the highest token id of a folder's tokenizer plus one; None if it has no tokenizer. Raises ValueError."""
    path = tokenizer_file(folder)
    if path is None:
        return None
    if path.name == "tokenizer.json":
        return _num_ids_of_tokenizer_json(path)
    if path.name == "tekken.json":
        tekken = read_tekken(path)
        return len(tekken.special_tokens) + len(tekken.ranks)
    if path.suffix == ".tiktoken" or is_tiktoken(path):
        size = max(read_tiktoken(path).values()) + 1
        size += len(QWEN_SPECIAL_TOKENS) if path.name == "qwen.tiktoken" else 0
    else:
        size = len(read_sentencepiece(path).pieces)
    return max([size - 1, *read_added_tokens(folder)]) + 1


def _num_ids_of_tokenizer_json(path: Path) -> int:
    try:
        tokenizer = msgspec.json.decode(path.read_bytes())
        vocab = tokenizer["model"]["vocab"]
        ids = vocab.values() if isinstance(vocab, dict) else [len(vocab) - 1]
        return int(1 + max([*ids, *(token["id"] for token in tokenizer.get("added_tokens") or [])]))
    except (msgspec.DecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a tokenizer of the tokenizers library ({shown(error)})") from error
