"""The token sequences of words and of sequence breakers."""

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from engine.shared.messages import SequenceBreaker
from server.text.token_sequences import SequenceBreakers, word_sequences
from server.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Return a tokenizer with a byte-level vocabulary and merges trained on a few words."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    texts = ["bad word, bad words: sword fights\n\n", "the end: over and out::\n", "a\nb\n\nc ### head ##\n"]
    backend.train_from_iterator(texts * 9, trainer)
    folder = tmp_path_factory.mktemp("merged")
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.from_model(folder)


def test_a_word_is_encoded_at_the_start_and_after_a_space(merged: Tokenizer) -> None:
    for word in ("bad", " bad", "word", "bad word", "zebra"):
        found = [merged.decode(ids) for ids in word_sequences(merged, word)]
        assert found == [word.strip(), f" {word.strip()}"]
    assert [merged.decode(ids) for ids in word_sequences(merged, "  ")] == [" "]  # a space is a word, too
    assert word_sequences(merged, "bad")[0] == merged.encode("bad") != merged.encode(" bad")


class Counting:
    """A tokenizer that counts the tokens that are read and the texts that are encoded."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.vocab_size, self.num_read, self.num_encoded = tokenizer.vocab_size, 0, 0
        self._tokenizer = tokenizer

    def token_bytes(self, token_id: int) -> bytes:
        self.num_read += 1
        return self._tokenizer.token_bytes(token_id)

    def encode(self, text: str, **options: Any) -> list[int]:
        self.num_encoded += 1
        return self._tokenizer.encode(text, **options)


def expanded(breakers: Iterable[SequenceBreaker]) -> set[tuple[int, ...]]:
    return {(first, *breaker.rest) for breaker in breakers for first in breaker.first_ids}


def searched(tokenizer: Tokenizer, vocabulary: Sequence[bytes], string: str) -> set[tuple[int, ...]]:
    """Return the sequences of a string by a pass over the vocabulary for each of its prefixes."""
    found: set[tuple[int, ...]] = set()
    for token_id, token in enumerate(vocabulary):
        if string.encode() in token:
            found.add((token_id,))
            continue
        for cut in range(1, len(string)):
            if token.endswith(string[:cut].encode()):
                rest = tokenizer.encode(string[cut:], add_special_tokens=False, parse_special=False)
                found.add((token_id, *rest))
    return found


def test_the_sequences_are_those_of_a_pass_over_the_vocabulary(merged: Tokenizer) -> None:
    """Also of characters of several bytes, which tokens have parts of."""
    print("seed 4")
    rng = random.Random(4)
    breakers = SequenceBreakers(merged)
    vocabulary = [merged.token_bytes(token_id) for token_id in range(merged.vocab_size)]
    for _ in range(100):
        strings = ["".join(rng.choices("abdwor :\n#,é€😀Ā", k=rng.randrange(1, 9))) for _ in range(3)]
        found = breakers.find(strings)
        assert expanded(found) == set().union(*(searched(merged, vocabulary, string) for string in strings)), strings
        assert sum(len(breaker.first_ids) for breaker in found) == len(expanded(found)), strings
        assert all(sorted(breaker.first_ids) == list(breaker.first_ids) for breaker in found)
    assert breakers.find([]) == ()


def test_the_vocabulary_is_read_once_however_many_strings_there_are(merged: Tokenizer) -> None:
    """And what has been found is kept up to a size, the latest first."""
    tokenizer = Counting(merged)
    breakers = SequenceBreakers(cast("Tokenizer", tokenizer))
    breakers._found.max_bytes = 4000
    for number in range(300):
        breakers.find([f"w{number}", "\n"])
    assert tokenizer.num_read == merged.vocab_size
    assert breakers._found.num_bytes <= 4000
    num_encoded = tokenizer.num_encoded
    breakers.find(["\n", "w299"])
    assert tokenizer.num_encoded == num_encoded > 0


def test_real_vocabulary(smollm2_path: Path) -> None:
    tokenizer = Tokenizer.from_model(smollm2_path)
    found = expanded(SequenceBreakers(tokenizer).find(["\n", ":", '"', "*"]))
    for text in ("\n", "\n\n", ":", '"', "*", "**", '."', ":\n"):
        assert tuple(tokenizer.encode(text)[-1:]) in found
    assert tuple(tokenizer.encode(" word")) not in found
