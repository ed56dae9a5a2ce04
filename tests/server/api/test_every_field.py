"""Every request field takes effect, and an invalid value of it gives a 400 that names it.

A field takes effect if the submit or the answer differs from those of the same request without it. What it does is
tested elsewhere; these tests make sure that no field is forgotten.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest
from pydantic import BaseModel

from server.api.admin.schemas import DetokenizeRequest, LoadAdapterRequest, TokenizeRequest
from server.api.chat.schemas import ChatCompletionRequest
from server.api.completions.schemas import CompletionRequest
from server.api.embeddings.schemas import EmbeddingRequest
from server.api.messages.schemas import CountTokensRequest, MessagesRequest
from server.api.ollama.schemas import (
    OllamaChatRequest,
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
    OllamaGenerateRequest,
    OllamaShowRequest,
)
from server.api.rerank.schemas import RerankRequest, ScoreRequest
from server.api.responses.schemas import InputTokensRequest, ResponsesRequest
from tests.support.clients import CHAT, COMPLETIONS, MESSAGES, shared_server, write_adapter
from tests.support.serving import RunningServer
from tests.support.tool_model import say, write_tool_model

Fields = dict[str, Any]

RESPONSES, INPUT_TOKENS = "/v1/responses", "/v1/responses/input_tokens"
ANTHROPIC, COUNT = "/v1/messages", "/v1/messages/count_tokens"
RERANK, SCORE = "/v1/rerank", "/v1/score"
EMBEDDINGS, TOKENIZE, DETOKENIZE = "/v1/embeddings", "/tokenize", "/detokenize"
LOAD = "/v1/load_lora_adapter"
OLLAMA = ("/api/chat", "/api/generate", "/api/embed", "/api/embeddings", "/api/show")
OLLAMA_CHAT, OLLAMA_GENERATE, OLLAMA_EMBED, OLLAMA_EMBEDDINGS, OLLAMA_SHOW = OLLAMA

SCHEMA: Fields = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL: Fields = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
FORMAT: Fields = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}

CHAT_PROMPT: Fields = {"prompt": None, "messages": MESSAGES}
BEGUN: Fields = {"messages": [*MESSAGES, {"role": "assistant", "content": "A"}], "add_generation_prompt": False}

# Fields of all generating requests -> a value with effect, or (further required fields, the value).
SAMPLING: dict[str, Any] = {
    "n": 2,
    "stream": True,
    "stream_options": ({"stream": True}, {"include_usage": True}),
    "stream_interval": ({"stream": True}, 3),
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "logit_bias": {"7": 1},
    "allowed_token_ids": [7],
    "bad_words": ["a"],
    "seed": 8,
    "stop": "wor",
    "include_stop_str_in_output": ({"stop": "wor"}, True),
    "stop_token_ids": [7],
    "ignore_eos": True,
    "min_tokens": 2,
    "repetition_detection": {"max_pattern_size": 3, "min_count": 2},
    "skip_special_tokens": False,
    "priority": 3,
    "truncate_prompt_tokens": 1,
    "truncation_side": ({"truncate_prompt_tokens": 1}, "right"),
    "prompt_logprobs": 1,
    "return_token_ids": True,
    "cache_salt": "a",
    "response_format": FORMAT,
    "structured_outputs": {"regex": "[a-z]+"},
    "guided_json": SCHEMA,
    "guided_regex": "[a-z]+",
    "guided_choice": ["a", "b"],
    "guided_grammar": 'start: "a"',
    "json_schema": SCHEMA,
    "regex": "[a-z]+",
    "ebnf": 'root ::= "a"',
    "grammar": 'root ::= "a"',
    "lightwell": {"explain": True},
    "samplers": ["min_p"],
    "typical_p": 0.5,
    "top_n_sigma": 1.0,
    "xtc_probability": 0.5,
    "xtc_threshold": ({"xtc_probability": 0.5}, 0.2),
    "dry_multiplier": 0.8,
    "dry_base": ({"dry_multiplier": 0.8}, 2.0),
    "dry_allowed_length": ({"dry_multiplier": 0.8}, 3),
    "dry_penalty_last_n": ({"dry_multiplier": 0.8}, 7),
    "dry_sequence_breakers": ({"dry_multiplier": 0.8}, ["z"]),
    "repeat_penalty": 1.1,
    "repeat_last_n": 7,
    "mirostat": 2,
    "mirostat_tau": ({"mirostat": 2}, 3.0),
    "mirostat_eta": ({"mirostat": 2}, 0.5),
}

OLLAMA_ACTING: dict[str, Any] = {
    "model": "tiny:latest",
    "stream": True,
    "options": {"top_k": 5},
    "logprobs": True,
    "top_logprobs": ({"logprobs": True}, 2),
}
IGNORED = "ignored and named; ollama/test_routes.py"

ACTING: dict[str, tuple[type[BaseModel], Fields, dict[str, Any]]] = {
    COMPLETIONS: (
        CompletionRequest,
        {"model": "tiny", "prompt": "Hi", "seed": 7},
        SAMPLING
        | {
            "model": "org/tiny",
            "prompt": "Ho",
            "max_tokens": 5,
            "echo": True,
            "logprobs": 1,
            "best_of": 2,
            "post_sampling_probs": ({"logprobs": 1}, True),
            "logprob_token_ids": ({"logprobs": 1}, [7]),
            "return_tokens_as_token_ids": ({"logprobs": 1}, True),
        },
    ),
    CHAT: (
        ChatCompletionRequest,
        {"model": "tiny", "messages": MESSAGES, "seed": 7},
        SAMPLING
        | {
            "model": "org/tiny",
            "messages": [{"role": "user", "content": "Ho"}],
            "max_tokens": 5,
            "max_completion_tokens": 5,
            "echo": (BEGUN | {"continue_final_message": True}, True),
            "logprobs": True,
            "top_logprobs": ({"logprobs": True}, 2),
            "post_sampling_probs": ({"logprobs": True}, True),
            "logprob_token_ids": ({"logprobs": True}, [7]),
            "return_tokens_as_token_ids": ({"logprobs": True}, True),
            "return_prompt_text": True,
            "add_generation_prompt": False,
            "continue_final_message": (BEGUN, True),
            "chat_template_kwargs": {"enable_thinking": True},
            "include_reasoning": False,
            "thinking_token_budget": 5,
            "documents": [{"title": "a"}],
            "tools": [TOOL],
            "tool_choice": ({"tools": [TOOL]}, "required"),
            "parallel_tool_calls": ({"tools": [TOOL], "tool_choice": "required"}, False),
        },
    ),
    RESPONSES: (
        ResponsesRequest,
        {"model": "tiny", "input": "Hi", "seed": 7},
        {
            "model": "org/tiny",
            "input": "Ho",
            "instructions": "Be brief.",
            "max_output_tokens": 5,
            "temperature": 0.5,
            "top_p": 0.5,
            "stop": "wor",
            "chat_template_kwargs": {"enable_thinking": True},
            "truncation": "auto",
            "user": "me",
            "safety_identifier": "me",
            "prompt_cache_key": "a",
            "include": ["message.output_text.logprobs"],
            "top_logprobs": ({"include": ["message.output_text.logprobs"]}, 2),
            "tools": [{"type": "function", "name": "weather", "parameters": SCHEMA}],
            "tool_choice": ({"tools": [{"type": "function", "name": "weather"}]}, "required"),
            "parallel_tool_calls": ({"tools": [{"type": "function", "name": "weather"}]}, False),
            "max_tool_calls": 3,
            "text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}},
            "reasoning": {"effort": "low", "summary": "auto"},
            "metadata": {"a": "b"},
            "store": False,
            "background": True,
            "stream": True,
        },
    ),
    INPUT_TOKENS: (
        InputTokensRequest,
        {"model": "tiny", "input": "Hi"},
        {
            "input": "Hello",
            "instructions": "Be brief.",
            "chat_template_kwargs": {"enable_thinking": True},
            "tools": [{"type": "function", "name": "weather", "parameters": SCHEMA}],
            "reasoning": {"effort": "low"},
        },
    ),
    COUNT: (
        CountTokensRequest,
        {"model": "tiny", "messages": MESSAGES},
        {
            "messages": [{"role": "user", "content": "Hello"}],
            "system": "Be brief.",
            "tools": [{"name": "weather", "input_schema": SCHEMA}],
            "tool_choice": ({"tools": [{"name": "weather", "input_schema": SCHEMA}]}, {"type": "none"}),
            "thinking": {"type": "enabled", "budget_tokens": 1024},
        },
    ),
    ANTHROPIC: (
        MessagesRequest,
        {"model": "tiny", "messages": MESSAGES, "max_tokens": 9},
        {
            "model": "org/tiny",
            "messages": [{"role": "user", "content": "Ho"}],
            "system": "Be brief.",
            "tools": [{"name": "weather", "input_schema": SCHEMA}],
            "tool_choice": ({"tools": [{"name": "weather", "input_schema": SCHEMA}]}, {"type": "any"}),
            "thinking": {"type": "enabled", "budget_tokens": 5},
            "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
            "output_format": {"type": "json_schema", "schema": SCHEMA},
            "max_tokens": 5,
            "temperature": 0.5,
            "top_p": 0.5,
            "top_k": 5,
            "stop_sequences": ["ell"],
            "stream": True,
        },
    ),
    EMBEDDINGS: (
        EmbeddingRequest,
        {"model": "tiny", "input": "Hi"},
        {
            "model": "org/tiny",
            "input": "Ho",
            "encoding_format": "base64",
            "dimensions": 2,
            "truncate_prompt_tokens": 1,
            "truncation_side": ({"truncate_prompt_tokens": 1}, "right"),
            "priority": 3,
            "lightwell": {"explain": True},
        },
    ),
    RERANK: (
        RerankRequest,
        {"model": "tiny", "query": "a", "documents": ["a", "bc"]},
        {
            "model": "org/tiny",
            "query": "b",
            "documents": ["b"],
            "top_n": 1,
            "return_documents": False,
            "max_tokens_per_doc": 1,
            "priority": 3,
        },
    ),
    SCORE: (
        ScoreRequest,
        {"model": "tiny", "text_1": "a", "text_2": ["a", "bc"]},
        {"model": "org/tiny", "text_1": "b", "text_2": "b", "priority": 3},
    ),
    OLLAMA_CHAT: (
        OllamaChatRequest,
        {"model": "tiny", "messages": MESSAGES, "stream": False},
        OLLAMA_ACTING
        | {"messages": [{"role": "user", "content": "Ho"}], "tools": [TOOL], "think": True, "format": SCHEMA},
    ),
    OLLAMA_GENERATE: (
        OllamaGenerateRequest,
        {"model": "tiny", "prompt": "Hi", "stream": False},
        OLLAMA_ACTING
        | {
            "prompt": "Ho",
            "system": "Be brief.",
            "raw": True,
            "context": [7, 8],
            "think": True,
            "format": "json",
        },
    ),
    OLLAMA_EMBED: (
        OllamaEmbedRequest,
        {"model": "tiny", "input": "Hi"},
        {"model": "org/tiny", "input": ["Ho"], "dimensions": 2},
    ),
    OLLAMA_EMBEDDINGS: (OllamaEmbeddingsRequest, {"model": "tiny", "prompt": "Hi"}, {"prompt": "Ho"}),
    OLLAMA_SHOW: (OllamaShowRequest, {"model": "tiny"}, {"model": "org/tiny"}),
    TOKENIZE: (
        TokenizeRequest,
        {"prompt": "Hi"},
        {
            "prompt": "Ho",
            "return_token_strs": True,
            "tools": (CHAT_PROMPT, [TOOL]),
            "chat_template_kwargs": (CHAT_PROMPT, {"enable_thinking": True}),
            "add_generation_prompt": (CHAT_PROMPT, False),
            "continue_final_message": ({"prompt": None} | BEGUN, True),
        },
    ),
    DETOKENIZE: (DetokenizeRequest, {"tokens": [72]}, {"tokens": [73]}),
    LOAD: (
        LoadAdapterRequest,
        {"lora_name": "sql", "lora_path": "./sql", "load_inplace": True},
        {"lora_name": "chess"},
    ),
}

# Fields whose effect is not visible here, and why.
ELSEWHERE: dict[str, dict[str, str]] = {
    COMPLETIONS: {
        "suffix": "the tokenizer has no FIM tokens; completions/test_routes.py has one that does",
        "request_id": "a name for cancel and replay; test_requests",
        "queue_timeout": "how long it may wait; generation/test_overload",
        "add_special_tokens": "the tokenizer adds none; completions/test_routes.py has one that does",
        "thinking_token_budget": "completions have no reasoning; rejected",
    },
    CHAT: {
        "add_special_tokens": "the tokenizer adds none; chat/test_conversion.py has one that does",
        "reasoning_effort": "the template knows none; chat/test_conversion.py has one that does",
        "request_id": "a name for cancel and replay; test_requests",
        "queue_timeout": "how long it may wait; generation/test_overload",
    },
    RESPONSES: {
        "previous_response_id": "responses/test_routes.py",
        "service_tier": "there is one tier",
        "stream_options": "nothing is obfuscated",
    },
    INPUT_TOKENS: {
        "model": "any of the names, or none",
        "previous_response_id": "responses/test_routes.py",
        "truncation": "responses/test_truncation.py",
        **dict.fromkeys(
            (
                *("max_output_tokens", "temperature", "top_p", "include", "top_logprobs", "stop", "tool_choice"),
                *("parallel_tool_calls", "max_tool_calls", "text", "metadata", "user", "safety_identifier"),
                *("prompt_cache_key", "service_tier", "store", "background", "stream", "stream_options"),
            ),
            "the prompt is the same",
        ),
    },
    COUNT: {
        "model": "any of the names",
        "output_config": "the prompt is the same",
        "output_format": "the prompt is the same",
    },
    ANTHROPIC: {"metadata": "accepted", "service_tier": "accepted"},
    EMBEDDINGS: {
        "add_special_tokens": "the tokenizer adds none",
        "queue_timeout": "how long it may wait; generation/test_overload",
    },
    RERANK: {
        "instruction": "only for rerankers; rerank/test_routes.py",
        "queue_timeout": "how long it may wait; generation/test_overload",
    },
    SCORE: {
        "queue_timeout": "how long it may wait; generation/test_overload",
        "instruction": "only for rerankers; rerank/test_routes.py",
        "queries": "instead of text_1; rerank/test_routes.py",
        "documents": "instead of text_2; rerank/test_routes.py",
    },
    TOKENIZE: {
        "model": "any of the names",
        "messages": "instead of a prompt; test_tokenize",
        "add_special_tokens": "the tokenizer adds none; test_tokenize has one that does",
    },
    DETOKENIZE: {"model": "any of the names"},
    OLLAMA_CHAT: {"keep_alive": IGNORED},
    OLLAMA_GENERATE: {
        "keep_alive": IGNORED,
        "suffix": "as in completions",
        "template": "only empty",
        "images": "only empty",
    },
    OLLAMA_EMBED: {"keep_alive": IGNORED, "options": IGNORED, "truncate": "ollama/test_routes.py"},
    OLLAMA_EMBEDDINGS: {"model": "any of the names", "keep_alive": IGNORED, "options": IGNORED},
    OLLAMA_SHOW: {"name": "alias of model; ollama/test_routes.py"},
    LOAD: {"lora_path": "test_adapters", "load_inplace": "test_adapters", "base_model_name": "test_model_route"},
}
# At least one of these values is invalid for any field.
WRONG: list[Any] = [{"?": "?"}, [5.5], "\ud800", -7.5, True, "?"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = write_tool_model(tmp_path_factory.mktemp("model"), special_tags=True)
    write_adapter(folder / "sql")
    settings = {"allow_runtime_lora_updating": True}
    with (
        pytest.MonkeyPatch.context() as patch,
        shared_server(folder, settings=settings, vocab_size=263, max_loras=8) as server,
    ):
        patch.chdir(folder)
        say(server, "<think>Hm.</think>Hello, <|im_end|>world, hello, world!")
        yield server


def post(server: RunningServer, path: str, body: Fields) -> httpx.Response:
    """Send a request. Lone surrogates in strings are allowed."""
    return httpx.post(server.url + path, content=json.dumps(body), headers={"content-type": "application/json"})


def seen(server: RunningServer, path: str, body: Fields) -> tuple[str, list[Any]]:
    """Return the answer and the submits, without ids and times."""
    num_submits = len(server.engine.submits)
    answer = post(server, path, body)
    assert answer.status_code == 200, answer.text
    text = re.sub(r'"(id|item_id|response_id|call_id)":"[^"]*"', "", answer.text)
    text = re.sub(r'"(created|created_at|[a-z_]+_s|[a-z_]+_duration)":([0-9.e-]+|"[^"]*")', "", text)
    submits = [msgspec.to_builtins(submit) for submit in server.engine.submits[num_submits:]]
    for submit in submits:
        for name in ("request_id", "arrival", "ids"):
            del submit[name]
        if "seed" not in body:
            submit["params"].pop("seed", None)
    return text, submits


def complaint(answer: httpx.Response) -> str:
    """Return the parameter and the message of an error, in any of the envelopes."""
    error = answer.json()["error"]
    return error if isinstance(error, str) else f"{error.get('param')} {error['message']}"


FIELDS = [(path, name) for path, (model, _, _) in ACTING.items() for name in model.model_fields]


@pytest.mark.parametrize(("path", "name"), FIELDS)
def test_every_field_acts(server: RunningServer, path: str, name: str) -> None:
    _, base, acting = ACTING[path]
    assert (name in acting) != (name in ELSEWHERE[path]), "say how it acts, or why that is not seen here"
    if name in acting:
        value = acting[name]
        others, value = value if isinstance(value, tuple) else ({}, value)
        without = base | others
        server.engine.config.step_seconds = (
            0.005 if name == "stream_interval" else 0.0
        )  # otherwise several steps may arrive as one event
        assert seen(server, path, without | {name: value}) != seen(server, path, without)


@pytest.mark.parametrize(("path", "name"), FIELDS)
def test_every_field_refuses_what_is_wrong(server: RunningServer, path: str, name: str) -> None:
    _, base, acting = ACTING[path]
    others = acting[name][0] if isinstance(acting.get(name), tuple) else {}
    if name == "messages" and path == TOKENIZE:
        base = {}
    refused = []
    for value in WRONG:
        answer = post(server, path, base | others | {name: value})
        assert answer.status_code in (200, 400, 404), answer.text
        if answer.status_code != 200:
            assert name in complaint(answer)
            refused.append(value)
    assert len(refused) >= 3


@pytest.mark.checklist("C16")
def test_no_field_is_forgotten() -> None:
    for path, (model, _, acting) in ACTING.items():
        assert set(model.model_fields) == set(acting) | set(ELSEWHERE[path]), path


@pytest.mark.parametrize("path", ACTING)
def test_fields_of_other_endpoints_are_ignored_or_refused(server: RunningServer, path: str) -> None:
    own, base, _ = ACTING[path]
    names = {name for model, _, _ in ACTING.values() for name in model.model_fields}
    for name in sorted(names - set(own.model_fields)):
        for value in (True, "a", [{"role": {"explain": True}}]):
            answer = post(server, path, base | {name: value})
            assert answer.status_code in (200, 400), (name, value, answer.text)
            if answer.status_code == 400:
                assert name in complaint(answer)
