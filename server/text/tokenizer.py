"""Encode and decode text with the tokenizer of a GGUF file or a Hugging Face folder."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Self

import tokenizers

from engine.shared.gguf import GGUFFile, short
from server.text.fim import fim_markers_of_gguf, find_fim_tokens
from server.text.folder_tokenizer import TokenizerConfig, load_folder
from server.text.gguf_tokenizer import SPACE, GGUFVocabulary, build_tokenizer, byte_alphabet, without_prefix
from server.text.token_bound import TokenBound, token_bound

logger = logging.getLogger(__name__)

UNUSUAL = "\U0010fffd"  # a character for private use, which vocabularies do not have


class Tokenizer:
    """A model's tokenizer. Thread-safe.

    Attributes:
        vocab_size: the highest token id + 1.
        bos_token, eos_token, bos_token_id, eos_token_id: None if the model has none.
        add_bos: whether `encode` prepends the BOS token.
        special_ids, special_tokens: ids and texts of the control tokens.
        chat_template: Jinja source, or None.
        fim: the FIM tokens, or None if the model has none.
        token_bytes: maps a token id to the bytes of the token, which may be only part of a character; b"" for an id
            outside the vocabulary. The bytes of a special token are its text.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: TokenizerConfig) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._plain_backend = _without_special_tokens(backend)
        self._to_bytes = _token_decoder(backend)
        self.vocab_size = config.vocab_size
        self.token_bytes: Callable[[int], bytes] = _TokenBytes(self._find_bytes).__getitem__
        self.chat_template = config.chat_template
        self.bos_token, self.bos_token_id = _find(backend, config.bos_token)
        self.eos_token, self.eos_token_id = _find(backend, config.eos_token)
        added_tokens = backend.get_added_tokens_decoder()
        space = " " if self._to_bytes is _sentencepiece_bytes else SPACE  # how U+2581 in a symbol is decoded
        self._added_tokens = {
            token_id: token.content if token.special else token.content.replace(SPACE, space)
            for token_id, token in added_tokens.items()
        }
        special = {token_id: token.content for token_id, token in added_tokens.items() if token.special}
        self.special_ids = frozenset(special)
        self.special_tokens = tuple(special.values())
        self.fim = find_fim_tokens(backend.token_to_id, config.fim_markers)
        self.add_bos = self.bos_token_id is not None and self.encode("")[:1] == [self.bos_token_id]
        self.encode(UNUSUAL)  # fails if unknown characters become a token that is not there
        first = b"".join(map(self.token_bytes, self.encode("a", add_special_tokens=False)))
        self._adds_space = first.startswith(b" ")

    @classmethod
    def from_model(cls, path: Path) -> Self:
        """Read the tokenizer of a GGUF file, or of a folder (`server.text.folder_tokenizer`).

        Raises:
            ValueError: there is no tokenizer, or its type is not supported. The message names the file.
        """
        try:
            return cls(*(load_folder(path) if path.is_dir() else _load_gguf(path)))
        except BaseException as error:
            if _goes_on(error, path):
                raise
            raise ValueError(f"{path}: not a valid tokenizer ({short(str(error))})") from error

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

    def min_tokens(self, text: str, enough: int) -> int:
        """Return a lower bound of the number of tokens of a text, without BOS, in a fraction of `encode`'s time.

        Only as much of the text is read as has more than `enough` tokens. The bound is 0 for tokenizers that may drop
        any amount of text.
        """
        return 0 if self._bound is None else self._bound.min_tokens(text, enough)

    @cached_property
    def _bound(self) -> TokenBound | None:
        return token_bound(self._backend, self.vocab_size, self._to_bytes)

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
        """Return the tokenizer in the format of tokenizer.json, for grammars."""
        return without_prefix(self._backend.to_str())

    def _find_bytes(self, token_id: int) -> bytes:
        if (text := self._added_tokens.get(token_id)) is not None:
            return text.encode()
        token = self._backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        return b"" if token is None else self._to_bytes(token)


class _TokenBytes(dict[int, bytes]):
    """The bytes of tokens by id, found when they are first asked for."""

    def __init__(self, find: Callable[[int], bytes]) -> None:
        super().__init__()
        self._find = find

    def __missing__(self, token_id: int) -> bytes:
        if data := self._find(token_id):  # ids outside the vocabulary are not kept
            self[token_id] = data
        return data


def _goes_on(error: BaseException, path: Path) -> bool:
    """Return whether an error needs no other message: it names the file, or it is not about the tokenizer.

    The library raises plain Exception, and where it panics an exception that does not derive from it.
    """
    if isinstance(error, ValueError):
        return str(error).startswith(str(path))
    is_panic = type(error).__name__ == "PanicException"
    return isinstance(error, OSError) or not (is_panic or isinstance(error, Exception))


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


def _load_gguf(path: Path) -> tuple[tokenizers.Tokenizer, TokenizerConfig]:
    if not path.is_file():
        raise ValueError(f"{path}: no such model (expected a GGUF file, or a folder with a tokenizer)")
    with GGUFFile(path) as file:
        vocabulary = GGUFVocabulary(file.metadata, str(path))
        architecture = vocabulary.text("general.architecture") or ""
    config = TokenizerConfig(
        bos_token=vocabulary.named_token("bos"),
        eos_token=vocabulary.named_token("eos"),
        chat_template=vocabulary.text("tokenizer.chat_template"),
        vocab_size=len(vocabulary.tokens),
        fim_markers=fim_markers_of_gguf(vocabulary),
    )
    return build_tokenizer(vocabulary, architecture=architecture), config
