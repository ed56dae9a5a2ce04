"""Vocabularies of real models in GGUF files: token ids are those of llama.cpp."""

import pytest

from tests.support.pruned_vocabulary import FOLDER, load, tokenizer_of

NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))


@pytest.mark.parametrize("name", NAMES)
def test_token_ids_are_those_of_llama_cpp(name: str) -> None:
    metadata, cases = load(name)
    tokenizer = tokenizer_of(metadata, name)
    assert len(cases) >= 46
    encoded = [(text, tokenizer.encode(text, add_special_tokens=False).ids) for text, _ in cases]
    assert encoded == cases
    assert [tokenizer.decode(token_ids) for _, token_ids in cases] == [text for text, _ in cases]
