"""Requests of all endpoints against their contract: each field has an effect, and what is refused is named.

A field has an effect if the submits or the answer differ from those of the same request without it. What it does is
tested elsewhere; these tests make sure that no field is forgotten.
"""

import json
import re
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from pydantic import BaseModel, ValidationError

from engine.shared.messages import Ask, LoadAdapter, Submit
from server.api.chat.schemas import ChatCompletionRequest
from server.api.completions.schemas import CompletionRequest
from server.parts.conversions.chat_requests import EXTENSIONS
from server.parts.embeddings.part import EmbeddingRequest
from server.parts.inspection.inspect import InspectRequest
from server.parts.lora.part import LoadAdapterRequest
from server.parts.messages.schemas import CountTokensRequest, MessagesRequest
from server.parts.ollama import schemas as ollama
from server.parts.rerank.part import RerankRequest, ScoreRequest
from server.parts.responses.schemas import InputTokensRequest, ResponsesRequest
from server.parts.tokenization.part import MAX_DETOKENIZE_TOKENS, MAX_TEXT_BYTES, DetokenizeRequest, TokenizeRequest
from server.schemas.generation_request import GenerationRequest
from tests.server.dialects import COUNT, DETOKENIZE, EMBEDDINGS, INPUT_TOKENS, LOAD, TOKENIZE, error_of
from tests.server.kinds import Servers
from tests.support import clients
from tests.support.clients import ANTHROPIC, CHAT, COMPLETIONS, MESSAGES, OLLAMA_CHAT, OLLAMA_GENERATE, RESPONSES
from tests.support.serving import RunningServer
from tests.support.tool_model import say

Fields = dict[str, Any]

RERANK, SCORE, INSPECT = "/v1/rerank", "/v1/score", "/lightwell/v1/inspect"
OLLAMA_EMBED, OLLAMA_EMBEDDINGS, OLLAMA_SHOW = "/api/embed", "/api/embeddings", "/api/show"
SCHEMA: Fields = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL: Fields = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
FORMAT: Fields = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}

CHAT_PROMPT: Fields = {"prompt": None, "messages": MESSAGES}
BEGUN: Fields = {"messages": [*MESSAGES, {"role": "assistant", "content": "A"}], "add_generation_prompt": False}

# Fields of all generating requests -> a value with effect, or (further required fields, the value).
DRY: Fields = {"dry_multiplier": 0.8}
SAMPLING: dict[str, Any] = (
    {"n": 2, "stream": True, "stream_options": ({"stream": True}, {"include_usage": True}), "return_token_ids": True}
    | {"temperature": 0.5, "top_p": 0.5, "top_k": 5, "min_p": 0.1, "typical_p": 0.5, "top_n_sigma": 1.0, "seed": 8}
    | {"repetition_penalty": 1.1, "frequency_penalty": 0.5, "presence_penalty": 0.5, "samplers": ["min_p"]}
    | {"logit_bias": {"7": 1}, "allowed_token_ids": [7], "bad_words": ["a"], "prompt_logprobs": 1}
    | {"stop": "wor", "include_stop_str_in_output": ({"stop": "wor"}, True), "stop_token_ids": [7]}
    | {"ignore_eos": True, "min_tokens": 2, "repetition_detection": {"max_pattern_size": 3, "min_count": 2}}
    | {"truncate_prompt_tokens": 1, "truncation_side": ({"truncate_prompt_tokens": 1}, "right"), "cache_salt": "a"}
    | {"skip_special_tokens": False, "priority": 3, "lightwell": {"explain": True}}
    | {"response_format": FORMAT, "structured_outputs": {"regex": "[a-z]+"}, "json_schema": SCHEMA}
    | {"regex": "[a-z]+", "ebnf": 'root ::= "a"', "grammar": 'root ::= "a"'}
    | {"xtc_probability": 0.5, "xtc_threshold": ({"xtc_probability": 0.5}, 0.2)}
    | DRY
    | {"dry_base": (DRY, 2.0), "dry_allowed_length": (DRY, 3), "dry_penalty_last_n": (DRY, 7)}
    | {"dry_sequence_breakers": (DRY, ["z"]), "repeat_penalty": 1.1, "repeat_last_n": 7}
    | {"mirostat": 2, "mirostat_tau": ({"mirostat": 2}, 3.0), "mirostat_eta": ({"mirostat": 2}, 0.5)}
)

SAMPLED = {name: value for name, value in SAMPLING.items() if name in EXTENSIONS}  # by the other dialects as well
LOGPROBS: dict[str, Any] = {"post_sampling_probs": True, "logprob_token_ids": [7], "return_tokens_as_token_ids": True}
OLLAMA_ACTING: dict[str, Any] = {"model": "tiny:latest", "stream": True, "options": {"top_k": 5}, "logprobs": True}
OLLAMA_ACTING |= {"top_logprobs": ({"logprobs": True}, 2)}
THINKING: Fields = {"chat_template_kwargs": {"enable_thinking": True}, "thinking_token_budget": 5}
RESPONSES_TOOL: Fields = {"type": "function", "name": "weather", "parameters": SCHEMA}
ANTHROPIC_TOOL: Fields = {"name": "weather", "input_schema": SCHEMA}
INCLUDED: Fields = {"include": ["message.output_text.logprobs"]}
OUTPUT_FORMAT: Fields = {"type": "json_schema", "schema": SCHEMA}

# Endpoint -> the class of its request, a request, and as in SAMPLING fields with a value that has an effect.
HO: list[Fields] = [{"role": "user", "content": "Ho"}]
ACTING: dict[str, tuple[type[BaseModel], Fields, dict[str, Any]]] = {
    COMPLETIONS: (
        CompletionRequest,
        {"model": "tiny", "prompt": "Hi", "seed": 7},
        SAMPLING
        | {name: ({"logprobs": 1}, value) for name, value in LOGPROBS.items()}
        | {"model": "org/tiny", "prompt": "Ho", "max_tokens": 5, "echo": True, "logprobs": 1, "best_of": 2},
    ),
    CHAT: (
        ChatCompletionRequest,
        {"model": "tiny", "messages": MESSAGES, "seed": 7},
        SAMPLING
        | THINKING
        | {name: ({"logprobs": True}, value) for name, value in LOGPROBS.items()}
        | {"model": "org/tiny", "messages": HO, "max_tokens": 5, "max_completion_tokens": 5, "include_reasoning": False}
        | {"logprobs": True, "top_logprobs": ({"logprobs": True}, 2), "return_prompt_text": True}
        | {"add_generation_prompt": False, "continue_final_message": (BEGUN, True)}
        | {"echo": (BEGUN | {"continue_final_message": True}, True), "documents": [{"title": "a"}]}
        | {"tools": [TOOL], "tool_choice": ({"tools": [TOOL]}, "required")}
        | {"parallel_tool_calls": ({"tools": [TOOL], "tool_choice": "required"}, False)},
    ),
    RESPONSES: (
        ResponsesRequest,
        {"model": "tiny", "input": "Hi", "seed": 7},
        SAMPLED
        | THINKING
        | {"model": "org/tiny", "input": "Ho", "instructions": "Be brief.", "max_output_tokens": 5, "stop": "wor"}
        | {"truncation": "auto", "user": "me", "safety_identifier": "me", "prompt_cache_key": "a", "store": False}
        | INCLUDED
        | {"top_logprobs": (INCLUDED, 2), "return_tokens_as_token_ids": (INCLUDED, True)}
        | {"tools": [RESPONSES_TOOL], "tool_choice": ({"tools": [RESPONSES_TOOL]}, "required"), "max_tool_calls": 3}
        | {"parallel_tool_calls": ({"tools": [RESPONSES_TOOL]}, False), "metadata": {"a": "b"}}
        | {"text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}}
        | {"reasoning": {"effort": "low", "summary": "auto"}, "background": True, "stream": True},
    ),
    INPUT_TOKENS: (
        InputTokensRequest,
        {"model": "tiny", "input": "Hi"},
        {"input": "Hello", "instructions": "Be brief.", "tools": [RESPONSES_TOOL], "reasoning": {"effort": "low"}}
        | {"chat_template_kwargs": {"enable_thinking": True}},
    ),
    ANTHROPIC: (
        MessagesRequest,
        {"model": "tiny", "messages": MESSAGES, "max_tokens": 60, "seed": 7},
        SAMPLED
        | THINKING
        | {"model": "org/tiny", "messages": HO, "system": "Be brief.", "max_tokens": 5, "stream": True}
        | {"stop_sequences": ["ell"], "include_stop_str_in_output": ({"stop_sequences": ["wor"]}, True)}
        | {"tools": [ANTHROPIC_TOOL], "tool_choice": ({"tools": [ANTHROPIC_TOOL]}, {"type": "any"})}
        | {"thinking": {"type": "enabled", "budget_tokens": 5}, "output_format": OUTPUT_FORMAT}
        | {"output_config": {"format": OUTPUT_FORMAT}},
    ),
    COUNT: (
        CountTokensRequest,
        {"model": "tiny", "messages": MESSAGES},
        {"messages": [{"role": "user", "content": "Hello"}], "system": "Be brief.", "tools": [ANTHROPIC_TOOL]}
        | {"tool_choice": ({"tools": [ANTHROPIC_TOOL]}, {"type": "none"})}
        | {"thinking": {"type": "enabled", "budget_tokens": 1024}},
    ),
    EMBEDDINGS: (
        EmbeddingRequest,
        {"model": "tiny", "input": "Hi"},
        {"model": "org/tiny", "input": "Ho", "encoding_format": "base64", "dimensions": 2, "priority": 3}
        | {"truncate_prompt_tokens": 1, "truncation_side": ({"truncate_prompt_tokens": 1}, "right")}
        | {"lightwell": {"explain": True}},
    ),
    RERANK: (
        RerankRequest,
        {"model": "tiny", "query": "a", "documents": ["a", "bc"]},
        {"model": "org/tiny", "query": "b", "documents": ["b"], "top_n": 1, "priority": 3}
        | {"return_documents": False, "max_tokens_per_doc": 1},
    ),
    SCORE: (
        ScoreRequest,
        {"model": "tiny", "text_1": "a", "text_2": ["a", "bc"]},
        {"model": "org/tiny", "text_1": "b", "text_2": "b", "priority": 3},
    ),
    OLLAMA_CHAT: (
        ollama.OllamaChatRequest,
        {"model": "tiny", "messages": MESSAGES, "stream": False},
        OLLAMA_ACTING | {"messages": HO, "tools": [TOOL], "think": True, "format": SCHEMA},
    ),
    OLLAMA_GENERATE: (
        ollama.OllamaGenerateRequest,
        {"model": "tiny", "prompt": "Hi", "stream": False},
        OLLAMA_ACTING
        | {"prompt": "Ho", "system": "Be brief.", "raw": True, "context": [7, 8], "think": True, "format": "json"},
    ),
    OLLAMA_EMBED: (
        ollama.OllamaEmbedRequest,
        {"model": "tiny", "input": "Hi"},
        {"model": "org/tiny", "input": ["Ho"], "dimensions": 2},
    ),
    OLLAMA_EMBEDDINGS: (ollama.OllamaEmbeddingsRequest, {"model": "tiny", "prompt": "Hi"}, {"prompt": "Ho"}),
    OLLAMA_SHOW: (ollama.OllamaShowRequest, {"model": "tiny"}, {"model": "org/tiny"}),
    TOKENIZE: (
        TokenizeRequest,
        {"prompt": "Hi"},
        {"prompt": "Ho", "return_token_strs": True, "tools": (CHAT_PROMPT, [TOOL])}
        | {"chat_template_kwargs": (CHAT_PROMPT, {"enable_thinking": True})}
        | {"add_generation_prompt": (CHAT_PROMPT, False), "continue_final_message": ({"prompt": None} | BEGUN, True)},
    ),
    DETOKENIZE: (DetokenizeRequest, {"tokens": [72]}, {"tokens": [73]}),
    LOAD: (
        LoadAdapterRequest,
        {"lora_name": "sql", "lora_path": "./sql", "load_inplace": True},
        {"lora_name": "chess"},
    ),
}

# Fields whose effect is not visible here. Of all endpoints: a name for cancel and replay (admin/test_routes.py), how
# long it may wait (generation/test_overload.py), how many tokens a chunk has (generation/test_deltas.py), and special
# tokens, of which the tokenizer adds none (completions/test_routes.py has one that does).
ANYWHERE = {"request_id", "queue_timeout", "stream_interval", "add_special_tokens"}
ELSEWHERE: dict[str, set[str]] = {
    # The tokenizer has no FIM tokens (completions/test_routes.py has one that does), and there is no reasoning.
    COMPLETIONS: {"suffix", "thinking_token_budget"},
    CHAT: {"reasoning_effort"},  # the template knows none; chat/test_routes.py has one that does
    # responses/test_routes.py has the first; there is one tier, and nothing is obfuscated.
    RESPONSES: {"previous_response_id", "service_tier", "stream_options"},
    # responses/ has the first two; any name of the model will do, and the prompt is the same whatever the others are.
    INPUT_TOKENS: {"previous_response_id", "truncation", "model"}
    | {"max_output_tokens", "temperature", "top_p", "include", "top_logprobs", "stop", "tool_choice", "text"}
    | {"parallel_tool_calls", "max_tool_calls", "metadata", "user", "safety_identifier", "prompt_cache_key"}
    | {"service_tier", "store", "background", "stream", "stream_options"},
    # The first two are accepted; answers have no log probabilities.
    ANTHROPIC: {"metadata", "service_tier", "return_tokens_as_token_ids"},
    COUNT: {"model", "output_config", "output_format"},  # the prompt is the same
    # embeddings/test_routes.py
    RERANK: {"instruction"},
    SCORE: {"instruction", "queries", "documents"},
    TOKENIZE: {"model", "messages"},  # the messages are instead of a prompt: admin/test_routes.py
    DETOKENIZE: {"model"},
    # ollama/ has what is ignored and named, and aliases. Templates and images may only be empty.
    OLLAMA_CHAT: {"keep_alive"},
    OLLAMA_GENERATE: {"keep_alive", "suffix", "template", "images"},
    OLLAMA_EMBED: {"keep_alive", "options", "truncate"},
    OLLAMA_EMBEDDINGS: {"model", "keep_alive", "options"},
    OLLAMA_SHOW: {"name"},
    LOAD: {"lora_path", "load_inplace", "base_model_name"},  # admin/test_lora_adapters.py
}


def fields_of(path: str) -> list[str]:
    """Return the names of all fields of an endpoint's requests."""
    extensions = EXTENSIONS if path in (RESPONSES, ANTHROPIC) else ()
    return sorted({*ACTING[path][0].model_fields, *extensions})


# What is refused: the field that the error names -> requests as fields beside those in ACTING (... for a missing one).


def each(name: str, /, *values: Any, **others: Any) -> list[Fields]:
    """Return fields with each of these values."""
    return [others | {name: value} for value in values]


def messages(*contents: Any, role: str = "user") -> Fields:
    return {"messages": [{"role": role, "content": content} for content in contents]}


def functions(name: str, /, *values: Any, **others: Any) -> list[Fields]:
    """Return tools of chat requests."""
    return [{"tools": [{"type": "function", "function": function}]} for function in each(name, *values, **others)]


def earlier_calls(*calls: Any) -> list[Fields]:
    return [{"messages": [{"role": "assistant", "tool_calls": [call]}]} for call in calls]


def document(source: Fields) -> Fields:
    return messages([{"type": "document", "source": source}])


def item(**fields: Any) -> Fields:
    return {"input": [fields]}


def named(name: str) -> Fields:
    return {"type": "function", "function": {"name": name}}


ALLOWED: Fields = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named("g")]}}
PDF: Fields = {"type": "base64", "media_type": "application/pdf", "data": "AAAA"}
LONG_MESSAGE: Fields = {"role": "user", "content": "ü" * (MAX_TEXT_BYTES // 2 + 1)}
CALL: Fields = {"id": "x", "name": "x", "input": {}}
BAD_SCHEMA: Fields = {"type": "json_schema", "schema": {"type": "x"}}
NO_ARGUMENTS: Fields = {"function": {"name": "f"}}
EMPTY_ARGUMENTS: Fields = {"function": {"name": "f", "arguments": ""}}
NO_TEXT: Fields = {"function": {"name": "f", "arguments": {}}}
REFUSED: dict[str, dict[str, list[Fields]]] = {
    COMPLETIONS: {
        "prompt": [
            *each("prompt", "", [], [[]], [""], None, 5, 1.5, True, {}, {"prompt": "a"}, ["a"] * 1025, ["a"] * 300),
            *each("prompt", ["a", ""], [[1], []], ["a", 1], ["a", []], ["a", [259]], [1, "a"], [[1], 2], [["a"]]),
            *each("prompt", [-1], [259], [2**40], [2**80], [1.0], [True], [None], [[1], [259]], [[1], [True]], [[[1]]]),
        ],
        "logprobs": each("logprobs", 21, -1, 1.0, True, "1", []),
        "max_completion_tokens": each("max_completion_tokens", 5),
        "max_tokens": [{"max_tokens": 0}, {"max_tokens": 0, "echo": False}],
        "n": each("n", 100, prompt=["a"] * 100),
    },
    CHAT: {
        "messages": each("messages", None, [], "Hi", {}, 5),
        "messages[1]": each("messages", [*MESSAGES, 5], [*MESSAGES, None]),
        "messages[0].role": each("messages", [{}], *([{"content": "", "role": role}] for role in ("wizard", 5, None))),
        "messages[0].content": [
            *map(messages, (None, 5, True, {}, "\ud800")),
            *each("messages", [{"role": "user", "content": None, "reasoning": "Hm"}]),
        ],
        "messages[0].content[0].type": [messages([{"text": "a"}])],
        "messages[0].content[0].text": [messages([{"type": "text"}]), messages([{"type": "text", "text": 5}])],
        "messages[1].content": each("messages", [*MESSAGES, {"role": "developer", "content": None}]),
        "messages[0].name": each("messages", [MESSAGES[0] | {"name": 5}], [MESSAGES[0] | {"name": "\udfff"}]),
        "top_logprobs": [*each("top_logprobs", 21, -1, 1.0, True, "1", logprobs=True), {"top_logprobs": 1}],
        "logprobs": each("logprobs", 0, 1),
        "max_completion_tokens": each("max_completion_tokens", 0, -2, 1.0, True, "5"),
        "max_tokens": each("max_tokens", 7, max_completion_tokens=8),
        **{name: each(name, "true", 1, []) for name in ("echo", "add_special_tokens", "return_prompt_text")},
        "continue_final_message": [
            {"continue_final_message": True} | fields
            for fields in ({}, BEGUN | {"add_generation_prompt": True}, *earlier_calls(EMPTY_ARGUMENTS))
        ],
        "tools": each("tools", {}, "x", [TOOL, TOOL], [named(f"f{number}") for number in range(129)]),
        "tools[0].type": each("tools", [{"type": "custom"}], [{"function": {"name": "f"}}]),
        "tools[0].function.name": functions("name", "", "a b", "é", "a" * 129, "a.b", 5, None),
        "tools[0].function.parameters": functions("parameters", [], {"type": "string"}, {"type": ["object"]}, name="f"),
        "tools[0].function.strict": functions("strict", "yes", name="f"),
        "tool_choice": [
            *each("tool_choice", "required", named("g")),
            *each("tool_choice", "always", named("g"), ALLOWED, tools=[TOOL]),
        ],
        "structured_outputs": each("structured_outputs", {"regex": "a"}, tools=[TOOL], tool_choice="required"),
        "regex": each("regex", "a", tools=[TOOL], tool_choice=named("weather")),
        "tool_choice.type": each("tool_choice", {}, {"type": "custom"}, tools=[TOOL]),
        "tool_choice.function.name": each("tool_choice", {"type": "function", "function": {}}, tools=[TOOL]),
        "messages[0].tool_calls[0]": earlier_calls(5),
        "messages[0].tool_calls[0].function.arguments": earlier_calls(NO_ARGUMENTS, NO_TEXT),
    },
    RESPONSES: {
        "input": each("input", [], 5, None, [{"type": "web_search_call"}]),
        "input[0].content": [item(role="user")],
        "input[0].content[0].type": [item(role="user", content=[{"type": "file"}])],
        "input[0].type": [item(type="compaction", id="x"), item(type=["message"])],
        "input[0]": [item(type="custom_tool_call", call_id="1"), item(type="shell_call", call_id="1", action=5)],
        "input[0].call_id": [item(type="shell_call", action={}), item(type="shell_call_output", output=[])],
        "tools[0].type": each("tools", [{}], [{"type": 5}]),
        "tools": each("tools", [RESPONSES_TOOL, RESPONSES_TOOL]),
        "tools[0].name": each("tools", [RESPONSES_TOOL | {"name": "a b"}]),
        "tool_choice.tools[0].type": each("tool_choice", {"type": "allowed_tools", "mode": "auto", "tools": [{}]}),
        "tools[1].parameters": each("tools", [{"type": "shell"}, RESPONSES_TOOL | {"parameters": {"type": "array"}}]),
        "text.format.name": each("text", {"format": {"type": "json_schema", "name": "a b", "schema": {}}}),
        "text.format.schema": each("text", {"format": BAD_SCHEMA | {"name": "a"}}),
        "text.verbosity": each("text", {"verbosity": "some"}),
        "tool_choice": [
            *each("tool_choice", "required", "some", {"type": "function", "name": "weather"}),
            *each("tool_choice", {"type": "function", "name": "time"}, tools=[RESPONSES_TOOL]),
            *each("tool_choice", {"type": "function", "name": "time"}, tools=[{"type": "shell"}]),
            *each("tool_choice", {"type": "custom", "name": "time"}, tools=[{"type": "shell"}, RESPONSES_TOOL]),
        ],
        "reasoning.effort": each("reasoning", {"effort": "some"}),
        "reasoning.summary": each("reasoning", {"summary": "some"}),
        "top_logprobs": each("top_logprobs", 2),
        "background": each("background", True, store=False),
        "metadata.a": each("metadata", {"a": 1}),
        "metadata": each("metadata", {"a": "b" * 513}),
    },
    INPUT_TOKENS: {"input": each("input", None)},
    ANTHROPIC: {
        "max_tokens": each("max_tokens", ..., 0),
        "temperature": each("temperature", 1.5, "1"),
        "stop_sequences": each("stop_sequences", "x", list(map(str, range(65)))),
        "system[0].type": each("system", [{"type": "image"}]),
        "messages": [*each("messages", ..., []), messages([{"type": "tool_use"} | CALL], role="assistant")],
        "messages[0].role": [messages("x", role="tool")],
        "messages[0].content": [messages([]), {"messages": [{"role": "user"}]}],
        "messages[0].content[0].tool_use_id": [messages([{"type": "tool_result"}])],
        "messages[0].content[0].source.type": [document(PDF), document({"type": "url", "url": "http://x"})],
        "messages[0].content[0].source.media_type": [document(PDF | {"type": "text"})],
        "messages[0].content[0].source": [messages([{"type": "document"}])],
        "messages[0].clear_at": each("messages", [{"role": "system", "content": "A", "clear_at": "soon"}]),
        "tools": each("tools", [ANTHROPIC_TOOL, ANTHROPIC_TOOL]),
        "tools[0].name": each("tools", [ANTHROPIC_TOOL | {"name": "a b"}]),
        "tools[0].input_schema": each("tools", [ANTHROPIC_TOOL | {"input_schema": {"type": "string"}}]),
        "tools[0].strict": each("tools", [ANTHROPIC_TOOL | {"strict": "yes"}], [ANTHROPIC_TOOL | {"strict": 1}]),
        "tool_choice.name": each("tool_choice", {"type": "tool"}),
        "tool_choice.type": each("tool_choice", {"type": "some"}),
        "tool_choice": each("tool_choice", {"type": "tool", "name": "x"}),
        "tool_choice.disable_parallel_tool_use": [{"tool_choice": {"type": "auto", "disable_parallel_tool_use": "no"}}],
        "thinking.type": each("thinking", {"type": "perhaps"}),
        "thinking.budget_tokens": each("thinking", *each("budget_tokens", 0, 1.5, "5", True, None, type="enabled")),
        "thinking.display": each("thinking", *each("display", "full", True, type="adaptive")),
        "output_config.effort": each("output_config", *each("effort", "much", 5, "none")),
        "output_config.format.schema": each("output_config", {"format": BAD_SCHEMA}),
        "output_format.schema": each("output_format", BAD_SCHEMA),
    },
    EMBEDDINGS: {
        "input": each("input", "", [], ["a", ""], [[1], []], [259], [-1], ["a", 1], None, {}, ..., ["a"] * 2049),
        "dimensions": each("dimensions", 0, 65, 2.5),
    },
    RERANK: {
        "documents": each("documents", [], ["a"] * 2049),
        "documents[1]": each("documents", ["a", 5], ["a", ""], ["a", {"text": "a", "title": "b"}]),
        "query": each("query", None, ""),
        "top_n": each("top_n", 0),
        "max_tokens_per_doc": each("max_tokens_per_doc", 0),
    },
    SCORE: {
        "text_1": each("text_1", ..., ""),
        "text_2": each("queries", "a", text_1=..., text_2=...),
        "queries": [
            {"text_2": ..., "queries": "a", "documents": "b"},
            {"text_1": ..., "text_2": ..., "queries": ["a", "b"], "documents": ["a", "b", "c"]},
        ],
        "documents[0]": each("documents", [5], text_1=..., text_2=..., queries="a"),
        "text_2[1]": each("text_2", ["a", ""]),
    },
    TOKENIZE: {
        "prompt": each("prompt", ..., None, 5, ["x"], "x" * (MAX_TEXT_BYTES + 1)),
        "messages": [{"messages": MESSAGES}, *each("messages", [], [LONG_MESSAGE], prompt=...)],
        "messages[0].role": each("messages", [{"role": "robot"}], prompt=...),
        "tools[0].type": [CHAT_PROMPT | {"tools": [{}]}],
        "chat_template": [CHAT_PROMPT | {"chat_template": "{{ 1 }}"}],
        "truncate_prompt_tokens": each("truncate_prompt_tokens", 1),
    },
    DETOKENIZE: {
        "tokens": each("tokens", [259], [2**40], "abc", None, [1] * (MAX_DETOKENIZE_TOKENS + 1)),
        "tokens[0]": each("tokens", [-1], [1.5], [True], ["1"]),
    },
    LOAD: {
        "lora_name": each("lora_name", ..., "", "a,b", "a" * 129, 5, "tiny"),
        "lora_path": each("lora_path", ..., "", "/nothing/there", "x\0y", "~\0x", "~\0/x"),
    },
    OLLAMA_CHAT: {
        "options.temperature": each("options", {"temperature": "3"}),
        "options.stop[0]": each("options", {"stop": [7]}),
        "very": each("think", "very"),
        "messages[0].images": each("messages", [MESSAGES[0] | {"images": ["aGk="]}]),
        "tools[0].function.name": each("tools", [{"function": {"name": "a b"}}]),
        "n": each("n", 2),
        "format": each("format", {"not": {}}),
    },
    OLLAMA_GENERATE: {
        "context": [*each("context", [10**6]), *each("context", [1], raw=True), *each("context", [1], suffix="x")],
        "suffix": each("suffix", "b"),
        "system": each("system", "x", raw=True),
        "template": each("template", "{{ .Prompt }}", raw=True),
        "images": each("images", ["aGk="], raw=True),
    },
    INSPECT: {
        "id": [{"prompt": ...}, {"prompt": ..., "id": 7}],
        "prompt": [{"id": "a"}, *each("prompt", "", [1000], {})],
        "model": each("model", "tiny", prompt=..., id="a"),
        "head": [{"layer": 0}, {"layer": 0, "head": 99}],
        "layer": [{"head": 0}, {"layer": 99, "head": 0}],
        "top": each("top", 0, 21),
        "start": each("start", -1),
        "end": each("end", 0),
    },
}

# What is refused with a message of its own: how it begins.
ONLY_TEXT = "Invalid 'messages[0].content': the model reads only text;"
NOT_YET = "Unsupported parameter: '{}' is not supported yet."
TOO_LONG: Fields = {"type": "enabled", "budget_tokens": 60}
TWO_FORMATS: Fields = {"output_format": BAD_SCHEMA, "output_config": {"format": BAD_SCHEMA}}
MESSAGES_OF_REFUSALS: list[tuple[str, Fields, str]] = [
    (COMPLETIONS, {"suffix": "b"}, "Invalid 'suffix': not supported by this model, which has no fill-in-the-middle"),
    (CHAT, {"messages": [{"role": "user"}]}, "Missing required parameter: 'messages[0].content'."),
    *(
        (CHAT, messages([{"type": kind}]), f"{ONLY_TEXT} parts of type {kind!r} are not supported")
        for kind in ("image_url", "input_audio", "file", 5, ["text"])
    ),
    *((RESPONSES, {name: "x"}, NOT_YET.format(name)) for name in ("prompt", "conversation", "n", "messages")),
    (RESPONSES, {"stream_options": {}}, "The 'stream_options' parameter is only allowed"),
    (RESPONSES, {"metadata": {"a" * 65: ""}}, "Invalid 'metadata': expected keys of at most 64 characters"),
    *((ANTHROPIC, {name: 2}, NOT_YET.format(name)) for name in ("n", "return_token_ids")),
    (COUNT, {"n": 2}, f"{NOT_YET.format('n')} It is a parameter of /v1/chat/completions."),
    (ANTHROPIC, messages([{"type": "image"}]), "messages[0].content[0].type: Invalid value: 'image'. Supported values"),
    (ANTHROPIC, {"tool_choice": {"type": "any"}}, "Invalid 'tool_choice': only allowed when 'tools' are given."),
    (ANTHROPIC, {"thinking": TOO_LONG}, "`max_tokens` must be greater than `thinking.budget_tokens`."),
    (ANTHROPIC, TWO_FORMATS, "Invalid 'output_format': it is an alias of 'output_config.format'"),
    (SCORE, {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "Invalid 'text_1': expected one text or 3"),
    (LOAD, {"lora_name": "org/tiny"}, "Invalid 'lora_name': 'org/tiny' is the name of a model"),
    (LOAD, {"lora_path": "/"}, "Invalid 'lora_path': adapter /: no adapter_config.json in the folder"),
]


# At least three of these values are invalid for any field.
WRONG: list[Any] = [{"?": "?"}, [5.5], "\ud800", -7.5, True, "?"]


@pytest.fixture
def endpoint(of_kind: Servers, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunningServer:
    """A server on which the request of the contract works."""
    if path == LOAD:
        clients.write_adapter(tmp_path / "sql")
        monkeypatch.chdir(tmp_path)
    server = of_kind("adapted" if path == LOAD else "tools")
    say(server, "<think>Hm.</think>Hello, <|im_end|>world, hello, world!")
    return server


def post(server: RunningServer, path: str, body: Fields) -> httpx.Response:
    """Send a request. Lone surrogates in strings are allowed."""
    content = json.dumps({name: value for name, value in body.items() if value is not ...})
    return httpx.post(server.url + path, content=content, headers={"content-type": "application/json"}, timeout=20)


def seen(server: RunningServer, path: str, body: Fields) -> tuple[str, list[Any]]:
    """Return the answer and the submits, without ids and times."""
    num_submits = len(server.engine.submits)
    answer = post(server, path, body)
    assert answer.status_code == 200, (body, answer.text)
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


@pytest.mark.checklist("C16")
def test_no_field_is_forgotten() -> None:
    for path, (_, _, acting) in ACTING.items():
        elsewhere = (ANYWHERE | ELSEWHERE.get(path, set())) & set(fields_of(path))
        assert set(acting) | elsewhere == set(fields_of(path)), path
        assert not set(acting) & elsewhere, path


@pytest.mark.parametrize("path", ACTING)
def test_every_field_acts(endpoint: RunningServer, path: str) -> None:
    _, base, acting = ACTING[path]
    for name, given in acting.items():
        others, value = given if isinstance(given, tuple) else ({}, given)
        without = seen(endpoint, path, base | others)
        assert seen(endpoint, path, base | others | {name: value}) != without, name
        if name in SAMPLED and type(value) in (int, float):
            assert getattr(endpoint.engine.submits[-1].params, name, value) == value, name


@pytest.mark.parametrize("path", ACTING)
def test_every_field_refuses_what_is_wrong(endpoint: RunningServer, path: str) -> None:
    _, base, acting = ACTING[path]
    for name in fields_of(path):
        if path in (CHAT, COMPLETIONS) and name in GenerationRequest.model_fields:
            continue  # tests/server/schemas/test_generation_request.py has more of these
        others = acting[name][0] if isinstance(acting.get(name), tuple) else {}
        body = {} if (path, name) == (TOKENIZE, "messages") else base | others
        answers = [post(endpoint, path, body | {name: value}) for value in WRONG]
        assert {answer.status_code for answer in answers} <= {200, 400, 404}, name
        refused = [answer for answer in answers if answer.status_code != 200]
        assert len(refused) >= 3, name
        for answer in refused:
            assert name in complaint(answer), answer.text


@pytest.mark.parametrize("path", ACTING)
def test_fields_of_other_endpoints_are_ignored_or_refused(endpoint: RunningServer, path: str) -> None:
    base = ACTING[path][1]
    names = {name for model, _, _ in ACTING.values() for name in model.model_fields}
    for name in sorted(names - set(fields_of(path))):
        for value in (True, [{"role": {"explain": True}}]):
            answer = post(endpoint, path, base | {name: value})
            assert answer.status_code == 200 or (answer.status_code == 400 and name in complaint(answer)), answer.text


@pytest.mark.checklist("A04", "C02", "C03", "C04", "C05", "C12", "C23", "C25")
@pytest.mark.parametrize("path", REFUSED)
def test_what_is_refused_is_named(of_kind: Servers, server: RunningServer, path: str) -> None:
    if path == LOAD:
        server = of_kind("adapted")
    base = {"prompt": "a"} if path == INSPECT else ACTING[path][1]
    for param, rows in REFUSED[path].items():
        for fields in rows:
            answer = post(server, path, base | fields)
            message = error_of(path, answer, 400)
            error = answer.json()["error"]
            named = error.get("param") if isinstance(error, dict) else None
            about = (str(fields)[:200], answer.text)
            assert param in message if path in (ANTHROPIC, OLLAMA_CHAT, OLLAMA_GENERATE) else named == param, about
            assert len(message) < 600, about
    assert not [message for message in server.engine.received if isinstance(message, Submit | LoadAdapter | Ask)]
    assert server.model.client.num_in_flight == 0


@pytest.mark.checklist("C23", "C25")
def test_messages_of_refusals(server: RunningServer, adapted: RunningServer) -> None:
    for path, fields, message in MESSAGES_OF_REFUSALS:
        answer = post(adapted if path == LOAD else server, path, ACTING[path][1] | fields)
        assert error_of(path, answer, 400).startswith(message), answer.text
        assert path in (ANTHROPIC, COUNT) or answer.json()["error"]["param"] == message.split("'")[1]


# The number of errors about a field does not grow with its value.

MODELS = sorted({model for model, *_ in ACTING.values()} | {InspectRequest}, key=lambda model: model.__name__)


@pytest.mark.parametrize("model", MODELS)
def test_a_longer_value_makes_no_more_errors(model: type[BaseModel]) -> None:
    """Each of pydantic's errors takes the event loop's time."""
    for name, field in model.model_fields.items():
        for short, long in zip(hard_values(500), hard_values(1000), strict=True):
            counts = [num_errors(model, {field.alias or name: value}) for value in (short, long)]
            assert counts[0] == counts[1], (name, str(short)[:20])


def hard_values(size: int) -> list[Any]:
    values: list[Any] = [[], {}, -1, ""]
    return [*(dict.fromkeys(map(str, range(size)), value) for value in values), *([value] * size for value in values)]


def num_errors(model: type[BaseModel], body: dict[str, Any]) -> int:
    try:
        model.model_validate(body)
    except ValidationError as error:
        return error.error_count()
    return 0
