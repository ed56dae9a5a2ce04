"""`POST /v1/completions` over real sockets, with a fake engine: tokens are bytes."""

from collections.abc import Iterable
from typing import Any

import pytest
from openai.types import Completion

from engine.shared.messages import Abort, FinishReason
from tests.server.dialects import REPLY, WARNINGS
from tests.server.kinds import BOS_ID, MIDDLE_ID, PREFIX_ID, SUFFIX_ID
from tests.support.clients import COMPLETIONS, ask, ask_json, ask_stream, finish_reasons, openai_client, stream_texts
from tests.support.fake_engine import FakeEngine
from tests.support.serving import RunningServer, check_error, wait_until

MAX_MODEL_LEN = 2048


def answers_to(url: str, stream: bool, **fields: Any) -> list[dict[str, Any]]:
    """Return the chunks of a stream, or the only answer."""
    return ask_stream(url, COMPLETIONS, **fields) if stream else [ask_json(url, COMPLETIONS, **fields)]


def choices_of(url: str, stream: bool, **fields: Any) -> list[dict[str, Any]]:
    return [choice for answer in answers_to(url, stream, **fields) for choice in answer["choices"]]


# The answer.


def test_schema_of_answer_and_chunks(server: RunningServer) -> None:
    answer = ask_json(server.url, COMPLETIONS, max_tokens=1)
    assert (answer["id"][:5], answer["object"], answer["model"]) == ("cmpl-", "text_completion", "tiny")
    assert (answer["system_fingerprint"], answer["created"] >= server.context.created) == ("fp_fake", True)
    assert list(answer) == ["id", "object", "created", "model", "choices", "usage", "system_fingerprint"]
    choice = {"text": "H", "index": 0, "logprobs": None, "finish_reason": "length", "stop_reason": None}
    assert answer["choices"] == [choice]
    chunks = ask_stream(server.url, COMPLETIONS, max_tokens=1)
    first = {"text": "H", "index": 0, "logprobs": None, "finish_reason": None}
    assert [chunk["choices"] for chunk in chunks] == [[first], [choice | {"text": ""}]]
    for chunk in chunks:
        # OpenAI sends null as finish reason although its schema forbids it.
        complete = [each | {"finish_reason": each["finish_reason"] or "stop"} for each in chunk["choices"]]
        Completion.model_validate(chunk | {"choices": complete}, strict=True)
        assert list(chunk) == [name for name in answer if name != "usage"]
        assert chunk | {"choices": [], "created": 0} == chunks[0] | {"choices": [], "created": 0}


# Prompts.


def between(prompt: Iterable[int], suffix: bytes = b"b") -> list[int]:
    return [BOS_ID, PREFIX_ID, *prompt, SUFFIX_ID, *suffix, MIDDLE_ID]


@pytest.mark.checklist("C03")
@pytest.mark.parametrize(
    ("fields", "prompts"),
    [
        ({"prompt": "", "suffix": "b"}, [between(b"")]),
        ({"prompt": [*b"a<"], "suffix": "b"}, [between(b"a<")]),
        ({"prompt": [[MIDDLE_ID], [7]], "suffix": "b"}, [between([MIDDLE_ID]), between([7])]),
        ({"prompt": "a", "add_special_tokens": False, "suffix": "b"}, [between(b"a")[1:]]),
        ({"prompt": "<|fim_middle|>", "suffix": "<|endoftext|>"}, [between(b"<|fim_middle|>", b"<|endoftext|>")]),
        ({"prompt": "a", "suffix": "", "echo": True}, [[BOS_ID, *b"a"]]),
        ({"prompt": ""}, [[BOS_ID]]),
        ({"prompt": "a", "add_special_tokens": False}, [[97]]),
        ({"prompt": ["é€", "bc"]}, [[BOS_ID, *"é€".encode()], [BOS_ID, *b"bc"]]),
        ({"prompt": [[72, 105], [33]]}, [[72, 105], [33]]),
        ({"prompt": "<|im_start|>a"}, [[BOS_ID, 257, 97]]),  # as a control token, unlike in messages
    ],
)
def test_prompts_with_special_tokens(fim: RunningServer, fields: dict[str, Any], prompts: list[list[int]]) -> None:
    answer = ask_json(fim.url, COMPLETIONS, **fields)
    assert (answer["usage"]["prompt_tokens"], len(answer["choices"])) == (sum(map(len, prompts)), len(prompts))
    assert [submit.prompt_token_ids for submit in fim.engine.submits] == prompts


@pytest.mark.parametrize(
    ("fields", "param", "problem"),
    [
        ({"suffix": "b", "echo": True}, "echo", "not allowed with 'suffix'."),
        ({"suffix": "b", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens", "not allowed with 'suffix'."),
        ({"suffix": "b", "prompt": [263]}, "prompt", "expected token ids from 0 to 262, but got 263"),
        ({"suffix": "b" * MAX_MODEL_LEN}, "prompt", "maximum context length is 2048 tokens"),
        ({"suffix": "b" * 2**20}, "prompt", "maximum context length is 2048 tokens"),
        ({"prompt": "", "add_special_tokens": False}, "prompt", ""),
    ],
)
def test_refused_prompts(fim: RunningServer, fields: dict[str, Any], param: str, problem: str) -> None:
    error = check_error(ask(fim.url, COMPLETIONS, **fields), 400)
    assert error["param"] == param
    assert problem in error["message"]


@pytest.mark.checklist("C05")
@pytest.mark.parametrize("stream", [False, True])
def test_choices_of_several_prompts(server: RunningServer, fake_engine: FakeEngine, stream: bool) -> None:
    texts = ["first", "2nd", "the third"]
    fake_engine.config.replies = [([i], list(text.encode())) for i, text in enumerate(texts)]
    fields: dict[str, Any] = {"prompt": [[0], [1], [2]], "n": 2, "max_tokens": 6}
    options = {"stream_options": {"include_usage": True}} if stream else {}
    chunks = answers_to(server.url, stream, **fields, **options)
    assert stream_texts(chunks) == {0: "first", 1: "first", 2: "2nd", 3: "2nd", 4: "the th", 5: "the th"}
    assert finish_reasons(chunks) == {i: "stop" if i < 4 else "length" for i in range(6)}
    counts = {"prompt_tokens": 3, "completion_tokens": 2 * (6 + 4 + 6), "total_tokens": 35}
    assert chunks[-1]["usage"] == counts | {"prompt_tokens_details": {"cached_tokens": 0}}


# Length.


def test_each_prompt_has_its_own_cap(server: RunningServer) -> None:
    prompts = ["a", "a" * (MAX_MODEL_LEN - 5)]
    over = ask(server.url, COMPLETIONS, prompt=prompts, max_tokens=1 << 40, wish=1)
    assert over.headers[WARNINGS] == "ignored parameters: wish; max_tokens capped at 5, the rest of the context"
    assert [submit.params.max_tokens for submit in server.engine.submits] == [MAX_MODEL_LEN - 1, 5]
    at_limit = ask(server.url, COMPLETIONS, prompt=prompts[1], max_tokens=5)
    assert (at_limit.json()["choices"][0]["text"], WARNINGS in at_limit.headers) == (REPLY[:5], False)


@pytest.mark.checklist("C17")
def test_a_prompt_without_room_for_an_answer(server: RunningServer) -> None:
    for fields in ({}, {"max_tokens": 1}, {"max_tokens": 9}, {"max_tokens": -1}):
        full = check_error(ask(server.url, COMPLETIONS, prompt=[1] * MAX_MODEL_LEN, **fields), 400)
        assert (full["code"], full["param"]) == ("context_length_exceeded", "prompt")
        assert "you requested 2049 tokens (2048 in the prompt, 1 in the completion)" in full["message"]
    assert "resulted in" in check_error(ask(server.url, COMPLETIONS, prompt=["a", "a" * 3000]), 400)["message"]
    assert server.engine.submits == []


def test_a_default_that_nobody_sent_is_no_reason_to_refuse(server: RunningServer) -> None:
    for num_tokens, expected in ((MAX_MODEL_LEN - 16, 16), (MAX_MODEL_LEN - 15, 15), (MAX_MODEL_LEN - 1, 1)):
        ask_json(server.url, COMPLETIONS, prompt=[1] * num_tokens)
        assert server.engine.submits[-1].params.max_tokens == expected


@pytest.mark.checklist("C07")
def test_max_tokens_0_scores_the_prompt(server: RunningServer) -> None:
    for stream in (False, True):
        choices = choices_of(server.url, stream, prompt="Hi", max_tokens=0, echo=True, logprobs=1)
        assert choices[0]["text"] == "Hi"
        assert choices[0]["logprobs"]["token_logprobs"] == [None, -0.5]
        assert choices[-1]["finish_reason"] == "length"
        assert server.engine.submits[-1].params.prompt_logprobs == 1
    bare = ask_json(server.url, COMPLETIONS, prompt="Hi", max_tokens=0, echo=True)
    assert (bare["choices"][0]["text"], bare["choices"][0]["logprobs"]) == ("Hi", None)
    assert bare["usage"]["completion_tokens"] == 0
    assert server.engine.submits[-1].params.prompt_logprobs is None  # they are slow and disable the prefix cache


# Echo and log probabilities.


def test_logprobs(server: RunningServer) -> None:
    logprobs = ask_json(server.url, COMPLETIONS, logprobs=2, max_tokens=2)["choices"][0]["logprobs"]
    top = [{"H": -0.5, "I": -1.5}, {"e": -0.5, "f": -1.5}]
    assert logprobs == {"text_offset": [0, 1], "token_logprobs": [-0.5] * 2, "tokens": ["H", "e"], "top_logprobs": top}
    whole = ask_json(server.url, COMPLETIONS, logprobs=0)["choices"][0]["logprobs"]
    assert (whole["tokens"], whole["text_offset"]) == ([*REPLY, "<|endoftext|>"], list(range(len(REPLY) + 1)))
    assert whole["top_logprobs"][0] == {"H": -0.5}  # the sampled token is always included
    assert server.engine.submits[-1].params.prompt_logprobs is None
    for stream in (False, True):  # tokens of a stop string have none
        choices = choices_of(server.url, stream, stop="o, w", logprobs=1)
        assert [token for choice in choices if choice["text"] for token in choice["logprobs"]["tokens"]] == list("Hell")


@pytest.mark.parametrize(
    ("prompt", "text", "tokens", "offsets"),
    [
        ("Hé!", "Hé!He", ["H", "bytes:\\xc3", "bytes:\\xa9", "!", "H", "e"], [0, 1, 1, 2, 3, 4]),
        (["Hé", "b"], "HéHe", ["H", "bytes:\\xc3", "bytes:\\xa9", "H", "e"], [0, 1, 1, 2, 3]),
        ([[72, 233], [105]], "H\ufffdHe", ["H", "bytes:\\xe9", "H", "e"], [0, 1, 2, 3]),
        ([*b"a", 257, *b"b"], "a<|im_start|>bHe", ["a", "<|im_start|>", "b", "H", "e"], [0, 1, 13, 14, 15]),
    ],
)
def test_echo(server: RunningServer, prompt: Any, text: str, tokens: list[str], offsets: list[int]) -> None:
    """Evaluation harnesses expect the prompt's tokens first, the very first without a value."""
    fields: dict[str, Any] = {"prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": 2, "n": 2}
    answer = ask_json(server.url, COMPLETIONS, **fields)
    for choice in answer["choices"]:
        logprobs = choice["logprobs"]
        num_others = len(logprobs["tokens"]) - 1
        assert logprobs["token_logprobs"] == [None, *[-0.5] * num_others]
        nums_top = [top and len(top) in (2, 3) for top in logprobs["top_logprobs"]]  # 2, and the token itself
        assert nums_top == [None, *[True] * num_others]
    first = answer["choices"][0]
    assert (first["text"], first["logprobs"]["tokens"], first["logprobs"]["text_offset"]) == (text, tokens, offsets)
    chunks = ask_stream(server.url, COMPLETIONS, **fields)
    bare = ask_json(server.url, COMPLETIONS, **fields | {"logprobs": None})
    assert stream_texts(chunks) == stream_texts([bare]) == stream_texts([answer])
    for choice in answer["choices"]:
        parts = [part["logprobs"] for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        joined = {key: [item for part in parts if part for item in part[key]] for key in choice["logprobs"]}
        assert joined == choice["logprobs"]


def test_bos_token_is_scored_but_not_echoed(fim: RunningServer) -> None:
    choice = ask_json(fim.url, COMPLETIONS, prompt="ab", echo=True, logprobs=0, max_tokens=1)["choices"][0]
    logprobs = choice["logprobs"]
    assert (choice["text"], logprobs["tokens"]) == ("abH", ["<s>", "a", "b", "H"])
    assert (logprobs["text_offset"], logprobs["token_logprobs"]) == ([0, 0, 1, 2], [None, -0.5, -0.5, -0.5])


# Stop strings.

STOPS: list[tuple[dict[str, Any], str, int, object]] = [  # fields, text, tokens used, and what is named as the cause
    ({"stop": ", w"}, "Hello", 8, ", w"),
    ({"stop": ["zzz", "o, "]}, "Hell", 7, "o, "),
    ({"stop": ["world", "lo", "l"]}, "He", 3, "l"),  # the stop string that completes first wins
    ({"stop": "d!?"}, REPLY, 14, None),  # held back as a possible stop string, released at the end
    ({"stop": ""}, REPLY, 14, None),
    ({"stop": ["", None, *("z" * 127 + chr(number) for number in range(200, 263)), ", w"]}, "Hello", 8, ", w"),
    ({"stop": ", w", "include_stop_str_in_output": True}, "Hello, w", 8, ", w"),
    ({"stop": "l", "min_tokens": 4}, "Hello, wor", 11, "l"),
    ({"stop_token_ids": [ord(","), 7]}, "Hello", 6, ord(",")),
    ({"stop_token_ids": [ord(",")], "include_stop_str_in_output": True}, "Hello,", 6, ord(",")),
    ({"include_stop_str_in_output": True, "skip_special_tokens": False}, REPLY + "<|endoftext|>", 14, None),
    ({"skip_special_tokens": False}, REPLY, 14, None),
]


@pytest.mark.parametrize(("fields", "text", "num_tokens", "cause"), STOPS)
def test_stop(server: RunningServer, fields: dict[str, Any], text: str, num_tokens: int, cause: object) -> None:
    answer = ask_json(server.url, COMPLETIONS, **fields)
    assert (answer["choices"][0]["text"], answer["choices"][0]["stop_reason"]) == (text, cause)
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == num_tokens
    chunks = ask_stream(server.url, COMPLETIONS, **fields, stream_options={"include_usage": True})
    assert (stream_texts(chunks), finish_reasons(chunks)) == ({0: text}, {0: "stop"})
    assert chunks[-2]["choices"][0]["stop_reason"] == cause
    assert chunks[-1]["usage"] == answer["usage"]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_ends_its_choice_in_the_engine(server: RunningServer, stream: bool) -> None:
    server.engine.config.endless, server.engine.config.step_seconds = True, 0.01
    fields: dict[str, Any] = {"prompt": ["a", "b"], "n": 2, "stop": "lo, w", "max_tokens": 2000}
    answers = answers_to(server.url, stream, **fields)
    assert stream_texts(answers) == dict.fromkeys(range(4), "Hel")
    assert finish_reasons(answers) == dict.fromkeys(range(4), "stop")
    wait_until(lambda: len(server.engine.aborts) == 4 and not server.engine.num_choices)
    expected = [Abort(each.request_id, j, FinishReason.STOP) for each in server.engine.submits for j in (0, 1)]
    assert sorted(server.engine.aborts, key=str) == sorted(expected, key=str)
    assert server.metric("lightwell_request_success_total", finished_reason="stop") == 4


# Text.

TEXTS = [
    *("é", "日本語のテキスト", "👩‍👩‍👧‍👦 family", "a\n\nb", "data: [DONE]\n\n", "x\r\ny\rz", "nul \0 and \x1b[0m"),
    *("\u2028 \u2029 \x85 \x0b", '"quoted" \\ /', "\ufeffbom"),
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


# Streams.


@pytest.mark.checklist("D06", "D10")
def test_usage_in_a_stream(server: RunningServer) -> None:
    whole = ask_json(server.url, COMPLETIONS, n=2)["usage"]
    for is_continuous in (False, True):
        options = {"include_usage": True, "continuous_usage_stats": is_continuous}
        *chunks, last = ask_stream(server.url, COMPLETIONS, n=2, stream_options=options)
        assert (last["choices"], last["usage"]) == ([], whole)
        counts = [chunk["usage"] and chunk["usage"]["completion_tokens"] for chunk in chunks]
        if is_continuous:
            assert 1 <= counts[0] <= counts[-1] == whole["completion_tokens"]
        assert counts == (sorted(counts) if is_continuous else [None] * len(counts))
