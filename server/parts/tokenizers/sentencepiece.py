"""Build a tokenizer from a model file of sentencepiece, BPE or unigram (https://github.com/google/sentencepiece)."""

import re
from collections.abc import Sequence

import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from engine.config.tokenizer_files import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from engine.parts.tokenizers.files import Piece, SentencePieceModel
from server.text.gguf_tokenizer import SPACE, rebuild_merges, sentencepiece_decoder

UNMATCHED = (UNKNOWN, CONTROL, UNUSED, BYTE)  # pieces that a text does not become by its characters


def build_sentencepiece(
    model: SentencePieceModel, pieces: Sequence[Piece], source: str, *, prefix_once: bool
) -> tokenizers.Tokenizer:
    """Build the tokenizer of a model whose pieces are replaced by `pieces`, which may be more.

    `added_pieces` must be added to it. The space before a text is put before each part between special tokens, or with
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


def added_pieces(model: SentencePieceModel, pieces: Sequence[Piece]) -> dict[int, AddedToken]:
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
