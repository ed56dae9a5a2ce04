"""Encode and decode text with the tokenizer of a GGUF file or a Hugging Face folder."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import tokenizers
from tokenizers import AddedToken

from engine.shared.gguf import GGUFFile
from server.text.fim import FIMMarkers, fim_markers_of_gguf, find_fim_tokens
from server.text.gguf_tokenizer import SPACE, GGUFVocabulary, build_tokenizer

logger = logging.getLogger(__name__)

NAMED_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class _TokenizerConfig(NamedTuple):
    """The properties of a tokenizer that are not part of the `tokenizers` object."""

    bos_token: str | None
    eos_token: str | None
    chat_template: str | None
    vocab_size: int
    fim_markers: FIMMarkers | None = None


class Tokenizer:
    """A model's tokenizer. Thread-safe.

    Attributes:
        vocab_size: the highest token id + 1.
        bos_token, eos_token, bos_token_id, eos_token_id: None if the model has none.
        add_bos: whether `encode` prepends the BOS token.
        special_ids, special_tokens: ids and texts of the control tokens.
        chat_template: Jinja source, or None.
        fim: the FIM tokens, or None if the model has none.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: _TokenizerConfig) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._plain_backend = _without_special_tokens(backend)
        self._to_bytes = _token_decoder(backend)
        self.vocab_size = config.vocab_size
        self.chat_template = config.chat_template
        self.bos_token, self.bos_token_id = _find(backend, config.bos_token)
        self.eos_token, self.eos_token_id = _find(backend, config.eos_token)
        added_tokens = backend.get_added_tokens_decoder()
        self._added_tokens = {token_id: token.content for token_id, token in added_tokens.items()}
        special = {token_id: token.content for token_id, token in added_tokens.items() if token.special}
        self.special_ids = frozenset(special)
        self.special_tokens = tuple(special.values())
        self.fim = find_fim_tokens(backend.token_to_id, config.fim_markers)
        self.add_bos = self.bos_token_id is not None and self.encode("")[:1] == [self.bos_token_id]
        first = b"".join(map(self.token_bytes, self.encode("a", add_special_tokens=False)))
        self._adds_space = first.startswith(b" ")

    @classmethod
    def from_model(cls, path: Path) -> Self:
        """Read the tokenizer of a GGUF file, or of a folder with tokenizer.json.

        Raises:
            ValueError: there is no tokenizer, or its type is not supported. The message names the file.
        """
        return cls(*(_load_folder(path) if path.is_dir() else _load_gguf(path)))

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """Return the token ids of a text.

        Bytes for which a byte-level vocabulary has no token are dropped, as in the models' own tokenizers.

        Args:
            text: the text to encode.
            add_special_tokens: whether to add BOS, and any other token that the model expects around a text.
            parse_special: whether the text of a special token becomes that token; otherwise it is plain text.

        Raises:
            ValueError: the text contains lone surrogates.
        """
        backend = self._backend if parse_special else self._plain_backend
        try:
            # Unlike `encode`, this releases the GIL in every version of the library.
            (encoding,) = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except TypeError as error:
            raise ValueError("the text contains lone surrogates, which are not Unicode characters") from error
        return encoding.ids

    def encode_plain(self, text: str, *, is_continuation: bool = False) -> list[int]:
        """Return the token ids of a text without special tokens.

        `is_continuation`: other text precedes it, so the space is left out that sentencepiece puts before a text.
        """
        before = "\n" if is_continuation and self._adds_space else ""
        num_before = len(self.encode(before, add_special_tokens=False))
        return self.encode(before + text, add_special_tokens=False, parse_special=False)[num_before:]

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of token ids. Ids outside the vocabulary are ignored."""
        valid = [token_id for token_id in token_ids if 0 <= token_id < self.vocab_size]
        return self._backend.decode(valid, skip_special_tokens=skip_special_tokens)

    def special_ids_in(self, texts: Iterable[str]) -> dict[str, int]:
        """Return the ids of the control tokens that occur in any of the texts, by the token's text."""
        joined = "\n".join(texts)
        ids = {token: self._backend.token_to_id(token) for token in self.special_tokens if token and token in joined}
        return {token: token_id for token, token_id in ids.items() if token_id is not None}

    def to_json(self) -> str:
        """Return the tokenizer in the format of tokenizer.json."""
        return self._backend.to_str()

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token, which may be only part of a character; b"" for an id outside the vocabulary.

        The bytes of a special token are its text.
        """
        if (text := self._added_tokens.get(token_id)) is not None:
            return text.encode()
        token = self._backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        return b"" if token is None else self._to_bytes(token)


def _find(backend: tokenizers.Tokenizer, token: str | None) -> tuple[str | None, int | None]:
    """Return a token and its id, or (None, None) if the vocabulary does not have it."""
    token_id = None if token is None else backend.token_to_id(token)
    if token is not None and token_id is None:
        logger.warning("special token %r of the tokenizer is not in its vocabulary", token)
    return (None, None) if token_id is None else (token, token_id)


def _without_special_tokens(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Return a second tokenizer that shares the vocabulary, but encodes the text of special tokens as plain text.

    `encode_special_tokens` is a property of a tokenizer, so setting it on the first one would affect other threads.
    """
    plain = tokenizers.Tokenizer(backend.model)
    plain.normalizer = backend.normalizer
    plain.pre_tokenizer = backend.pre_tokenizer
    plain.post_processor = backend.post_processor
    plain.add_tokens([token for _, token in sorted(backend.get_added_tokens_decoder().items())])
    plain.encode_special_tokens = True
    return plain


# The bytes of a token.


def _token_decoder(backend: tokenizers.Tokenizer) -> Callable[[str], bytes]:
    """Return the function that converts a token to bytes, chosen by the type of the tokenizer's decoder."""
    decoder_types = _decoder_types(backend)
    if "ByteLevel" in decoder_types:
        alphabet = byte_alphabet()
        return lambda token: _byte_level_bytes(token, alphabet)
    if decoder_types & {"ByteFallback", "Metaspace"}:
        return _sentencepiece_bytes
    raise ValueError(
        f"tokenizers that decode with {', '.join(sorted(decoder_types)) or 'nothing'} are not supported "
        "(supported: byte-level, and sentencepiece with byte fallback)"
    )


def _decoder_types(backend: tokenizers.Tokenizer) -> set[str]:
    if backend.decoder is None:
        return set()
    state = json.loads(backend.decoder.__getstate__())
    return {state["type"]} | {part["type"] for part in state.get("decoders", [])}


def byte_alphabet() -> dict[str, int]:
    """Return the characters that represent bytes in byte-level vocabularies, with their bytes (GPT-2's encoding).

    Printable characters of Latin-1 represent themselves; the other bytes are mapped to U+0100 and up.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)).difference(printable))
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


def _byte_level_bytes(token: str, alphabet: Mapping[str, int]) -> bytes:
    """Return the bytes of a token; a token with a character outside the alphabet is plain text."""
    try:
        return bytes([alphabet[character] for character in token])
    except KeyError:
        return token.encode()


def _sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes.fromhex(token[3:5])
        except ValueError:
            pass  # not a byte token
    return token.replace(SPACE, " ").encode()


# A GGUF file.


def _load_gguf(path: Path) -> tuple[tokenizers.Tokenizer, _TokenizerConfig]:
    if not path.is_file():
        raise ValueError(f"{path}: no such model (expected a GGUF file, or a folder with tokenizer.json)")
    with GGUFFile(path) as file:
        vocabulary = GGUFVocabulary(file.metadata, str(path))
        architecture = vocabulary.text("general.architecture") or ""
    config = _TokenizerConfig(
        bos_token=vocabulary.named_token("bos"),
        eos_token=vocabulary.named_token("eos"),
        chat_template=vocabulary.text("tokenizer.chat_template"),
        vocab_size=len(vocabulary.tokens),
        fim_markers=fim_markers_of_gguf(vocabulary),
    )
    return build_tokenizer(vocabulary, architecture=architecture), config


# A folder with tokenizer.json.


def _load_folder(folder: Path) -> tuple[tokenizers.Tokenizer, _TokenizerConfig]:
    """Load a folder. tokenizer.json alone decides about BOS and EOS; `add_bos_token` in the config is ignored."""
    config = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
    backend = _read_tokenizer(folder)
    _mark_special(backend, _special_tokens(config))
    vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    return backend, _TokenizerConfig(
        bos_token=_token_text(config.get("bos_token")),
        eos_token=_token_text(config.get("eos_token")),
        chat_template=_chat_template(folder, config),
        vocab_size=vocab_size,
    )


def _read_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no tokenizer.json in this folder; save_pretrained of transformers creates it")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{path}: not a valid tokenizer ({error})") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must contain a JSON object")
    return {key: value for key, value in values.items() if value is not None}


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
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: chat_template: must be a string or a list of named templates"
        )
    return template
