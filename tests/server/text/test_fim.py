"""Prompts with fill-in-the-middle tokens, against prompts written by hand as the models' papers and cards have them."""

from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import CodeLlamaTokenizer

from server.text.fim import MARKERS, FIMTokens
from server.text.tokenizer import Tokenizer
from tests.server.text.test_gguf_tokenizer import byte_level_metadata, write
from tests.support.tiny_tokenizer_model import VOCAB_SIZE, write_tiny_model


def with_tokens(folder: Path, *tokens: str) -> Tokenizer:
    """Return the tokenizer of bytes with further special tokens, from id VOCAB_SIZE on."""
    return Tokenizer.from_model(write_tiny_model(folder, *tokens))


@pytest.mark.parametrize("markers", MARKERS)
def test_tokens_are_found_by_name(tmp_path: Path, markers: tuple[str, str, str, bool]) -> None:
    *names, is_suffix_first = markers
    fim = with_tokens(tmp_path, *names).fim
    assert fim is not None
    assert is_suffix_first == (names[0] == "<[fim-prefix]>")  # of Seed-Coder
    prefix, suffix, middle = range(VOCAB_SIZE, VOCAB_SIZE + 3)
    first = [suffix, *b"cd", prefix, *b"ab"] if is_suffix_first else [prefix, *b"ab", suffix, *b"cd"]
    assert fim.join([*b"ab"], [*b"cd"]) == [*first, middle]


def test_models_without_all_three_tokens(tmp_path: Path, smollm2_path: Path) -> None:
    assert with_tokens(tmp_path, "<fim_prefix>", "<fim_suffix>", "<|fim_middle|>").fim is None
    assert Tokenizer.from_model(smollm2_path).fim is None


@pytest.mark.parametrize("keys", [("fim_pre", "fim_suf", "fim_mid"), ("prefix", "suffix", "middle")])
def test_keys_of_gguf_files(keys: tuple[str, ...], tmp_path: Path) -> None:
    named = {f"{name}_token_id": number for name, number in zip(keys, (11, 12, 13), strict=True)}
    tokenizer = Tokenizer.from_model(write(tmp_path, byte_level_metadata(**named)))
    assert tokenizer.fim == FIMTokens(11, 12, 13, is_suffix_first=False)
    prompt = tokenizer.fim.join(
        tokenizer.encode_plain("def add("), tokenizer.encode_plain(" the", is_continuation=True)
    )
    assert prompt == [11, *tokenizer.encode("def add("), 12, *tokenizer.encode(" the"), 13]


def test_code_llama(tmp_path: Path) -> None:
    """As Meta's code: the prefix begins with a space, as every text, but the suffix does not."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *map(chr, range(33, 127)), "▁a", "▁ab"]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(["<unk>", "<s>", "</s>", *pieces]))}
    merges: Any = [("▁", "a"), ("▁a", "b")]
    CodeLlamaTokenizer(vocab=vocab, merges=merges).save_pretrained(tmp_path)
    tokenizer = Tokenizer.from_model(tmp_path)
    assert tokenizer.fim is not None
    ids = tokenizer.fim.join(tokenizer.encode_plain("ab("), tokenizer.encode_plain("ab\n", is_continuation=True))
    expected = ["▁<PRE>", "▁ab", "(", "▁<SUF>", "a", "b", "<0x0A>", "▁<MID>"]
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert [backend.id_to_token(token_id) for token_id in ids] == expected
