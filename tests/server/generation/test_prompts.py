"""Truncation of prompts, and checks that a prompt and its answer fit the context."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from server.generation.prompts import MAX_TOKEN_BYTES, check_text_size, fit_max_tokens
from server.http.errors import BadRequestError, ContextLengthExceededError
from tests.server.generation.test_parameters import prompt_ids
from tests.support.clients import CHAT, COMPLETIONS, ask, ask_json, shared_server
from tests.support.serving import RunningServer, check_error
from tests.support.tiny_tokenizer_model import IM_START, IM_START_ID, VOCAB_SIZE, write_tiny_model

MAX_MODEL_LEN = 2048


@given(
    max_tokens=st.none() | st.integers(-1, 30),
    num_prompt_tokens=st.integers(1, 30),
    max_model_len=st.integers(1, 20),
    is_strict=st.booleans(),
)
def test_what_fits_is_never_changed(
    max_tokens: int | None, num_prompt_tokens: int, max_model_len: int, is_strict: bool
) -> None:
    room = max_model_len - num_prompt_tokens
    least = 1 if max_tokens in (None, -1) else max_tokens if is_strict else min(max_tokens, 1)
    if least > room:
        with pytest.raises(ContextLengthExceededError) as caught:
            fit_max_tokens(max_tokens, num_prompt_tokens, max_model_len, "prompt", is_strict=is_strict)
        assert str(num_prompt_tokens) in caught.value.message
        assert str(max_model_len) in caught.value.message
        return
    fitted = fit_max_tokens(max_tokens, num_prompt_tokens, max_model_len, "prompt", is_strict=is_strict)
    assert fitted == (room if max_tokens in (None, -1) else min(max_tokens, room))


def test_cap_of_a_texts_size() -> None:
    check_text_size(8 * MAX_TOKEN_BYTES, 8, "prompt")
    with pytest.raises(BadRequestError) as caught:
        check_text_size(8 * MAX_TOKEN_BYTES + 1, 8, "prompt")
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"truncate_prompt_tokens": 3}, b"def"),
        ({"truncate_prompt_tokens": 3, "truncation_side": "left"}, b"def"),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, b"abc"),
        ({"truncate_prompt_tokens": 6}, b"abcdef"),
        ({"truncate_prompt_tokens": 7, "truncation_side": "right"}, b"abcdef"),
        ({"truncate_prompt_tokens": -1}, b"abcdef"),
        ({"truncate_prompt_tokens": None, "truncation_side": "right"}, b"abcdef"),
    ],
)
def test_prompt_is_cut(server: RunningServer, fields: dict[str, Any], expected: bytes) -> None:
    for prompt in ("abcdef", [*b"abcdef"]):
        answer = ask_json(server.url, COMPLETIONS, prompt=prompt, echo=True, max_tokens=2, **fields)
        assert prompt_ids(server) == [*expected]
        assert answer["usage"]["prompt_tokens"] == len(expected)
        assert answer["choices"][0]["text"] == expected.decode() + "He"


def test_minus_one_truncates_to_what_fits(server: RunningServer) -> None:
    long: dict[str, Any] = {"prompt": [*range(256)] * 9, "truncate_prompt_tokens": -1}
    for fields, room in (({"max_tokens": 100}, 100), ({}, 1), ({"max_tokens": -1}, 1), ({"max_tokens": 2048}, 1)):
        ask_json(server.url, COMPLETIONS, **long, **fields)
        assert prompt_ids(server) == long["prompt"][-(MAX_MODEL_LEN - room) :]
    error = check_error(ask(server.url, COMPLETIONS, **long | {"truncate_prompt_tokens": MAX_MODEL_LEN + 1}), 400)
    assert error["code"] == "context_length_exceeded"


LONG = "Hi there. " * 10_000
LONG_MESSAGES = [{"role": "user", "content": LONG}]


def test_a_long_text_is_cut(server: RunningServer) -> None:
    ask_json(server.url, COMPLETIONS, prompt=LONG, truncate_prompt_tokens=9)
    assert prompt_ids(server) == [*LONG[-9:].encode()]
    ask_json(server.url, CHAT)
    whole = prompt_ids(server)
    ask_json(server.url, CHAT, truncate_prompt_tokens=5)
    assert prompt_ids(server) == whole[-5:]


# Tokens that only the tokenizer has, as that of many a Llama 2 has a [PAD].

PAD = "[PAD]"
FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
NUM_TOKENS = VOCAB_SIZE + len(FIM)  # of the model; the next id is that of PAD
PAD_MESSAGE = {"role": "user", "content": f"a{PAD}"}


@pytest.fixture(scope="module")
def padded_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has more tokens than the embedding has rows."""
    folder = tmp_path_factory.mktemp("padded")
    write_tiny_model(folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(list(FIM))
    tokenizer.add_tokens([PAD])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def padded(padded_folder: Path) -> Iterator[RunningServer]:
    with shared_server(padded_folder, vocab_size=NUM_TOKENS, settings={"score_tokens": "y,n"}) as server:
        yield server


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (COMPLETIONS, {"prompt": f"a{PAD}b", "prompt_logprobs": 1}, "prompt"),
        (COMPLETIONS, {"prompt": ["a", [NUM_TOKENS]]}, "prompt"),
        (COMPLETIONS, {"prompt": PAD, "suffix": "a"}, "prompt"),
        (COMPLETIONS, {"prompt": [97], "suffix": f"a{PAD}"}, "prompt"),
        (CHAT, {"messages": [PAD_MESSAGE]}, "messages"),
        ("/v1/messages", {"messages": [PAD_MESSAGE], "max_tokens": 5}, "messages"),
        ("/v1/responses", {"input": f"a{PAD}"}, "input"),
        ("/v1/embeddings", {"input": ["a", PAD]}, "input"),
        ("/v1/rerank", {"query": "a", "documents": ["bc", PAD]}, "documents[1]"),
        ("/lightwell/v1/inspect", {"prompt": PAD}, "prompt"),
    ],
)
def test_a_token_that_only_the_tokenizer_has(
    path: str, fields: dict[str, Any], param: str, padded: RunningServer
) -> None:
    answer = httpx.post(padded.url + path, json={"model": "tiny"} | fields)
    assert answer.status_code == 400, answer.text
    problem = f"Invalid '{param}': expected token ids from 0 to {NUM_TOKENS - 1}, but got {NUM_TOKENS} instead"
    assert problem in answer.text
    assert padded.engine.submits == []


def test_a_word_that_only_the_tokenizer_has_need_not_be_banned(padded: RunningServer) -> None:
    ask_json(padded.url, COMPLETIONS, bad_words=[PAD, f"b{PAD}", IM_START])
    assert padded.engine.submits.pop().params.bad_words == ((IM_START_ID,), (32, IM_START_ID))


def test_score_tokens_that_only_the_tokenizer_has(padded_folder: Path) -> None:
    running = shared_server(padded_folder, settings={"score_tokens": f"y,{PAD}"})
    problem = r"--score-tokens y,\[PAD\]: expected two words that are one token each"
    with pytest.raises(ValueError, match=problem), running:
        pass
