"""Which file of a folder the tokenizer is read from, and what the configuration adds to it.

The kinds of files are tested in test_tokenizer.py, test_sentencepiece_tokenizer.py and test_tiktoken_tokenizer.py.
"""

import base64
import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models

from server.text.folder_tokenizer import load_folder

RANKS = b"".join(b"%s %d\n" % (base64.b64encode(bytes([byte])), byte) for byte in range(256))


def write_tokenizer_json(folder: Path) -> None:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "<s>": 1}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))


def test_tokenizer_json_comes_first(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(RANKS)
    assert load_folder(tmp_path)[1].vocab_size == 256
    write_tokenizer_json(tmp_path)
    assert load_folder(tmp_path)[1].vocab_size == 2


def test_the_config_completes_other_files(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(RANKS)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<e>", "bos_token": None}))
    added = {"256": {"content": "<e>", "special": True}, "257": {"content": "<b>"}}
    config = {"added_tokens_decoder": added, "chat_template": "{{ messages }}", "bos_token": {"content": "<b>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    backend, loaded = load_folder(tmp_path)
    assert (loaded.bos_token, loaded.eos_token, loaded.vocab_size) == ("<b>", "<e>", 258)
    assert loaded.chat_template == "{{ messages }}"
    assert backend.encode("a<e>").ids == [257, ord("a"), 256]


def test_a_bos_token_that_is_not_in_the_vocabulary_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(RANKS)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<nope>", "add_eos_token": True}))
    assert load_folder(tmp_path)[0].encode("a").ids == [ord("a")]


def test_an_added_token_far_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x04\x0a\x02hi")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<x>": 10**6}))
    with pytest.raises(ValueError, match=r"the added token 1000000 is far beyond the 1 of tokenizer\.model"):
        load_folder(tmp_path)
