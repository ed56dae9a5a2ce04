"""`POST /v1/completions` over real sockets, with a fake engine: tokens are bytes."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import tokenizers
from openai import AsyncOpenAI
from openai.types import Completion
from tokenizers import processors

from engine.shared.messages import Abort, FinishReason
from server.generation.preamble import WARNINGS
from tests.server.conftest import StartServer
from tests.support.clients import (
    COMPLETIONS,
    ask,
    ask_json,
    ask_stream,
    finish_reasons,
    openai_client,
    shared_server,
    stream_texts,
)
from tests.support.fake_engine import EOS_TOKEN_ID, FakeEngine, FakeEngineConfig, FakeEngineProcess
from tests.support.serving import (
    RunningServer,
    check_envelope,
    check_error,
    make_test_context,
    raw_request,
    running_server,
    wait_until,
)
from tests.support.tiny_tokenizer_model import IM_START_ID, write_tiny_model

REPLY = "Hello, world!"
MAX_MODEL_LEN = 2048


@pytest.fixture(scope="module")
def tiny(model_folder: Path) -> Iterator[RunningServer]:
    """A server shared by the tests that do not change the engine's replies."""
    with shared_server(model_folder) as server:
        yield server


def strict_chunk(chunk: dict[str, Any]) -> None:
    """Parse a chunk strictly, except for null finish reasons: OpenAI sends them although its schema forbids them."""
    for choice in chunk["choices"]:
        assert "finish_reason" in choice
    complete = [choice | {"finish_reason": choice["finish_reason"] or "stop"} for choice in chunk["choices"]]
    Completion.model_validate(chunk | {"choices": complete}, strict=True)


# The answer.


def test_official_client_accepts_the_answer(tiny: RunningServer) -> None:
    with openai_client(tiny.url) as client:
        answer = client.completions.create(model="tiny", prompt="Hi", logprobs=3, n=2)
    assert answer.id.startswith("cmpl-")
    assert (answer.object, answer.model, answer.system_fingerprint) == ("text_completion", "tiny", "fp_fake")
    assert abs(answer.created - time.time()) < 60
    assert [(choice.index, choice.text, choice.finish_reason) for choice in answer.choices] == [
        (0, REPLY, "stop"),
        (1, REPLY, "stop"),
    ]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 2
    assert answer.usage.completion_tokens == 2 * (len(REPLY) + 1)  # the end token counts
    assert answer.usage.total_tokens == 2 + 2 * (len(REPLY) + 1)


def test_official_client_accepts_the_stream(tiny: RunningServer) -> None:
    with openai_client(tiny.url, _strict_response_validation=False) as client:
        chunks = list(client.completions.create(model="tiny", prompt="Hi", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == REPLY
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]


def test_schema_of_answer_and_chunks(tiny: RunningServer) -> None:
    answer = ask_json(tiny.url, COMPLETIONS, max_tokens=1)
    assert list(answer) == ["id", "object", "created", "model", "choices", "usage", "system_fingerprint"]
    choice = {"text": "H", "index": 0, "logprobs": None, "finish_reason": "length", "stop_reason": None}
    assert answer["choices"] == [choice]
    chunks = ask_stream(tiny.url, COMPLETIONS, max_tokens=1)
    assert [chunk["choices"] for chunk in chunks] == [
        [{"text": "H", "index": 0, "logprobs": None, "finish_reason": None}],
        [choice | {"text": ""}],
    ]
    for chunk in chunks:
        strict_chunk(chunk)
        assert list(chunk) == ["id", "object", "created", "model", "choices", "system_fingerprint"]
        assert chunk | {"choices": [], "created": 0} == chunks[0] | {"choices": [], "created": 0}


@pytest.mark.anyio
async def test_async_clients_at_once(tiny: RunningServer) -> None:
    async def stream(client: AsyncOpenAI, length: int) -> str:
        chunks = await client.completions.create(model="tiny", prompt="Hi", stream=True, max_tokens=length)
        return "".join([chunk.choices[0].text async for chunk in chunks])

    async def whole(client: AsyncOpenAI, length: int) -> str:
        answer = await client.completions.create(model="tiny", prompt="Hi", max_tokens=length)
        return answer.choices[0].text

    async with AsyncOpenAI(base_url=f"{tiny.url}/v1", api_key="none", max_retries=0) as client:
        lengths = [*range(1, 14)] * 2
        requested = [(stream if index % 2 else whole)(client, length) for index, length in enumerate(lengths)]
        assert await asyncio.gather(*requested) == [REPLY[:length] for length in lengths]
    assert tiny.model.client.num_in_flight == 0


# Prompts.


PREFIX_ID, SUFFIX_ID, MIDDLE_ID, BOS_ID = 259, 260, 261, 262


@pytest.fixture(scope="module")
def fim_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server whose model has fill-in-the-middle tokens, and a BOS token before each text."""
    folder = tmp_path_factory.mktemp("fim")
    write_tiny_model(folder)
    path = folder / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS_ID)])
    tokenizer.save(str(path))
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with shared_server(folder, vocab_size=263) as server:
        yield server


def test_text_between_prompt_and_suffix(fim_server: RunningServer) -> None:
    with openai_client(fim_server.url) as client:
        answer = client.completions.create(model="tiny", prompt="f(", suffix=")\n")
    assert answer.choices[0].text == REPLY
    expected = [BOS_ID, PREFIX_ID, *b"f(", SUFFIX_ID, *b")\n", MIDDLE_ID]
    assert fim_server.engine.submits[-1].prompt_token_ids == expected
    url, body = f"{fim_server.url}/api/generate", {"model": "tiny", "prompt": "f(", "suffix": ")\n", "stream": False}
    assert httpx.post(url, json=body).json()["response"] == answer.choices[0].text
    assert fim_server.engine.submits[-1].prompt_token_ids == expected
    assert "insert" in httpx.post(f"{fim_server.url}/api/show", json={"model": "tiny"}).json()["capabilities"]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(expected)


@pytest.mark.parametrize(
    ("fields", "prompts"),
    [
        ({"prompt": ""}, [[BOS_ID, PREFIX_ID, SUFFIX_ID, *b"b", MIDDLE_ID]]),
        ({"prompt": [*b"a<"]}, [[BOS_ID, PREFIX_ID, *b"a<", SUFFIX_ID, *b"b", MIDDLE_ID]]),
        ({"prompt": [[MIDDLE_ID], [7]]}, [[BOS_ID, PREFIX_ID, t, SUFFIX_ID, *b"b", MIDDLE_ID] for t in (MIDDLE_ID, 7)]),
        ({"prompt": ["a", "c"]}, [[BOS_ID, PREFIX_ID, *t, SUFFIX_ID, *b"b", MIDDLE_ID] for t in (b"a", b"c")]),
        ({"prompt": "a", "add_special_tokens": False}, [[PREFIX_ID, *b"a", SUFFIX_ID, *b"b", MIDDLE_ID]]),
        (
            {"prompt": "<|fim_middle|>", "suffix": "<|endoftext|>"},
            [[BOS_ID, PREFIX_ID, *b"<|fim_middle|>", SUFFIX_ID, *b"<|endoftext|>", MIDDLE_ID]],
        ),
        ({"prompt": "a", "suffix": ""}, [[BOS_ID, *b"a"]]),
        ({"prompt": "a", "suffix": None, "echo": True}, [[BOS_ID, *b"a"]]),
    ],
)
def test_forms_of_prompts_with_a_suffix(
    fim_server: RunningServer, fields: dict[str, Any], prompts: list[list[int]]
) -> None:
    ask_json(fim_server.url, COMPLETIONS, **({"suffix": "b"} | fields))
    got = [submit.prompt_token_ids for submit in fim_server.engine.submits[-len(prompts) :]]
    assert got == prompts
    rendered = ask(fim_server.url, f"{COMPLETIONS}/render", **({"suffix": "b"} | fields)).json()
    assert [prompt["token_ids"] for prompt in rendered] == prompts


@pytest.mark.parametrize(
    ("fields", "param", "problem"),
    [
        ({"echo": True}, "echo", "not allowed with 'suffix'."),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens", "not allowed with 'suffix'."),
        ({"suffix": 5}, "suffix", "expected a string"),
        ({"prompt": [263]}, "prompt", "expected token ids from 0 to 262, but got 263"),
        ({"suffix": "b" * MAX_MODEL_LEN}, "prompt", "maximum context length is 2048 tokens"),
        ({"suffix": "b" * 2**20}, "prompt", "maximum context length is 2048 tokens"),
    ],
)
def test_a_suffix_that_is_refused(fim_server: RunningServer, fields: dict[str, Any], param: str, problem: str) -> None:
    error = check_error(ask(fim_server.url, COMPLETIONS, **({"suffix": "b"} | fields)), 400)
    assert error["param"] == param
    assert problem in error["message"]


def test_a_suffix_needs_a_model_with_fim_tokens(tiny: RunningServer) -> None:
    error = check_error(ask(tiny.url, COMPLETIONS, suffix="b"), 400)
    assert (error["param"], error["code"]) == ("suffix", "unsupported_parameter")
    assert error["message"] == (
        "Invalid 'suffix': not supported by this model, which has no fill-in-the-middle (FIM) tokens."
    )


@pytest.mark.parametrize(
    ("prompt", "token_ids"),
    [
        ("Hi", [b"Hi"]),
        (["Hi"], [b"Hi"]),
        (["a", "bc"], [b"a", b"bc"]),
        ([72, 105], [b"Hi"]),
        ([[72, 105], [33]], [b"Hi", b"!"]),
        ("é€", ["é€".encode()]),
    ],
)
def test_forms_of_prompts(tiny: RunningServer, prompt: Any, token_ids: list[bytes]) -> None:
    answer = ask_json(tiny.url, COMPLETIONS, prompt=prompt)
    got = [submit.prompt_token_ids for submit in tiny.engine.submits[-len(token_ids) :]]
    assert got == [list(ids) for ids in token_ids]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, token_ids))
    assert len(answer["choices"]) == len(token_ids)


def test_control_tokens_in_a_prompt_are_encoded_as_such(tiny: RunningServer) -> None:
    """Control tokens in a prompt are encoded as such, unlike those in messages."""
    ask_json(tiny.url, COMPLETIONS, prompt="<|im_start|>a")
    assert tiny.engine.submits[-1].prompt_token_ids == [257, ord("a")]


@pytest.mark.checklist("C03", "C04", "C05")
@pytest.mark.parametrize(
    "prompt",
    [
        "",
        [],
        [[]],
        [""],
        None,
        ["a", ""],
        [[1], []],
        [-1],
        [259],
        [2**40],
        [2**80],
        [1.0],
        [True],
        [[1], [259]],
        [[1], [True]],
        ["a", 1],
        ["a", []],
        ["a", [259]],
        [1, "a"],
        [[1], 2],
        [["a"]],
        [[[1]]],
        [None],
        5,
        1.5,
        True,
        {},
        {"prompt": "a"},
        ["a"] * 1025,
        [[1]] * 1025,
    ],
)
def test_bad_prompts(tiny: RunningServer, prompt: Any) -> None:
    num_submits = len(tiny.engine.submits)
    error = check_error(ask(tiny.url, COMPLETIONS, prompt=prompt), 400)
    assert error["param"] == "prompt"
    assert len(error["message"]) < 300
    assert len(tiny.engine.submits) == num_submits
    assert tiny.model.client.num_in_flight == 0


def test_more_choices_than_the_server_holds(tiny: RunningServer) -> None:
    num_submits = len(tiny.engine.submits)
    check_error(ask(tiny.url, COMPLETIONS, prompt=["a"] * 100, n=100), 400)
    assert len(tiny.engine.submits) == num_submits


@pytest.mark.checklist("C05")
@pytest.mark.parametrize("stream", [False, True])
def test_choices_of_several_prompts(server: RunningServer, fake_engine: FakeEngine, stream: bool) -> None:
    texts = ["first", "2nd", "the third"]
    fake_engine.config.replies = [([i], list(text.encode())) for i, text in enumerate(texts)]
    fields: dict[str, Any] = {"prompt": [[0], [1], [2]], "n": 2, "max_tokens": 6}
    if stream:
        chunks = ask_stream(server.url, COMPLETIONS, **fields, stream_options={"include_usage": True})
        got, reasons = stream_texts(chunks), finish_reasons(chunks)
        usage = chunks[-1]["usage"]
    else:
        answer = ask_json(server.url, COMPLETIONS, **fields)
        got = {choice["index"]: choice["text"] for choice in answer["choices"]}
        reasons = {choice["index"]: [choice["finish_reason"]] for choice in answer["choices"]}
        usage = answer["usage"]
    assert got == {0: "first", 1: "first", 2: "2nd", 3: "2nd", 4: "the th", 5: "the th"}
    assert reasons == {i: ["stop" if i < 4 else "length"] for i in range(6)}
    assert usage == {
        "prompt_tokens": 3,
        "completion_tokens": 2 * (6 + 4 + 6),
        "total_tokens": 35,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


@pytest.mark.checklist("D10")
def test_cached_tokens_are_counted_once_per_prompt(server: RunningServer, fake_engine: FakeEngine) -> None:
    fake_engine.config.num_cached_tokens = 32
    prompt = ["a" * 50, "b" * 50]
    for n in (1, 3):
        usage = ask_json(server.url, COMPLETIONS, prompt=prompt, n=n)["usage"]
        assert usage["prompt_tokens"] == 100
        assert usage["prompt_tokens_details"] == {"cached_tokens": 64}


# Length.


def test_more_tokens_than_fit(tiny: RunningServer) -> None:
    at_limit = ask(tiny.url, COMPLETIONS, prompt="a" * (MAX_MODEL_LEN - 5), max_tokens=5)
    assert (at_limit.json()["choices"][0]["text"], WARNINGS in at_limit.headers) == (REPLY[:5], False)
    prompts = ["a", "a" * (MAX_MODEL_LEN - 5)]
    for stream in (False, True):
        over = ask(tiny.url, COMPLETIONS, prompt=prompts, max_tokens=1 << 40, wish=1, stream=stream)
        assert over.headers[WARNINGS] == "ignored parameters: wish; max_tokens capped at 5, the rest of the context"
        assert [submit.params.max_tokens for submit in tiny.engine.submits[-2:]] == [MAX_MODEL_LEN - 1, 5]
    unlimited = ask(tiny.url, COMPLETIONS, max_tokens=-1)
    assert (tiny.engine.submits[-1].params.max_tokens, WARNINGS in unlimited.headers) == (MAX_MODEL_LEN - 2, False)


def test_more_tokens_than_fit_are_refused_if_strict(start_server: StartServer) -> None:
    url = start_server(strict=True).url
    assert ask(url, COMPLETIONS, max_tokens=-1).status_code == 200
    over = check_error(ask(url, COMPLETIONS, prompt="a" * (MAX_MODEL_LEN - 5), max_tokens=6), 400)
    assert (over["code"], over["param"]) == ("context_length_exceeded", "prompt")
    assert over["message"].startswith(
        "This model's maximum context length is 2048 tokens. However, you requested 2049 tokens "
        "(2043 in the prompt, 6 in the completion)."
    )


@pytest.mark.checklist("C17")
def test_context_length(tiny: RunningServer) -> None:
    num_submits = len(tiny.engine.submits)
    for fields in ({}, {"max_tokens": 1}, {"max_tokens": 9}, {"max_tokens": -1}):
        full = check_error(ask(tiny.url, COMPLETIONS, prompt=[1] * MAX_MODEL_LEN, **fields), 400)
        assert full["code"] == "context_length_exceeded"
        assert "you requested 2049 tokens (2048 in the prompt, 1 in the completion)" in full["message"]
    for prompt in ("a" * (MAX_MODEL_LEN + 1), ["a", "a" * 3000]):
        alone = check_error(ask(tiny.url, COMPLETIONS, prompt=prompt), 400)
        assert alone["code"] == "context_length_exceeded"
        assert "resulted in" in alone["message"]
    assert len(tiny.engine.submits) == num_submits
    assert tiny.model.client.num_in_flight == 0


def test_a_default_that_nobody_sent_is_no_reason_to_refuse(tiny: RunningServer) -> None:
    for num_tokens, expected in ((MAX_MODEL_LEN - 16, 16), (MAX_MODEL_LEN - 15, 15), (MAX_MODEL_LEN - 1, 1)):
        ask_json(tiny.url, COMPLETIONS, prompt=[1] * num_tokens)
        assert tiny.engine.submits[-1].params.max_tokens == expected


@pytest.mark.checklist("C18")
def test_a_text_that_cannot_fit_is_not_tokenized(tiny: RunningServer) -> None:
    start = time.monotonic()
    error = check_error(ask(tiny.url, COMPLETIONS, prompt="a" * 9_000_000), 400)
    assert time.monotonic() - start < 1
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    assert "2048 tokens" in error["message"]


@pytest.mark.checklist("C07")
def test_max_tokens_0_scores_the_prompt(tiny: RunningServer) -> None:
    for stream in (False, True):
        fields: dict[str, Any] = {"prompt": "Hi", "max_tokens": 0, "echo": True, "logprobs": 1}
        choices = (
            [chunk["choices"][0] for chunk in ask_stream(tiny.url, COMPLETIONS, **fields)]
            if stream
            else ask_json(tiny.url, COMPLETIONS, **fields)["choices"]
        )
        assert choices[0]["text"] == "Hi"
        assert choices[0]["logprobs"]["token_logprobs"] == [None, -0.5]
        assert choices[-1]["finish_reason"] == "length"
        assert tiny.engine.submits[-1].params.prompt_logprobs == 1
    bare = ask_json(tiny.url, COMPLETIONS, prompt="Hi", max_tokens=0, echo=True)
    assert (bare["choices"][0]["text"], bare["choices"][0]["logprobs"]) == ("Hi", None)
    assert bare["usage"]["completion_tokens"] == 0
    assert tiny.engine.submits[-1].params.prompt_logprobs is None  # they are slow and disable the prefix cache
    for echo in ({}, {"echo": False}):
        error = check_error(ask(tiny.url, COMPLETIONS, max_tokens=0, **echo), 400)
        assert (error["param"], error["code"]) == ("max_tokens", "integer_below_min_value")


def test_too_many_choices_name_what_there_is_too_much_of(tiny: RunningServer) -> None:
    limit = tiny.model.client.max_in_flight
    for fields, param in (({}, "prompt"), ({"n": 2}, "n")):
        error = check_error(ask(tiny.url, COMPLETIONS, prompt=["a"] * (limit + 1), **fields), 400)
        assert error["param"] == param


def test_max_completion_tokens_belongs_to_chat(tiny: RunningServer) -> None:
    assert check_error(ask(tiny.url, COMPLETIONS, max_completion_tokens=5), 400)["param"] == "max_completion_tokens"


# Echo and log probabilities.


@pytest.mark.parametrize("prompt", ["Hé€", list("Hé€".encode()), ["Hé€", "b"], [list(b"a"), list("é".encode())]])
def test_echo(tiny: RunningServer, prompt: Any) -> None:
    answer = ask_json(tiny.url, COMPLETIONS, prompt=prompt, echo=True, n=2)
    flat = prompt if isinstance(prompt[0], str | list) and not isinstance(prompt, str) else [prompt]
    texts = [item if isinstance(item, str) else bytes(item).decode() for item in flat]
    expected = {i: texts[i // 2] + REPLY for i in range(2 * len(texts))}
    assert {choice["index"]: choice["text"] for choice in answer["choices"]} == expected
    assert stream_texts(ask_stream(tiny.url, COMPLETIONS, prompt=prompt, echo=True, n=2)) == expected


def test_echo_shows_control_tokens(tiny: RunningServer) -> None:
    prompt = [*b"a", 257, *b"b"]
    answer = ask_json(tiny.url, COMPLETIONS, prompt=prompt, echo=True, logprobs=0, max_tokens=1)
    choice = answer["choices"][0]
    assert choice["text"] == "a<|im_start|>bH"
    assert choice["logprobs"]["tokens"] == ["a", "<|im_start|>", "b", "H"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 13, 14]


def test_logprobs(tiny: RunningServer) -> None:
    logprobs = ask_json(tiny.url, COMPLETIONS, logprobs=2, max_tokens=3)["choices"][0]["logprobs"]
    assert logprobs == {
        "text_offset": [0, 1, 2],
        "token_logprobs": [-0.5, -0.5, -0.5],
        "tokens": ["H", "e", "l"],
        "top_logprobs": [{"H": -0.5, "I": -1.5}, {"e": -0.5, "f": -1.5}, {"l": -0.5, "m": -1.5}],
    }
    none = ask_json(tiny.url, COMPLETIONS, logprobs=0, max_tokens=1)["choices"][0]["logprobs"]
    assert none["top_logprobs"] == [{"H": -0.5}]  # the sampled token is always included
    assert tiny.engine.submits[-1].params.logprobs == 0
    assert tiny.engine.submits[-1].params.prompt_logprobs is None


def test_end_token_has_log_probabilities_too(tiny: RunningServer) -> None:
    choice = ask_json(tiny.url, COMPLETIONS, logprobs=0)["choices"][0]
    assert choice["text"] == REPLY
    assert choice["logprobs"]["tokens"] == [*REPLY, "<|endoftext|>"]
    assert choice["logprobs"]["text_offset"] == list(range(len(REPLY) + 1))


@pytest.mark.checklist("C12")
@pytest.mark.parametrize("value", [21, -1, 1.0, True, "1", []])
def test_bad_logprobs(tiny: RunningServer, value: Any) -> None:
    assert check_error(ask(tiny.url, COMPLETIONS, logprobs=value), 400)["param"] == "logprobs"


@pytest.mark.parametrize("prompt", ["Hé!", [[72, 233], [105]]])
def test_echo_with_logprobs(tiny: RunningServer, prompt: Any) -> None:
    """Evaluation harnesses expect the prompt's tokens first, the very first without a value."""
    fields: dict[str, Any] = {"prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": 2, "n": 2}
    answer = ask_json(tiny.url, COMPLETIONS, **fields)
    for choice in answer["choices"]:
        logprobs, text = choice["logprobs"], choice["text"]
        num_tokens = len(logprobs["tokens"])
        assert all(len(values) == num_tokens for values in logprobs.values())
        assert logprobs["token_logprobs"] == [None] + [-0.5] * (num_tokens - 1)
        assert logprobs["top_logprobs"][0] is None
        assert all(len(top) == 2 for top in logprobs["top_logprobs"][1:])
        for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
            assert text[offset:].startswith(token) or token.startswith("bytes:")
        assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    if isinstance(prompt, str):
        assert answer["choices"][0]["logprobs"]["tokens"] == ["H", "bytes:\\xc3", "bytes:\\xa9", "!", "H", "e"]
        assert answer["choices"][0]["logprobs"]["text_offset"] == [0, 1, 1, 2, 3, 4]
    chunks = ask_stream(tiny.url, COMPLETIONS, **fields)
    assert stream_texts(chunks) == {choice["index"]: choice["text"] for choice in answer["choices"]}
    for choice in answer["choices"]:
        parts = [part["logprobs"] for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        joined = {key: [item for part in parts if part for item in part[key]] for key in choice["logprobs"]}
        assert joined == choice["logprobs"]


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server whose model has <|im_start|> as BOS token."""
    folder = tmp_path_factory.mktemp("with-bos")
    write_tiny_model(folder)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", IM_START_ID)]
    )
    backend.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": "<|im_start|>"}))
    with shared_server(folder) as server:
        yield server


@pytest.mark.checklist("C03")
def test_empty_prompt_is_a_bos_token(with_bos: RunningServer) -> None:
    assert ask_json(with_bos.url, COMPLETIONS, prompt="")["usage"]["prompt_tokens"] == 1
    assert with_bos.engine.submits[-1].prompt_token_ids == [IM_START_ID]
    empty: list[dict[str, Any]] = [{"prompt": "", "add_special_tokens": False}, {"prompt": []}, {"prompt": [[]]}]
    for fields in empty:
        check_error(ask(with_bos.url, COMPLETIONS, **fields), 400)
    ask_json(with_bos.url, COMPLETIONS, prompt="a", add_special_tokens=False)
    assert with_bos.engine.submits[-1].prompt_token_ids == [97]


def test_bos_token_is_scored_but_not_echoed(with_bos: RunningServer) -> None:
    fields: dict[str, Any] = {"echo": True, "logprobs": 0, "max_tokens": 1}
    choice = ask_json(with_bos.url, COMPLETIONS, prompt="ab", **fields)["choices"][0]
    assert choice["text"] == "abH"
    assert choice["logprobs"]["tokens"] == ["<|im_start|>", "a", "b", "H"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 2]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5, -0.5]


# Stop strings.

STOPS: list[tuple[dict[str, Any], str, int]] = [  # fields, text, tokens used
    ({"stop": ", w"}, "Hello", 8),
    ({"stop": ["zzz", "o, "]}, "Hell", 7),
    ({"stop": ["world", "lo", "l"]}, "He", 3),  # the stop string that completes first wins
    ({"stop": REPLY}, "", 13),
    ({"stop": "Hello, World"}, REPLY, 14),
    ({"stop": "d!?"}, REPLY, 14),  # held back as a possible stop string, released at the end
    ({"stop": []}, REPLY, 14),
    ({"stop": None}, REPLY, 14),
    ({"stop": ""}, REPLY, 14),
    ({"stop": ["", None, *("z" * 127 + chr(number) for number in range(200, 263)), ", w"]}, "Hello", 8),
    ({"stop": ", w", "include_stop_str_in_output": True}, "Hello, w", 8),
    ({"stop": "l", "min_tokens": 4}, "Hello, wor", 11),
    ({"stop_token_ids": [ord(",")]}, "Hello", 6),
    ({"stop_token_ids": [ord(",")], "include_stop_str_in_output": True}, "Hello,", 6),
    ({"include_stop_str_in_output": True, "skip_special_tokens": False}, REPLY + "<|endoftext|>", 14),
    ({"skip_special_tokens": False}, REPLY, 14),
]


@pytest.mark.parametrize(("fields", "text", "num_tokens"), STOPS)
def test_stop(tiny: RunningServer, fields: dict[str, Any], text: str, num_tokens: int) -> None:
    answer = ask_json(tiny.url, COMPLETIONS, **fields)
    assert answer["choices"][0]["text"] == text
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == num_tokens
    chunks = ask_stream(tiny.url, COMPLETIONS, **fields, stream_options={"include_usage": True})
    assert stream_texts(chunks) == {0: text}
    assert finish_reasons(chunks) == {0: ["stop"]}
    assert chunks[-1]["usage"] == answer["usage"]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_ends_its_choice_in_the_engine(
    server: RunningServer, fake_engine: FakeEngine, stream: bool
) -> None:
    fake_engine.config.endless = True
    fake_engine.config.step_seconds = 0.001
    fields: dict[str, Any] = {"prompt": ["a", "b"], "n": 2, "stop": "lo, w", "max_tokens": 2000}
    start = time.monotonic()
    if stream:
        assert stream_texts(ask_stream(server.url, COMPLETIONS, **fields)) == dict.fromkeys(range(4), "Hel")
    else:
        answer = ask_json(server.url, COMPLETIONS, **fields)
        assert [choice["text"] for choice in answer["choices"]] == ["Hel"] * 4
        assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop"] * 4
        assert answer["usage"]["completion_tokens"] == 4 * 8
    assert time.monotonic() - start < 1.5  # 2,000 steps would take 2 seconds
    wait_until(lambda: len(fake_engine.aborts) == 4 and not fake_engine.num_choices)
    ids = [submit.request_id for submit in fake_engine.submits]
    expected = [Abort(id, j, FinishReason.STOP) for id in ids for j in (0, 1)]
    assert sorted(fake_engine.aborts, key=str) == sorted(expected, key=str)
    assert server.metric("lightwell_request_success_total", finished_reason="stop") == 4


def test_tokens_of_a_stop_string_have_no_log_probabilities(tiny: RunningServer) -> None:
    fields: dict[str, Any] = {"stop": "o, w", "logprobs": 1}
    logprobs = ask_json(tiny.url, COMPLETIONS, **fields)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == list("Hell")
    chunks = ask_stream(tiny.url, COMPLETIONS, **fields)
    parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["text"]]
    assert [token for part in parts for token in part["logprobs"]["tokens"]] == list("Hell")


# Text.

TEXTS = [
    "é",
    "日本語のテキスト",
    "👩‍👩‍👧‍👦 family",
    "a\n\nb",
    "data: [DONE]\n\n",
    "x\r\ny\rz",
    "nul \0 and \x1b[0m",
    "\u2028 \u2029 \x85 \x0b",
    '"quoted" \\ /',
    "\ufeffbom",
]


@pytest.mark.checklist("D05")
@pytest.mark.parametrize("text", TEXTS)
def test_any_text_arrives_whole(server: RunningServer, fake_engine: FakeEngine, text: str) -> None:
    fake_engine.config.reply = list(text.encode())
    assert ask_json(server.url, COMPLETIONS, max_tokens=100)["choices"][0]["text"] == text
    response = ask(server.url, COMPLETIONS, stream=True, max_tokens=100)
    for line in response.text.splitlines():  # like some clients, splits at more than line feeds
        assert line == "" or line.startswith("data: ")
    with openai_client(server.url, _strict_response_validation=False) as client:
        chunks = client.completions.create(model="tiny", prompt="Hi", stream=True, max_tokens=100)
        pieces = [chunk.choices[0].text for chunk in chunks]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.checklist("D02")
@pytest.mark.parametrize(("reply", "text"), [(b"ab\xf0\x9f\x91", "ab\ufffd"), (b"\xff\xfea", "\ufffd\ufffda")])
def test_broken_characters(server: RunningServer, fake_engine: FakeEngine, reply: bytes, text: str) -> None:
    fake_engine.config.reply = list(reply)
    assert ask_json(server.url, COMPLETIONS)["choices"][0]["text"] == text
    assert stream_texts(ask_stream(server.url, COMPLETIONS)) == {0: text}


# Streams.


@pytest.mark.checklist("D09")
def test_stream_headers(tiny: RunningServer) -> None:
    headers = ask(tiny.url, COMPLETIONS, stream=True).headers
    assert headers["content-type"].startswith("text/event-stream")
    assert headers["cache-control"] == "no-store"
    assert headers["x-accel-buffering"] == "no"
    assert "content-encoding" not in headers


@pytest.mark.checklist("D06", "D10")
def test_usage_in_a_stream(server: RunningServer, fake_engine: FakeEngine) -> None:
    fake_engine.config.num_cached_tokens = 1
    whole = ask_json(server.url, COMPLETIONS, n=2)["usage"]
    plain = ask_stream(server.url, COMPLETIONS, n=2)
    assert not any("usage" in chunk for chunk in plain)
    *chunks, last = ask_stream(server.url, COMPLETIONS, n=2, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (last["choices"], last["usage"]) == ([], whole)
    assert whole["prompt_tokens_details"] == {"cached_tokens": 1}
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = ask_stream(server.url, COMPLETIONS, n=2, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] >= 1
    assert counts[-1] == whole["completion_tokens"]
    assert last["usage"] == whole


def test_stream_comes_as_it_is_made(server: RunningServer, fake_engine: FakeEngine) -> None:
    fake_engine.config.endless = True
    fake_engine.config.step_seconds = 0.02
    body = {"model": "tiny", "prompt": "Hi", "stream": True, "max_tokens": 20}
    with httpx.stream("POST", server.url + COMPLETIONS, json=body) as response:
        arrivals = [time.monotonic() for line in response.iter_lines() if line]
    assert arrivals[-1] - arrivals[0] > 0.2


# Disconnects and failures.


@pytest.mark.checklist("E10")
@pytest.mark.parametrize("prompt", ["Hi", ["a", "b", "c"]])
@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_aborts(server: RunningServer, fake_engine: FakeEngine, stream: bool, prompt: Any) -> None:
    fake_engine.config.endless = True
    fake_engine.config.step_seconds = 0.005
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 2000, "n": 2, "stream": stream}
    num_prompts = 1 if isinstance(prompt, str) else len(prompt)
    with server.connect() as connection:
        data = json.dumps(body).encode()
        connection.sendall(raw_request("POST", COMPLETIONS, data, content_type="application/json"))
        wait_until(lambda: fake_engine.num_choices == 2 * num_prompts)
        if stream:
            assert connection.recv(100)
    wait_until(lambda: fake_engine.num_choices == 0, timeout=1)
    assert {abort.request_id for abort in fake_engine.aborts} == {s.request_id for s in fake_engine.submits}
    wait_until(lambda: server.model.client.num_in_flight == 0, timeout=1)
    assert ask_json(server.url, COMPLETIONS, max_tokens=5)["choices"][0]["text"] == "Hello"


@pytest.mark.checklist("F01")
def test_failure_of_the_engine_is_a_500(server: RunningServer, fake_engine: FakeEngine) -> None:
    fake_engine.config.fail_request = True
    for prompt in ("Hi", ["a", "b"]):
        answer = ask(server.url, COMPLETIONS, prompt=prompt, n=2)
        error = check_error(answer, 500)
        assert error["type"] == "server_error"
        assert "secret" not in answer.text
        assert answer.headers["x-request-id"] in error["message"]
        stream = ask(server.url, COMPLETIONS, prompt=prompt, stream=True)
        *_, event, done, rest = stream.text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        assert check_envelope(event.removeprefix("data: ").encode())["type"] == "server_error"
        assert "secret" not in stream.text
    assert server.model.client.num_in_flight == 0
    with openai_client(server.url) as client:
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model="tiny", prompt="Hi")
        with pytest.raises(openai.APIError):
            list(client.completions.create(model="tiny", prompt="Hi", stream=True))


@pytest.mark.parametrize("prompt", ["Hi", ["a", "b"]])
def test_death_of_the_engine(address: str, model_folder: Path, prompt: Any) -> None:
    config = FakeEngineConfig(address=address, endless=True, step_seconds=0.005)
    fields: dict[str, Any] = {"prompt": prompt, "max_tokens": 2000}
    with (
        FakeEngineProcess(config) as engine,
        running_server(make_test_context(address, model_folder)) as server,
        ThreadPoolExecutor(2) as pool,
    ):
        whole = pool.submit(ask, server.url, COMPLETIONS, **fields)
        stream = pool.submit(ask, server.url, COMPLETIONS, stream=True, **fields)
        wait_until(lambda: server.model.client.num_in_flight == 2 * (1 if prompt == "Hi" else 2))
        time.sleep(0.05)
        engine.kill()
        assert check_error(whole.result(timeout=3), 503)["type"] == "service_unavailable_error"
        *_, event, done, rest = stream.result(timeout=3).text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        assert check_envelope(event.removeprefix("data: ").encode())["type"] == "service_unavailable_error"
        check_error(ask(server.url, COMPLETIONS), 503)
        assert server.model.client.num_in_flight == 0


@pytest.mark.checklist("E01")
def test_queue_full_is_429_before_tokenizing(start_server: StartServer, fake_engine: FakeEngine) -> None:
    server = start_server(max_queued_requests=1)
    fake_engine.pause()
    results: list[dict[str, Any]] = []
    fields: dict[str, Any] = {"n": fake_engine.config.max_num_seqs + 1, "max_tokens": 1}
    holder = threading.Thread(target=lambda: results.append(ask_json(server.url, COMPLETIONS, **fields)))
    holder.start()
    wait_until(lambda: fake_engine.submits)
    num_tokenized = server.metric("lightwell_tokenizer_seconds_count")
    for stream in (False, True):
        answer = ask(server.url, COMPLETIONS, stream=stream)
        assert check_error(answer, 429)["code"] == "rate_limit_exceeded"
        assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert server.metric("lightwell_tokenizer_seconds_count") == num_tokenized
    fake_engine.resume()
    holder.join()
    assert len(results[0]["choices"]) == fields["n"]
    assert ask_json(server.url, COMPLETIONS)["choices"][0]["text"] == REPLY


def test_end_token_is_the_tiny_models(tiny: RunningServer) -> None:
    assert tiny.model.tokenizer.eos_token_id == EOS_TOKEN_ID
