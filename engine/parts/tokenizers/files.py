"""Read other tokenizer files than tokenizer.json: sentencepiece's tokenizer.model, tiktoken's ranks, tekken.json.

Both processes need them: the API process makes a tokenizer of them, the engine must know the number of token ids.
"""

import base64
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec

from engine.config.fields import shown
from engine.config.tokenizer_files import MAX_TOKEN_IDS, NORMAL, UNKNOWN, read_added_tokens
from engine.shared.gguf import short

MAX_SPECIAL_TOKENS = 10_000  # that a tekken.json announces; files in use have 1,000

# Fields of sentencepiece's protobuf messages (sentencepiece_model.proto), and the types of those that are read.
MODEL_PIECES, MODEL_TRAINER, MODEL_NORMALIZER = 1, 2, 3
PIECE_TEXT, PIECE_SCORE, PIECE_TYPE = 1, 2, 3
TRAINER_MODEL_TYPE, TRAINER_SPACE_AS_SUFFIX, TRAINER_UNK_ID, TRAINER_BOS_ID, TRAINER_EOS_ID = 3, 24, 40, 41, 42
NORMALIZER_CHARSMAP, NORMALIZER_ADD_PREFIX, NORMALIZER_REMOVE_SPACES, NORMALIZER_ESCAPE_SPACES = 2, 3, 4, 5
MODEL_FIELDS = dict.fromkeys((MODEL_PIECES, MODEL_TRAINER, MODEL_NORMALIZER), bytes)
PIECE_FIELDS = {PIECE_TEXT: bytes, PIECE_SCORE: float, PIECE_TYPE: int}
TRAINER_FIELDS = dict.fromkeys((TRAINER_MODEL_TYPE, TRAINER_SPACE_AS_SUFFIX, TRAINER_BOS_ID, TRAINER_EOS_ID), int)
NORMALIZER_FIELDS = {
    NORMALIZER_CHARSMAP: bytes,
    NORMALIZER_ADD_PREFIX: int,
    NORMALIZER_REMOVE_SPACES: int,
    NORMALIZER_ESCAPE_SPACES: int,
}
MAX_VARINT_BYTES = 10  # of 64 bits
ALGORITHMS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}

# The special tokens of a tekken.json that names none (before version v7).
OLD_TEKKEN_TOKENS = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"]
OLD_TEKKEN_TOKENS += ["[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"]
OLD_TEKKEN_TOKENS += ["[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"]


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
    except (IndexError, UnicodeDecodeError, KeyError, _ProtobufError) as error:
        raise ValueError(f"{path}: neither a model of sentencepiece nor ranks of tiktoken ({shown(error)})") from error


def _parse_sentencepiece(data: bytes) -> SentencePieceModel:
    pieces: dict[str, Piece] = {}
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(data, MODEL_FIELDS):
        if number == MODEL_PIECES:
            piece = dict(_fields(value, PIECE_FIELDS))
            text = piece.get(PIECE_TEXT, b"").decode()
            if not text or text in pieces:
                raise _ProtobufError(f"piece {len(pieces)} {'occurs before' if text else 'is empty'}: {shown(text)}")
            pieces[text] = Piece(text, piece.get(PIECE_SCORE, 0.0), piece.get(PIECE_TYPE, NORMAL))
        elif number == MODEL_TRAINER:
            trainer = dict(_fields(value, TRAINER_FIELDS))
        else:
            normalizer = dict(_fields(value, NORMALIZER_FIELDS))
    if not pieces:
        raise _ProtobufError("it has no pieces")
    return SentencePieceModel(
        algorithm=ALGORITHMS[trainer.get(TRAINER_MODEL_TYPE, 1)],
        pieces=list(pieces.values()),
        unk_id=next((index for index, piece in enumerate(pieces.values()) if piece.type == UNKNOWN), 0),
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


def _fields(data: bytes, types: Mapping[int, type]) -> Iterator[tuple[int, Any]]:
    """Yield the fields of a protobuf message that have one of `types`, by their numbers.

    As in protobuf's own readers, a field of another type is an unknown one.
    https://protobuf.dev/programming-guides/encoding/
    """
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        value, position = _value(data, position, tag & 7)
        if isinstance(value, types.get(tag >> 3, ())):
            yield tag >> 3, value


def _value(data: bytes, position: int, wire_type: int) -> tuple[int | float | bytes | None, int]:
    """Return the value at a position, None if it is a number of 64 bits, and the position after it."""
    if wire_type == 0:
        return _varint(data, position)
    if wire_type == 2:
        size, position = _varint(data, position)
    elif wire_type in (1, 5):
        size = 8 if wire_type == 1 else 4
    else:
        raise _ProtobufError(f"wire type {wire_type} at byte {position}")
    end = position + size
    if end > len(data):
        raise _ProtobufError(f"truncated at byte {position}")
    if wire_type == 2:
        return data[position:end], end
    return struct.unpack_from("<f", data, position)[0] if wire_type == 5 else None, end


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Return an integer of seven bits a byte, lowest first, and the position after it."""
    value = 0
    for index in range(MAX_VARINT_BYTES):
        byte = data[position + index]
        value |= (byte & 127) << 7 * index
        if byte < 128:
            return value, position + index + 1
    raise _ProtobufError(f"an integer of more than {MAX_VARINT_BYTES} bytes at byte {position}")


def _signed(value: int) -> int:
    """Return an int32 of protobuf, which is sign-extended to 64 bits."""
    return value - (1 << 64) if value >> 63 else value


def is_tiktoken(path: Path) -> bool:
    """Return whether a tokenizer.model has tiktoken's ranks: a line for each token, with its bytes in base64."""
    with path.open("rb") as file:
        token, _, rank = file.readline(1000).partition(b" ")
    return rank.strip().isdigit() and token[:1] != bytes([MODEL_PIECES << 3 | 2])


def read_tiktoken(path: Path) -> dict[bytes, int]:
    """Return the rank of each token, which is its id. Raises ValueError if the file has no ranks, or one is no id."""
    tokens: dict[int, bytes] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if line.strip():
            try:
                token, rank = line.split()
                token_id = int(rank)
                if not 0 <= token_id < MAX_TOKEN_IDS or token_id in tokens:
                    raise ValueError
                tokens[token_id] = base64.b64decode(token, validate=True)
            except ValueError as error:
                problem = f"a token in base64 and its rank, below {MAX_TOKEN_IDS}, which no other token has"
                raise ValueError(f"{path}: line {number}: must be {problem}") from error
    if not tokens:
        raise ValueError(f"{path}: it has no tokens")
    ranks = {token: rank for rank, token in tokens.items()}
    if len(ranks) < len(tokens):
        raise ValueError(f"{path}: {len(tokens) - len(ranks)} of {len(tokens)} tokens occur more than once")
    return ranks


Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKEN_IDS)]


class _TekkenConfig(msgspec.Struct):
    pattern: str
    default_vocab_size: Count
    default_num_special_tokens: Annotated[int, msgspec.Meta(ge=0, le=MAX_SPECIAL_TOKENS)]


class _TekkenToken(msgspec.Struct):
    rank: int
    token_bytes: bytes


class _TekkenSpecialToken(msgspec.Struct):
    rank: int
    token_str: str


class _Tekken(msgspec.Struct):
    config: _TekkenConfig
    vocab: list[_TekkenToken]
    special_tokens: list[_TekkenSpecialToken] | None = None


def read_tekken(path: Path) -> TekkenModel:
    """Read a tekken.json, of any version. Raises ValueError if it is none."""
    try:
        return _parse_tekken(msgspec.json.decode(path.read_bytes(), type=_Tekken))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a tokenizer of mistral-common ({short(str(error))})") from error


def _parse_tekken(tekken: _Tekken) -> TekkenModel:
    """Return what encoding depends on. Raises ValueError if ranks are not those of the list, or tokens occur twice."""
    num_special, size = tekken.config.default_num_special_tokens, tekken.config.default_vocab_size
    if num_special > size:
        raise ValueError(f"default_num_special_tokens: {num_special} of default_vocab_size {size}")
    vocab = tekken.vocab[: size - num_special]
    if wrong := [index for index, token in enumerate(vocab) if token.rank != index]:
        raise ValueError(f"vocab[{wrong[0]}]: its rank must be {wrong[0]}, not {vocab[wrong[0]].rank}")
    named = {token.rank: token.token_str for token in tekken.special_tokens or ()} or dict(enumerate(OLD_TEKKEN_TOKENS))
    special_tokens = [named.get(index, f"<SPECIAL_{index}>") for index in range(num_special)]
    ranks = {token.token_bytes: token.rank for token in vocab}
    for name, tokens, kept in (("vocab", vocab, ranks), ("special_tokens", special_tokens, set(special_tokens))):
        if len(kept) < len(tokens):
            raise ValueError(f"{name}: {len(tokens) - len(kept)} of {len(tokens)} tokens occur more than once")
    return TekkenModel(tekken.config.pattern, ranks, special_tokens)


def count(path: Path) -> int:
    """Return the number of token ids of a file. Raises ValueError."""
    if path.name == "tekken.json":
        tekken = read_tekken(path)
        return len(tekken.special_tokens) + len(tekken.ranks)
    if path.suffix == ".tiktoken" or is_tiktoken(path):
        size = max(read_tiktoken(path).values()) + 1
    else:
        size = len(read_sentencepiece(path).pieces)
    return max([size - 1, *read_added_tokens(path.parent)]) + 1
