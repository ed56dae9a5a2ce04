"""Small tokenizers that tests train, and the text of their tokens as it is streamed."""

from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from server.text.detokenizer import Detokenizer
from server.text.tokenizer import Tokenizer


def byte_level_bpe(texts: Iterable[str], vocab_size: int, special: Sequence[str] = ()) -> tokenizers.Tokenizer:
    """Train byte-level BPE whose vocabulary has the special tokens and all bytes."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=list(special), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def streamed_text(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    detokenizer = Detokenizer(tokenizer)
    return "".join(detokenizer.push([token_id]) for token_id in token_ids) + detokenizer.flush()
