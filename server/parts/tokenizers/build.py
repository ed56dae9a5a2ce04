"""Build the tokenizer of a folder without tokenizer.json: of tekken.json, tokenizer.model or ranks of tiktoken."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken

from engine.config.tokenizer_files import CONTROL, UNUSED, read_added_tokens
from engine.parts.tokenizers.files import (
    QWEN_SPECIAL_TOKENS,
    Piece,
    is_tiktoken,
    read_sentencepiece,
    read_tekken,
    read_tiktoken,
)
from server.parts.tokenizers.sentencepiece import added_pieces, build_sentencepiece
from server.parts.tokenizers.tiktoken import build_tiktoken
from server.text.folder_tokenizer import token_text
from server.text.gguf_tokenizer import LLAMA3, QWEN2, add_template

# The patterns of models whose files of ranks do not come with one, as transformers and Qwen 1's own code have them.
TIKTOKEN_PATTERNS = {"tokenizer.model": LLAMA3, "qwen.tiktoken": QWEN2}

MAX_ADDED_TOKENS = 100_000  # beyond the vocabulary of sentencepiece


class _BuiltTokenizer(NamedTuple):
    """A tokenizer without its added tokens: those that are matched in a text as a whole, by id."""

    backend: tokenizers.Tokenizer
    added_tokens: dict[int, AddedToken]
    bos_token: str | None = None
    eos_token: str | None = None


def build(path: Path, config: dict[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Return the tokenizer of a file, and the config with the BOS and EOS tokens that only the file names."""
    added = {token_id: _added_token(token) for token_id, token in read_added_tokens(path.parent).items()}
    if path.name == "tekken.json":
        built = _build_tekken(path)
    elif path.suffix == ".tiktoken" or is_tiktoken(path):
        built = _build_tiktoken(path, added, config)
    else:
        built = _build_sentencepiece(path, added, config)
    backend, tokens = built.backend, [token for _, token in sorted(built.added_tokens.items())]
    backend.add_special_tokens([token for token in tokens if token.special])
    backend.add_tokens([token for token in tokens if not token.special])
    named = {"bos_token": built.bos_token, "eos_token": built.eos_token}
    config = {name: token for name, token in named.items() if token is not None} | config
    bos_token = token_text(config.get("bos_token")) if config.get("add_bos_token", True) else None
    eos_token = token_text(config.get("eos_token")) if config.get("add_eos_token", False) else None
    present = [token if token and backend.token_to_id(token) is not None else None for token in (bos_token, eos_token)]
    add_template(backend, *present)
    return backend, config


def _added_token(token: Mapping[str, Any]) -> AddedToken:
    """Return a token that is matched in a text as it is, whatever its flag `normalized` says.

    Normalisation by the library would put sentencepiece's space before the token.
    """
    flags = {name: bool(token.get(name, False)) for name in ("special", "lstrip", "rstrip", "single_word")}
    return AddedToken(token["content"], normalized=False, **flags)


def _build_tekken(path: Path) -> _BuiltTokenizer:
    model = read_tekken(path)
    others = dict(enumerate(model.special_tokens))
    backend = build_tiktoken(model.ranks, others, model.pattern, str(path), first_id=len(others))
    added = {token_id: AddedToken(text, special=True, normalized=False) for token_id, text in others.items()}
    return _BuiltTokenizer(backend, added, "<s>", "</s>")


def _build_tiktoken(path: Path, added: dict[int, AddedToken], config: Mapping[str, Any]) -> _BuiltTokenizer:
    ranks = read_tiktoken(path)
    if path.name == "qwen.tiktoken":
        first_id = max(ranks.values()) + 1
        tokens = [AddedToken(text, special=True, normalized=False) for text in QWEN_SPECIAL_TOKENS]
        added = dict(enumerate(tokens, first_id)) | added
    pattern = config.get("pat_str", TIKTOKEN_PATTERNS.get(path.name))
    if not isinstance(pattern, str):
        raise ValueError(
            f"{path}: the pattern that splits text is missing: set `pat_str` in tokenizer_config.json "
            f"(known without it: {', '.join(TIKTOKEN_PATTERNS)})"
        )
    others = {token_id: token.content for token_id, token in added.items()}
    return _BuiltTokenizer(build_tiktoken(ranks, others, pattern, str(path)), added)


def _build_sentencepiece(path: Path, added: dict[int, AddedToken], config: Mapping[str, Any]) -> _BuiltTokenizer:
    model = read_sentencepiece(path)
    if config.get("add_prefix_space") is False:
        model = model._replace(add_dummy_prefix=False)
    pieces = list(model.pieces)
    # A token that is a piece already stays one, if it is not special: Gemma's runs of spaces, for example.
    is_piece = {index: piece.text for index, piece in enumerate(pieces)}
    added = {index: token for index, token in added.items() if token.special or is_piece.get(index) != token.content}
    if max(added, default=0) > len(pieces) + MAX_ADDED_TOKENS:
        raise ValueError(f"{path.parent}: the added token {max(added)} is far beyond the {len(pieces)} of {path.name}")
    pieces += [Piece(f"[unused {index}]", 0.0, UNUSED) for index in range(len(pieces), max(added, default=-1) + 1)]
    for index, token in added.items():
        pieces[index] = Piece(token.content, 0.0, CONTROL)
    backend = build_sentencepiece(model, pieces, str(path), prefix_once=config.get("legacy") is False)
    bos, eos = (pieces[index].text if 0 <= index < len(pieces) else None for index in (model.bos_id, model.eos_id))
    return _BuiltTokenizer(backend, added_pieces(model, pieces) | added, bos, eos)
