"""Encode and decode text with the tokenizer of a GGUF file or a Hugging Face folder."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Self

import tokenizers
from tokenizers import AddedToken, models

from engine.config.tokenizer_files import check_num_token_ids, read_optional_object, tokenizer_file
from engine.shared.gguf import GGUFFile, short
from server.part_table import hardened, load_module
from server.text.gguf_tokenizer import SPACE, GGUFVocabulary, build_tokenizer, byte_alphabet, without_prefix

logger = logging.getLogger(__name__)

UNUSUAL = "\U0010fffd"  # a character for private use, which vocabularies do not have
NAMED_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
MAX_CACHED_TOKENS = 1 << 18  # whose bytes are known
MAX_UNIGRAM_CHARS = 512  # of a token in a unigram model, as in sentencepiece's trainer


class FIMMarkers(NamedTuple):
    """The tokens for fill-in-the-middle (FIM): before the prefix, before the suffix and before the text between them.

    Most models that are trained for it expect the prefix first, some the suffix (https://arxiv.org/abs/2207.14255).
    """

    prefix: str
    suffix: str
    middle: str
    is_suffix_first: bool = False


MARKERS = (
    FIMMarkers("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen, CodeGemma
    FIMMarkers("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    FIMMarkers("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    FIMMarkers("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek
    FIMMarkers("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
    FIMMarkers("<PRE>", "<SUF>", "<MID>"),
    FIMMarkers("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM
    FIMMarkers("<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>", is_suffix_first=True),  # Seed-Coder
)


class FIMTokens(NamedTuple):
    """The ids of a model's FIM tokens, and the order in which it expects the parts."""

    prefix_id: int
    suffix_id: int
    middle_id: int
    is_suffix_first: bool

    def join(self, prefix: Sequence[int], suffix: Sequence[int]) -> list[int]:
        """Return the prompt for the text between two others."""
        parts = [[self.prefix_id, *prefix], [self.suffix_id, *suffix]]
        first, second = reversed(parts) if self.is_suffix_first else parts
        return [*first, *second, self.middle_id]


class TokenizerConfig(NamedTuple):
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
        self.token_bytes: Callable[[int], bytes] = lru_cache(MAX_CACHED_TOKENS)(self._find_bytes)
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
        """Read the tokenizer of a GGUF file, or of a folder.

        Raises:
            ValueError: there is no tokenizer, or its type is not supported. The message names the file.
        """
        try:
            return cls(*(_load_folder(path) if path.is_dir() else _load_gguf(path)))
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
        any amount of text, and without the part hardening.
        """
        return 0 if self._bound is None else self._bound.min_tokens(text, enough)

    @cached_property
    def _bound(self) -> Any:
        find_bound: Callable[..., Any] = hardened("token_bound", "token_bound", lambda *_: None)
        return find_bound(self._backend, self.vocab_size, self._to_bytes)

    def encode_plain(self, text: str, *, is_continuation: bool = False) -> list[int]:
        """Return the token ids of a text without special tokens.

        `is_continuation`: other text precedes it, so the space is left out that sentencepiece puts before a text.
        """
        if is_continuation and self._adds_space:
            before = self.encode("\n", add_special_tokens=False)
            token_ids = self.encode("\n" + text, add_special_tokens=False, parse_special=False)
            if token_ids[: len(before)] == before:
                return token_ids[len(before) :]
        return self.encode(text, add_special_tokens=False, parse_special=False)

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


# A folder.


def _load_folder(folder: Path) -> tuple[tokenizers.Tokenizer, TokenizerConfig]:
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


# Fill-in-the-middle.


def find_fim_tokens(token_to_id: Callable[[str], int | None], markers: FIMMarkers | None) -> FIMTokens | None:
    """Return the FIM tokens of a vocabulary, or None if it has none.

    `markers` are those that the model's file names, if it does; otherwise they are found by their names in MARKERS.
    """
    for each in MARKERS if markers is None else (markers,):
        prefix_id, suffix_id, middle_id = map(token_to_id, each[:3])
        if prefix_id is not None and suffix_id is not None and middle_id is not None:
            return FIMTokens(prefix_id, suffix_id, middle_id, each.is_suffix_first)
    return None


def fim_markers_of_gguf(vocabulary: GGUFVocabulary) -> FIMMarkers | None:
    """Return the FIM tokens that a GGUF file names, under the present keys or the older ones."""
    for keys in (("fim_pre", "fim_suf", "fim_mid"), ("prefix", "suffix", "middle")):
        prefix, suffix, middle = map(vocabulary.named_token, keys)
        if prefix is not None and suffix is not None and middle is not None:
            known = [markers for markers in MARKERS if markers[:3] == (prefix, suffix, middle)]
            return known[0] if known else FIMMarkers(prefix, suffix, middle)
    return None
