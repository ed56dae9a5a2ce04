"""Build a tokenizer from the metadata of a GGUF file.

The metadata has a vocabulary, sometimes merges, and the name of one of llama.cpp's algorithms:
`gpt2` is byte-level BPE that splits text by the patterns of `tokenizer.ggml.pre`;
`llama` and `gemma4` are sentencepiece BPE that writes spaces as U+2581 and unknown characters as bytes.
"""

import logging
import re
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from engine.config.tokenizer_files import BYTE, CONTROL, UNKNOWN, USER_DEFINED

logger = logging.getLogger(__name__)

MAX_MERGED_CHARS = 256  # of a token whose merges are not in the file; the longest in use are runs of 128 spaces
SPACE = "\u2581"  # stands for a space in sentencepiece's vocabularies
_PREFIX_IN_JSON = re.compile(rf',{{"type":"Replace","pattern":{{"Regex":"\\\\A(?:[^"\\]|\\.)*"}},"content":"{SPACE}"}}')


class PreTokenizer(NamedTuple):
    """How a family of byte-level tokenizers splits text before merging."""

    patterns: tuple[str, ...]  # applied in order, each to the pieces of the one before
    ignore_merges: bool = False  # a piece that is in the vocabulary is not merged
    add_bos: bool = False  # default if the file does not set it


_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD_END = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r"[\p{Lu}\p{Ll}\p{Lt}]"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_WORD_END}"
QWEN2 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_WORD_END}"
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_WORD_END}"
)
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_WORD_END}"
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_WORD_END}"
)
_DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_WORD_END}"
)
_CJK = r"[\x{4E00}-\x{9FA5}\x{0800}-\x{4E00}\x{AC00}-\x{D7FF}]+"

_PRE_TOKENIZERS = {  # values of tokenizer.ggml.pre that share a pre-tokenizer -> the pre-tokenizer
    ("default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "gigachat", "mellum"): PreTokenizer(
        (_GPT2,)
    ),
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"): PreTokenizer(
        (r"\p{N}", _GPT2)
    ),
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"): PreTokenizer(
        (LLAMA3,), ignore_merges=True, add_bos=True
    ),
    ("falcon",): PreTokenizer((r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9][0-9][0-9]")),
    ("dbrx", "smaug-bpe", "chatglm-bpe"): PreTokenizer((LLAMA3,)),
    ("glm4", "glm5"): PreTokenizer((LLAMA3,), ignore_merges=True),
    ("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez", "solar-open", "grok-2", "kormo"): PreTokenizer(
        (QWEN2,)
    ),
    ("qwen35",): PreTokenizer((_QWEN35,)),
    ("tekken",): PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    ("gpt-4o", "llama4", "kanana2", "minimax-m2"): PreTokenizer((_GPT4O,)),
    ("deepseek-llm",): PreTokenizer(
        (r"[\r\n]", rf"\s?{_CASED}+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _CJK, r"\p{N}")
    ),
    ("deepseek-coder",): PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")),
    ("deepseek-v3", "hunyuan-dense", "joyai-llm"): PreTokenizer(
        (r"\p{N}{1,3}", r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+", _DEEPSEEK_V3)
    ),
}
PRE_TOKENIZERS = {name: pre_tokenizer for names, pre_tokenizer in _PRE_TOKENIZERS.items() for name in names}


class GGUFVocabulary:
    """The tokenizer keys of a GGUF file's metadata, validated. ValueErrors name the file and the key."""

    def __init__(self, metadata: Mapping[str, Any], source: str) -> None:
        self._metadata = metadata
        self._source = source
        self.algorithm = self.text("tokenizer.ggml.model") or "missing"
        self.tokens: list[str] = self._list("tokenizer.ggml.tokens", str)
        self.token_types: Sequence[int] = self._numbers("tokenizer.ggml.token_type") or [1] * len(self.tokens)

    def error(self, key: str, problem: str) -> ValueError:
        return ValueError(f"{self._source}: {key}: {problem}")

    def text(self, key: str) -> str | None:
        value = self._metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, "must be a string")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self._metadata.get(f"tokenizer.ggml.{name}", default)
        if not isinstance(value, bool):
            raise self.error(f"tokenizer.ggml.{name}", "must be true or false")
        return value

    def named_token(self, name: str) -> str | None:
        """Return the text of the token whose id is stored under a name such as bos, eos or unknown."""
        key = f"tokenizer.ggml.{name}_token_id"
        token_id = self._metadata.get(key)
        if token_id is None:
            return None
        if not isinstance(token_id, int) or not 0 <= token_id < len(self.tokens):
            raise self.error(key, f"must be a token id below {len(self.tokens)}, not {token_id!r}")
        return self.tokens[token_id]

    def merges(self) -> list[tuple[str, str]] | None:
        if "tokenizer.ggml.merges" not in self._metadata:
            return None
        merges: list[tuple[str, str]] = []
        for index, merge in enumerate(self._list("tokenizer.ggml.merges", str)):
            left, space, right = merge.partition(" ")
            if not space or " " in right:
                raise self.error("tokenizer.ggml.merges", f"merge {index} is not two tokens separated by a space")
            merges.append((left, right))
        return merges

    def scores(self) -> Sequence[float]:
        scores = self._numbers("tokenizer.ggml.scores")
        if not scores:
            raise self.error("tokenizer.ggml.scores", "are missing, and there are no merges either")
        return scores

    def _list(self, key: str, kind: type) -> list[Any]:
        value = self._metadata.get(key)
        if not isinstance(value, list) or not value or not isinstance(value[0], kind):
            raise self.error(key, "must be a non-empty array of strings")
        return value

    def _numbers(self, key: str) -> "array[Any] | None":
        value = self._metadata.get(key)
        if value is not None and (not isinstance(value, array) or len(value) != len(self.tokens)):
            raise self.error(key, f"must be an array of {len(self.tokens)} numbers, one for each token")
        return value


def build_tokenizer(vocabulary: GGUFVocabulary, *, architecture: str) -> tokenizers.Tokenizer:
    """Build the tokenizer of a vocabulary, including its special tokens.

    Raises:
        ValueError: the algorithm is unknown, or the merges do not fit the vocabulary.
    """
    if vocabulary.algorithm == "gpt2":
        tokenizer, add_bos = _byte_level_bpe(vocabulary)
    elif vocabulary.algorithm in ("llama", "gemma4"):
        tokenizer = _sentencepiece_bpe(vocabulary, is_gemma=architecture.startswith("gemma"))
        # Gemma 4's files set add_bos_token, but its chat template writes the token itself.
        add_bos = vocabulary.algorithm == "llama" and vocabulary.flag("add_bos_token", True)
    else:
        problem = f"{vocabulary.algorithm!r} is not supported (supported: gpt2, llama, gemma4)"
        raise vocabulary.error("tokenizer.ggml.model", problem)
    _add_tokens(tokenizer, vocabulary)
    bos_token = vocabulary.named_token("bos") if add_bos else None
    eos_token = vocabulary.named_token("eos") if vocabulary.flag("add_eos_token", False) else None
    add_template(tokenizer, bos_token, eos_token)
    return tokenizer


def add_template(tokenizer: tokenizers.Tokenizer, bos_token: str | None, eos_token: str | None) -> None:
    """Let `add_special_tokens` put these tokens around a text."""
    pieces = [bos_token, "$A", eos_token]
    ids = [(token, tokenizer.token_to_id(token)) for token in (bos_token, eos_token) if token is not None]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[piece for piece in pieces if piece is not None], special_tokens=ids
    )


def _byte_level_bpe(vocabulary: GGUFVocabulary) -> tuple[tokenizers.Tokenizer, bool]:
    """Return the tokenizer, and whether it prepends the BOS token to a text.

    `add_space_prefix` is ignored, as llama.cpp does for byte-level BPE.
    """
    name = vocabulary.text("tokenizer.ggml.pre") or "default"
    if name not in PRE_TOKENIZERS:
        logger.warning("unknown pre-tokenizer %r (tokenizer.ggml.pre): splitting text as GPT-2 does", name)
    pre_tokenizer = PRE_TOKENIZERS.get(name, PRE_TOKENIZERS["default"])
    merges = vocabulary.merges()
    if merges is None:
        raise vocabulary.error("tokenizer.ggml.merges", "are missing")
    tokenizer = _bpe(vocabulary, vocabulary.tokens, merges, ignore_merges=pre_tokenizer.ignore_merges)
    split_into_bytes(tokenizer, pre_tokenizer.patterns)
    return tokenizer, vocabulary.flag("add_bos_token", pre_tokenizer.add_bos)


def split_into_bytes(tokenizer: tokenizers.Tokenizer, patterns: Sequence[str]) -> None:
    """Let a tokenizer split text by patterns, and write the bytes of the pieces as characters."""
    splits: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns
    ]
    splits.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.ByteLevel()


def _sentencepiece_bpe(vocabulary: GGUFVocabulary, *, is_gemma: bool) -> tokenizers.Tokenizer:
    tokens = vocabulary.tokens
    if is_gemma:  # stores runs of spaces as spaces, but U+2581 in all other tokens
        tokens = [SPACE * len(token) if token.strip(" ") == "" else token for token in tokens]
    merges = vocabulary.merges()
    if merges is None:
        # Gemma's merges are ranked by the token ids of their results, not by the scores.
        ranks = [-index for index in range(len(tokens))] if is_gemma else vocabulary.scores()
        merges = rebuild_merges(tokens, vocabulary.token_types, ranks)
    unknown = vocabulary.named_token("unknown")
    tokenizer = _bpe(vocabulary, tokens, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    add_space_prefix = not is_gemma and vocabulary.flag("add_space_prefix", True)
    prefix = [normalizers.Prepend(SPACE)] if add_space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = sentencepiece_decoder(add_space_prefix)
    return tokenizer


def sentencepiece_decoder(add_space_prefix: bool) -> decoders.Decoder:
    strip = [decoders.Strip(" ", left=1)] if add_space_prefix else []
    return decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])


def _bpe(
    vocabulary: GGUFVocabulary, tokens: list[str], merges: list[tuple[str, str]], **options: Any
) -> tokenizers.Tokenizer:
    vocab = {token: index for index, token in enumerate(tokens)}
    try:
        return tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, **options))
    except Exception as error:  # the library raises plain Exception
        raise vocabulary.error("tokenizer.ggml.merges", f"do not fit the vocabulary ({error})") from error


def rebuild_merges(tokens: Sequence[str], token_types: Sequence[int], ranks: Sequence[float]) -> list[tuple[str, str]]:
    """Return every way to merge two tokens into a third, by descending rank of the result, longer left halves first.

    Raises:
        ValueError: a token is so long that trying every cut would be slow.
    """
    pieces = {
        token: rank
        for token, token_type, rank in zip(tokens, token_types, ranks, strict=True)
        if token_type not in (UNKNOWN, CONTROL, BYTE)
    }
    if (longest := max(map(len, pieces), default=0)) > MAX_MERGED_CHARS:
        raise ValueError(f"a token of {longest} characters without merges (supported are {MAX_MERGED_CHARS})")
    merges = [
        (rank, cut, token)
        for token, rank in pieces.items()
        for cut in range(1, len(token))
        if token[:cut] in pieces and token[cut:] in pieces
    ]
    merges.sort(key=lambda merge: (merge[0], merge[1], len(merge[2]) - merge[1]), reverse=True)
    return [(token[:cut], token[cut:]) for _, cut, token in merges]


def _add_tokens(tokenizer: tokenizers.Tokenizer, vocabulary: GGUFVocabulary) -> None:
    """Add the tokens that are matched in a text as a whole: control tokens are special, user-defined ones are not."""
    typed = [
        (token, token_type)
        for token, token_type in zip(vocabulary.tokens, vocabulary.token_types, strict=True)
        if token_type in (UNKNOWN, CONTROL, USER_DEFINED) and tokenizer.token_to_id(token) is not None
    ]
    special = [AddedToken(token, special=True, normalized=False) for token, kind in typed if kind != USER_DEFINED]
    plain = [AddedToken(token, special=False, normalized=False) for token, kind in typed if kind == USER_DEFINED]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)


def byte_alphabet() -> dict[str, int]:
    """Return the characters that represent bytes in byte-level vocabularies, with their bytes (GPT-2's encoding).

    Printable characters of Latin-1 represent themselves; the other bytes are mapped to U+0100 and up.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)).difference(printable))
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


def without_prefix(tokenizer_json: str) -> str:
    """Return a tokenizer.json that puts no space before a text, if it did so with regard to symbols.

    llguidance encodes text that continues other text, and leaves out only a plain `Prepend` itself.
    """
    return _PREFIX_IN_JSON.sub("", tokenizer_json, count=1)
