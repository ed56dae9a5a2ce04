"""Read the tokenizer of a model folder: tokenizer.json, tekken.json, tokenizer.model or ranks of tiktoken."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, models

from engine.config.tokenizer_files import (
    CONTROL,
    QWEN_SPECIAL_TOKENS,
    UNUSED,
    Piece,
    check_num_token_ids,
    is_tiktoken,
    read_added_tokens,
    read_optional_object,
    read_sentencepiece,
    read_tekken,
    read_tiktoken,
    tokenizer_file,
)
from engine.shared.gguf import short
from server.text.fim import FIMMarkers
from server.text.gguf_tokenizer import LLAMA3, QWEN2, add_template
from server.text.sentencepiece_tokenizer import added_pieces, build_sentencepiece
from server.text.tiktoken_tokenizer import build_tiktoken

NAMED_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")

# The patterns of models whose files of ranks do not come with one, as transformers and Qwen 1's own code have them.
TIKTOKEN_PATTERNS = {"tokenizer.model": LLAMA3, "qwen.tiktoken": QWEN2}

MAX_UNIGRAM_CHARS = 512  # of a token in a unigram model, as in sentencepiece's trainer
MAX_ADDED_TOKENS = 100_000  # beyond the vocabulary of sentencepiece


class TokenizerConfig(NamedTuple):
    """The properties of a tokenizer that are not part of the `tokenizers` object."""

    bos_token: str | None
    eos_token: str | None
    chat_template: str | None
    vocab_size: int
    fim_markers: FIMMarkers | None = None


def load_folder(folder: Path) -> tuple[tokenizers.Tokenizer, TokenizerConfig]:
    """Load the tokenizer of a folder.

    tokenizer.json alone decides about BOS and EOS. With other files, `add_bos_token` (by default true) and
    `add_eos_token` (by default false) of tokenizer_config.json do.

    Raises:
        ValueError: there is no tokenizer, or its type is not supported. The message names the file.
    """
    path = tokenizer_file(folder)
    if path is None:
        names = "tokenizer.json, tekken.json, tokenizer.model or *.tiktoken"
        raise ValueError(f"{folder}: no tokenizer in this folder (none of {names})")
    config = _read_config(folder)
    if path.name == "tokenizer.json":
        backend = _read_tokenizer_json(path)
    else:
        backend, config = _build(path, config)
    _check_unigram(backend, path)
    _mark_special(backend, _special_tokens(config))
    vocab_size = check_num_token_ids(max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1, path)
    return backend, TokenizerConfig(
        bos_token=_token_text(config.get("bos_token")),
        eos_token=_token_text(config.get("eos_token")),
        chat_template=_chat_template(folder, config),
        vocab_size=vocab_size,
    )


def _read_config(folder: Path) -> dict[str, Any]:
    values = read_optional_object(folder / "special_tokens_map.json") | read_optional_object(
        folder / "tokenizer_config.json"
    )
    return {key: value for key, value in values.items() if value is not None}


def _read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{path}: not a valid tokenizer ({short(str(error))})") from error


def _check_unigram(backend: tokenizers.Tokenizer, path: Path) -> None:
    """Raise ValueError for a unigram model with a token so long that encoding would be slow.

    At each character of a text, the library reads on as long as a token may match.
    """
    if not isinstance(backend.model, models.Unigram):
        return
    longest = max(map(len, backend.get_vocab(with_added_tokens=False)), default=0)
    if longest > MAX_UNIGRAM_CHARS:
        raise ValueError(f"{path}: a token of {longest} characters is not supported (at most {MAX_UNIGRAM_CHARS})")


# Files that are not of the tokenizers library.


class _BuiltTokenizer(NamedTuple):
    """A tokenizer without its added tokens: those that are matched in a text as a whole, by id."""

    backend: tokenizers.Tokenizer
    added_tokens: dict[int, AddedToken]
    bos_token: str | None = None
    eos_token: str | None = None


def _build(path: Path, config: dict[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
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
    bos_token = _token_text(config.get("bos_token")) if config.get("add_bos_token", True) else None
    eos_token = _token_text(config.get("eos_token")) if config.get("add_eos_token", False) else None
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


# The configuration.


def _token_text(token: object) -> str | None:
    """Return the text of a token, which is a string or an object with `content`; None if it is neither."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _special_tokens(config: Mapping[str, Any]) -> list[str]:
    values = [config.get(name) for name in NAMED_SPECIAL_TOKENS]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(name, [])
        values += more.values() if isinstance(more, dict) else more if isinstance(more, list) else []
    return [text for value in values if (text := _token_text(value))]


def _mark_special(backend: tokenizers.Tokenizer, tokens: list[str]) -> None:
    """Mark the tokens named in the config as special, since not every tokenizer.json does."""
    marked = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    unmarked = [token for token in tokens if token not in marked and backend.token_to_id(token) is not None]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in unmarked])


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Return the chat template: chat_template.jinja, else the config's; of several, the one named "default"."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 ({error})") from error
    template = config.get("chat_template") or read_optional_object(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[-1].get("template") if named else None
    if template is not None and not isinstance(template, str):
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: chat_template: must be a string or a list of named templates"
        )
    return template
