"""Small tokenizers that tests train, and the text of their tokens as it is streamed."""

import base64
import io
from collections.abc import Iterable, Sequence
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from server.text.choice_text import Detokenizer
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


def sentencepiece_model(lines: Iterable[str], **options: Any) -> bytes:
    model = io.BytesIO()
    options = {"vocab_size": 300, "hard_vocab_limit": False, "minloglevel": 2} | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **options)
    return model.getvalue()


def tekken(**parts: Any) -> dict[str, Any]:
    """Return a tokenizer of mistral-common with the 256 bytes and 20 special tokens, as JSON."""
    vocab = [{"rank": byte, "token_bytes": base64.b64encode(bytes([byte])).decode()} for byte in range(256)]
    config = {"pattern": r"\s+|\S+", "default_vocab_size": 276, "default_num_special_tokens": 20}
    return {"config": config, "vocab": vocab, **parts}


def streamed_text(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    detokenizer = Detokenizer(tokenizer)
    return "".join(map(detokenizer.push, token_ids)) + detokenizer.flush()
