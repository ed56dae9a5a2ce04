"""Find the tokenizer of a model folder, and count its token ids, of which the engine must know the number."""

import re
from pathlib import Path
from typing import Any

import msgspec

from engine.config.fields import read_json_object, shown
from engine.shared.gguf import short
from engine.shared.parts import engine_part

MAX_TOKEN_IDS = 1 << 20  # vocabularies in use have up to 262,144; tables have a row for each id

# Types of sentencepiece's pieces, which GGUF files use too.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def tokenizer_file(folder: Path) -> Path | None:
    """Return the file that defines the tokenizer of a folder; None if there is none."""
    named = [folder / name for name in ("tokenizer.json", "tekken.json", "tokenizer.model")]
    return next((path for path in [*named, *sorted(folder.glob("*.tiktoken"))] if path.is_file()), None)


def read_optional_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; {} if there is no such file. Raises ValueError."""
    return read_json_object(path) if path.is_file() else {}


def read_added_tokens(folder: Path) -> dict[int, dict[str, Any]]:
    """Return the tokens that are not in the tokenizer's file: objects with `content`, by token id. Raises ValueError.

    They are in `added_tokens_decoder` of tokenizer_config.json, in older folders in added_tokens.json.
    """
    older, config = folder / "added_tokens.json", folder / "tokenizer_config.json"
    added: dict[int, dict[str, Any]] = {}
    for text, value in read_optional_object(older).items():
        if (token_id := _token_id(value)) is None:
            raise ValueError(f"{older}: {short(text)}: must be a token id below {MAX_TOKEN_IDS}, not {shown(value)}")
        added[token_id] = {"content": text}
    decoder = read_optional_object(config).get("added_tokens_decoder") or {}
    for key, token in decoder.items() if isinstance(decoder, dict) else ():
        token_id = _token_id(int(key) if re.fullmatch("[0-9]{1,9}", key) else None)
        if token_id is None or not isinstance(token, dict) or not isinstance(token.get("content"), str):
            problem = f"must be a token id below {MAX_TOKEN_IDS} with an object"
            raise ValueError(f"{config}: added_tokens_decoder: {short(key)}: {problem}")
        added[token_id] = token
    return added


def _token_id(value: object) -> int | None:
    """Return a value that is a token id; None if it is something else."""
    return value if type(value) is int and 0 <= value < MAX_TOKEN_IDS else None


def check_num_token_ids(number: int, path: Path) -> int:
    """Return the highest token id of a tokenizer's file plus one. Raises ValueError if tables have no room for it."""
    if not 0 < number <= MAX_TOKEN_IDS:
        raise ValueError(f"{path}: its highest token id must be from 0 to {MAX_TOKEN_IDS - 1}, not {number - 1}")
    return number


def num_token_ids(folder: Path) -> int | None:
    """Return the highest token id of a folder's tokenizer plus one; None if it has no tokenizer. Raises ValueError."""
    path = tokenizer_file(folder)
    if path is None:
        return None
    count = _num_ids_of_tokenizer_json if path.name == "tokenizer.json" else engine_part("tokenizers", "files").count
    return check_num_token_ids(count(path), path)


def _num_ids_of_tokenizer_json(path: Path) -> int:
    """Return the highest token id of a tokenizer.json plus one. Raises ValueError if it cannot be read."""
    try:
        tokenizer = msgspec.json.decode(path.read_bytes())
        vocab = tokenizer["model"]["vocab"]  # token -> id, or in Unigram a list in the order of ids
        ids = vocab.values() if isinstance(vocab, dict) else [len(vocab) - 1]
        return int(1 + max([*ids, *(token["id"] for token in tokenizer.get("added_tokens") or [])]))
    except (msgspec.DecodeError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a tokenizer of the tokenizers library ({shown(error)})") from error
