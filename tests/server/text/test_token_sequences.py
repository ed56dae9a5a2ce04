"""The token sequences of words and of sequence breakers."""

import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

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
    assert word_sequences(merged, "bad")[0] == merged.encode("bad") != merged.encode(" bad")


def test_a_space_is_a_word_too(merged: Tokenizer) -> None:
    assert [merged.decode(ids) for ids in word_sequences(merged, "  ")] == [" "]


@pytest.mark.parametrize("breaker", ["\n", ":", "##", "\n\n", "word", ", bad"])
def test_a_text_ends_with_a_sequence_where_it_comes_to_hold_the_breaker(merged: Tokenizer, breaker: str) -> None:
    """No breaker is missed in texts in which it is tokenized as it is alone, and none is found where there is none."""
    print("seed 3")
    rng = random.Random(3)
    breakers = SequenceBreakers(merged).find([breaker])
    sequences = set().union(*breakers.values())
    assert all(len(sequence) == length for length, some in breakers.items() for sequence in some)
    assert all(breaker in merged.decode(sequence) for sequence in sequences)
    for _ in range(200):
        before = "".join(rng.choices("ab dw#:\nor", k=rng.randrange(6)))
        ids = [*merged.encode(before), *merged.encode(breaker)]
        assert any(
            tuple(ids[end - length : end]) in some
            for length, some in breakers.items()
            for end in range(length, len(ids) + 1)
        ), ids


def test_breakers_of_several_strings_are_put_together(merged: Tokenizer) -> None:
    breakers = SequenceBreakers(merged)
    both = breakers.find([":", "\n"])
    assert both[1] == breakers.find([":"])[1] | breakers.find(["\n"])[1]
    assert breakers.find([]) == {}


def test_real_vocabulary(smollm2_path: Path) -> None:
    tokenizer = Tokenizer.from_model(smollm2_path)
    found = SequenceBreakers(tokenizer).find(["\n", ":", '"', "*"])
    assert set(found) == {1}
    for text in ("\n", "\n\n", ":", '"', "*", "**", '."', ":\n"):
        assert tuple(tokenizer.encode(text)[-1:]) in found[1]
    assert tuple(tokenizer.encode(" word")) not in found[1]
