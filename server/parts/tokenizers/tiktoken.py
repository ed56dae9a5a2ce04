"""Build a tokenizer from ranks of tiktoken: byte-level BPE that ranks merges by the token ids of their results."""

import re
from collections.abc import Mapping

import tokenizers
from tokenizers import models

from engine.config.tokenizer_files import NORMAL
from server.text.gguf_tokenizer import byte_alphabet, rebuild_merges, split_into_bytes

# What means something else in the regular expressions of the tokenizers library (Oniguruma) than in tiktoken's.
_REPEATED_COUNT = re.compile(r"\{\d+(,\d*)?\}\+")
_ANCHOR = re.compile(r"(?<!\\)[$^]")  # outside a character class


def build_tiktoken(
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
