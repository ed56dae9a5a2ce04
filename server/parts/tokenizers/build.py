"""Build the tokenizer of a folder without tokenizer.json: of tekken.json, tokenizer.model or ranks of tiktoken.

Those of sentencepiece (https://github.com/google/sentencepiece) are BPE or unigram; the others are byte-level BPE that
ranks merges by the token ids of their results.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from engine.config.tokenizer_files import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, read_added_tokens
from engine.parts.tokenizers.files import (
    Piece,
    SentencePieceModel,
    is_tiktoken,
    read_sentencepiece,
    read_tekken,
    read_tiktoken,
)
from server.text.gguf_tokenizer import (
    LLAMA3,
    SPACE,
    add_template,
    byte_alphabet,
    rebuild_merges,
    sentencepiece_decoder,
    split_into_bytes,
)
from server.text.tokenizer import token_text

# The patterns of models whose files of ranks do not come with one, as transformers has them.
TIKTOKEN_PATTERNS = {"tokenizer.model": LLAMA3}

MAX_ADDED_TOKENS = 100_000  # beyond the vocabulary of sentencepiece
UNMATCHED = (UNKNOWN, CONTROL, UNUSED, BYTE)  # pieces that a text does not become by its characters

# What means something else in the regular expressions of the tokenizers library (Oniguruma) than in tiktoken's.
_REPEATED_COUNT = re.compile(r"\{\d+(,\d*)?\}\+")
_ANCHOR = re.compile(r"(?<!\\)[$^]")  # outside a character class


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
    backend = _byte_level_bpe(model.ranks, others, model.pattern, str(path), first_id=len(others))
    added = {token_id: AddedToken(text, special=True, normalized=False) for token_id, text in others.items()}
    return _BuiltTokenizer(backend, added, "<s>", "</s>")


def _build_tiktoken(path: Path, added: dict[int, AddedToken], config: Mapping[str, Any]) -> _BuiltTokenizer:
    ranks = read_tiktoken(path)
    pattern = config.get("pat_str", TIKTOKEN_PATTERNS.get(path.name))
    if not isinstance(pattern, str):
        raise ValueError(
            f"{path}: the pattern that splits text is missing: set `pat_str` in tokenizer_config.json "
            f"(known without it: {', '.join(TIKTOKEN_PATTERNS)})"
        )
    others = {token_id: token.content for token_id, token in added.items()}
    return _BuiltTokenizer(_byte_level_bpe(ranks, others, pattern, str(path)), added)


def _byte_level_bpe(
    ranks: Mapping[bytes, int], others: Mapping[int, str], pattern: str, source: str, *, first_id: int = 0
) -> tokenizers.Tokenizer:
    """Build a tokenizer whose token ids are the ranks plus `first_id`.

    Args:
        ranks: the rank of each token.
        others: tokens that are not made by merging, by id. They are in the vocabulary, but not yet matched in a text.
        pattern: regular expression that splits text before merging.
        source: the file that the pattern is from, for messages.
        first_id: the token id of rank 0.

    Raises:
        ValueError: the pattern is not supported.
    """
    texts = re.split(r"([\[\]])", pattern)
    outside = " ".join(text for text, end in zip(texts[::2], [*texts[1::2], ""], strict=True) if end != "]")
    if match := _REPEATED_COUNT.search(pattern) or _ANCHOR.search(outside):
        raise ValueError(f"{source}: the pattern {pattern!r} is not supported, because of {match.group()!r}")
    spelling = {byte: character for character, byte in byte_alphabet().items()}
    other_ids = {token: token_id for token_id, token in others.items()}
    spelled = {"".join(map(spelling.__getitem__, token)): rank + first_id for token, rank in ranks.items()}
    spelled = {
        token: token_id for token, token_id in spelled.items() if token not in other_ids and token_id not in others
    }
    merges = rebuild_merges(list(spelled), [NORMAL] * len(spelled), [-token_id for token_id in spelled.values()])
    vocab = spelled | other_ids
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    split_into_bytes(tokenizer, [pattern])
    return tokenizer


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
    backend = _pieces_tokenizer(model, pieces, str(path), prefix_once=config.get("legacy") is False)
    bos, eos = (pieces[index].text if 0 <= index < len(pieces) else None for index in (model.bos_id, model.eos_id))
    return _BuiltTokenizer(backend, _added_pieces(model, pieces) | added, bos, eos)


def _pieces_tokenizer(
    model: SentencePieceModel, pieces: Sequence[Piece], source: str, *, prefix_once: bool
) -> tokenizers.Tokenizer:
    """Build the tokenizer of a model whose pieces are replaced by `pieces`, which may be more.

    `_added_pieces` must be added to it. The space before a text is put before each part between special tokens, or with
    `prefix_once` only before the first. Rules of normalisation (NFKC) are those of the library, which differ for some
    sequences of combining characters. In a unigram model, unknown characters on both sides of the start of a special
    token's text become two tokens instead of one.

    Raises:
        ValueError: the file has a property that is not supported. The message begins with `source`.
    """
    if model.algorithm not in ("bpe", "unigram"):
        raise ValueError(f"{source}: the algorithm {model.algorithm} is not supported (supported: bpe, unigram)")
    if model.treat_whitespace_as_suffix or not model.escape_whitespaces:
        name = "escape_whitespaces=false" if not model.escape_whitespaces else "treat_whitespace_as_suffix=true"
        raise ValueError(f"{source}: {name} is not supported")
    tokenizer = tokenizers.Tokenizer(_bpe(model, pieces) if model.algorithm == "bpe" else _unigram(model, pieces))
    matched = [] if model.algorithm == "unigram" else [piece.text for piece in pieces if piece.type == USER_DEFINED]
    has_prefix = model.add_dummy_prefix
    tokenizer.normalizer = normalizers.Sequence(_normalizers(model, matched, has_prefix and not prefix_once))
    splits: list[pre_tokenizers.PreTokenizer] = []
    if has_prefix and prefix_once:
        splits.append(pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False))
    if model.algorithm == "unigram":
        splits.append(pre_tokenizers.Split(_start_of_unmatched(pieces), "isolated"))
    if splits:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = sentencepiece_decoder(has_prefix)
    return tokenizer


def _added_pieces(model: SentencePieceModel, pieces: Sequence[Piece]) -> dict[int, AddedToken]:
    """Return the pieces that are matched in a text as a whole, by id: special tokens, and the user's symbols in BPE.

    Symbols are matched after normalisation, as sentencepiece does, so that a text has its space before them. In a
    unigram model they compete with other pieces.
    """
    types = (UNKNOWN, CONTROL) if model.algorithm == "unigram" else (UNKNOWN, CONTROL, USER_DEFINED)
    return {
        index: AddedToken(piece.text, special=piece.type != USER_DEFINED, normalized=piece.type == USER_DEFINED)
        for index, piece in enumerate(pieces)
        if piece.type in types
    }


def _bpe(model: SentencePieceModel, pieces: Sequence[Piece]) -> models.BPE:
    tokens = [piece.text for piece in pieces]
    types = [CONTROL if piece.type == UNUSED else piece.type for piece in pieces]
    return models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=rebuild_merges(tokens, types, [piece.score for piece in pieces]),
        unk_token=tokens[model.unk_id],
        fuse_unk=True,
        byte_fallback=_has_bytes(pieces),
    )


def _unigram(model: SentencePieceModel, pieces: Sequence[Piece]) -> models.Unigram:
    highest = max((piece.score for piece in pieces if piece.type == NORMAL), default=0.0)

    def score(piece: Piece) -> float:
        if piece.type == USER_DEFINED:
            return 0.1 * (len(piece.text.encode()) - 1)  # as in sentencepiece since 0.2.2
        # Of pieces that are not matched it must not be the lowest, from which the library derives that of unknown ones.
        return highest if piece.type in UNMATCHED else piece.score

    return models.Unigram([(piece.text, score(piece)) for piece in pieces], model.unk_id, _has_bytes(pieces))


def _has_bytes(pieces: Sequence[Piece]) -> bool:
    return any(piece.type == BYTE for piece in pieces)


def _normalizers(model: SentencePieceModel, matched: Sequence[str], has_prefix: bool) -> list[normalizers.Normalizer]:
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps.append(normalizers.Replace(" ", SPACE))
    if has_prefix and not matched:
        steps.append(normalizers.Prepend(SPACE))
    elif has_prefix:
        # The library normalises the symbols themselves too, to find them in normalised text: those have no prefix.
        alone = "|".join(re.escape(text) for text in matched)
        steps.append(normalizers.Replace(Regex(rf"\A(?!\z|(?:{alone})\z)"), SPACE))
    return steps


def _start_of_unmatched(pieces: Sequence[Piece]) -> Regex:
    """Return a pattern of the first character of each text that the library's unigram model must not find."""
    texts = [piece.text for piece in pieces if piece.type in UNMATCHED and len(piece.text) > 1]
    return Regex("|".join(f"{re.escape(text[0])}(?={re.escape(text[1:])})" for text in texts) or r"(?!)")
