"""Read the tokenizer of a model folder: tokenizer.json, or other files by a part."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, models

from engine.config.tokenizer_files import check_num_token_ids, read_optional_object, tokenizer_file
from engine.shared.gguf import short
from server.part_table import load_module
from server.text.fim import FIMMarkers

NAMED_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")

MAX_UNIGRAM_CHARS = 512  # of a token in a unigram model, as in sentencepiece's trainer


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
        backend, config = load_module("tokenizers", "build").build(path, config)
    _check_unigram(backend, path)
    _mark_special(backend, _special_tokens(config))
    vocab_size = check_num_token_ids(max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1, path)
    return backend, TokenizerConfig(
        bos_token=token_text(config.get("bos_token")),
        eos_token=token_text(config.get("eos_token")),
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


# The configuration.


def token_text(token: object) -> str | None:
    """Return the text of a token, which is a string or an object with `content`; None if it is neither."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _special_tokens(config: Mapping[str, Any]) -> list[str]:
    values = [config.get(name) for name in NAMED_SPECIAL_TOKENS]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(name, [])
        values += more.values() if isinstance(more, dict) else more if isinstance(more, list) else []
    return [text for value in values if (text := token_text(value))]


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
