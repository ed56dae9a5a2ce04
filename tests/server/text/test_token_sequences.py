"""The token sequences of words and of sequence breakers."""

import random
from collections.abc import Iterable, Sequence
from unittest.mock import Mock

import pytest

from engine.shared.messages import SequenceBreaker
from server.text.token_sequences import SequenceBreakers, word_sequences
from server.text.tokenizer import Tokenizer
from tests.support.trained_tokenizers import byte_level_bpe


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Return a tokenizer with a byte-level vocabulary and merges trained on a few words."""
    texts = ["bad word, bad words: sword fights\n\n", "the end: over and out::\n", "a\nb\n\nc ### head ##\n"]
    folder = tmp_path_factory.mktemp("merged")
    byte_level_bpe(texts * 9, 330).save(str(folder / "tokenizer.json"))
    return Tokenizer.from_model(folder)


def test_a_word_is_encoded_at_the_start_and_after_a_space(merged: Tokenizer) -> None:
    for word in ("bad", " bad", "word", "bad word", "zebra"):
        found = [merged.decode(ids) for ids in word_sequences(merged, word)]
        assert found == [word.strip(), f" {word.strip()}"]
    assert [merged.decode(ids) for ids in word_sequences(merged, "  ")] == [" "]  # a space is a word, too
    assert word_sequences(merged, "bad")[0] == merged.encode("bad") != merged.encode(" bad")


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


def test_the_sequences_are_those_of_a_pass_over_the_vocabulary(merged: Tokenizer, rng: random.Random) -> None:
    """Also of characters of several bytes, which tokens have parts of."""
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
    tokenizer = Mock(wraps=merged, vocab_size=merged.vocab_size)
    breakers = SequenceBreakers(tokenizer)
    breakers._found.max_bytes = 4000
    for number in range(300):
        breakers.find([f"w{number}", "\n"])
    assert tokenizer.token_bytes.call_count == merged.vocab_size
    assert breakers._found.num_bytes <= 4000
    tokenizer.encode.reset_mock()
    breakers.find(["\n", "w299"])
    tokenizer.encode.assert_not_called()
    breakers.find(["w0"])
    tokenizer.encode.assert_called()
