"""The contract of all endpoints: a valid value of each field of a request, and the values that are refused."""

from typing import Any

from pydantic import BaseModel

from server.api.admin.schemas import (
    MAX_DETOKENIZE_TOKENS,
    DetokenizeRequest,
    LoadAdapterRequest,
    TokenizeRequest,
)
from server.api.admin.tokenize import MAX_TEXT_BYTES
from server.api.chat.request_builder import EXTENSIONS
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
from tests.support.clients import CHAT, COMPLETIONS, MESSAGES

Fields = dict[str, Any]

RESPONSES, INPUT_TOKENS = "/v1/responses", "/v1/responses/input_tokens"
ANTHROPIC, COUNT = "/v1/messages", "/v1/messages/count_tokens"
RERANK, SCORE = "/v1/rerank", "/v1/score"
EMBEDDINGS, TOKENIZE, DETOKENIZE = "/v1/embeddings", "/tokenize", "/detokenize"
LOAD, INSPECT = "/v1/load_lora_adapter", "/lightwell/v1/inspect"
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

SAMPLED = {name: value for name, value in SAMPLING.items() if name in EXTENSIONS}  # by the other dialects as well
LOGPROBS: dict[str, Any] = {
    "post_sampling_probs": ({"logprobs": 1}, True),
    "logprob_token_ids": ({"logprobs": 1}, [7]),
    "return_tokens_as_token_ids": ({"logprobs": 1}, True),
}
OLLAMA_ACTING: dict[str, Any] = {
    "model": "tiny:latest",
    "stream": True,
    "options": {"top_k": 5},
    "logprobs": True,
    "top_logprobs": ({"logprobs": True}, 2),
}
THINKING: Fields = {"chat_template_kwargs": {"enable_thinking": True}, "thinking_token_budget": 5}
RESPONSES_TOOL: Fields = {"type": "function", "name": "weather", "parameters": SCHEMA}
ANTHROPIC_TOOL: Fields = {"name": "weather", "input_schema": SCHEMA}
INCLUDED: Fields = {"include": ["message.output_text.logprobs"]}

# Endpoint -> the class of its request, a request, and as in SAMPLING fields with a value that has an effect.
ACTING: dict[str, tuple[type[BaseModel], Fields, dict[str, Any]]] = {
    COMPLETIONS: (
        CompletionRequest,
        {"model": "tiny", "prompt": "Hi", "seed": 7},
        SAMPLING
        | LOGPROBS
        | {"model": "org/tiny", "prompt": "Ho", "max_tokens": 5, "echo": True, "logprobs": 1, "best_of": 2},
    ),
    CHAT: (
        ChatCompletionRequest,
        {"model": "tiny", "messages": MESSAGES, "seed": 7},
        SAMPLING
        | THINKING
        | {name: ({"logprobs": True}, value) for name, (_, value) in LOGPROBS.items()}
        | {
            "model": "org/tiny",
            "messages": [{"role": "user", "content": "Ho"}],
            "max_tokens": 5,
            "max_completion_tokens": 5,
            "echo": (BEGUN | {"continue_final_message": True}, True),
            "logprobs": True,
            "top_logprobs": ({"logprobs": True}, 2),
            "return_prompt_text": True,
            "add_generation_prompt": False,
            "continue_final_message": (BEGUN, True),
            "include_reasoning": False,
            "documents": [{"title": "a"}],
            "tools": [TOOL],
            "tool_choice": ({"tools": [TOOL]}, "required"),
            "parallel_tool_calls": ({"tools": [TOOL], "tool_choice": "required"}, False),
        },
    ),
    RESPONSES: (
        ResponsesRequest,
        {"model": "tiny", "input": "Hi", "seed": 7},
        SAMPLED
        | THINKING
        | {
            "return_tokens_as_token_ids": (INCLUDED, True),
            "model": "org/tiny",
            "input": "Ho",
            "instructions": "Be brief.",
            "max_output_tokens": 5,
            "stop": "wor",
            "truncation": "auto",
            "user": "me",
            "safety_identifier": "me",
            "prompt_cache_key": "a",
            "include": ["message.output_text.logprobs"],
            "top_logprobs": (INCLUDED, 2),
            "tools": [RESPONSES_TOOL],
            "tool_choice": ({"tools": [RESPONSES_TOOL]}, "required"),
            "parallel_tool_calls": ({"tools": [RESPONSES_TOOL]}, False),
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
            "tools": [RESPONSES_TOOL],
            "reasoning": {"effort": "low"},
        },
    ),
    ANTHROPIC: (
        MessagesRequest,
        {"model": "tiny", "messages": MESSAGES, "max_tokens": 60, "seed": 7},
        SAMPLED
        | THINKING
        | {
            "include_stop_str_in_output": ({"stop_sequences": ["wor"]}, True),
            "model": "org/tiny",
            "messages": [{"role": "user", "content": "Ho"}],
            "system": "Be brief.",
            "tools": [ANTHROPIC_TOOL],
            "tool_choice": ({"tools": [ANTHROPIC_TOOL]}, {"type": "any"}),
            "thinking": {"type": "enabled", "budget_tokens": 5},
            "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
            "output_format": {"type": "json_schema", "schema": SCHEMA},
            "max_tokens": 5,
            "stop_sequences": ["ell"],
            "stream": True,
        },
    ),
    COUNT: (
        CountTokensRequest,
        {"model": "tiny", "messages": MESSAGES},
        {
            "messages": [{"role": "user", "content": "Hello"}],
            "system": "Be brief.",
            "tools": [ANTHROPIC_TOOL],
            "tool_choice": ({"tools": [ANTHROPIC_TOOL]}, {"type": "none"}),
            "thinking": {"type": "enabled", "budget_tokens": 1024},
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
        {"model": "org/tiny", "query": "b", "documents": ["b"], "top_n": 1, "priority": 3}
        | {"return_documents": False, "max_tokens_per_doc": 1},
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
        | {"prompt": "Ho", "system": "Be brief.", "raw": True, "context": [7, 8], "think": True, "format": "json"},
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
IGNORED = "ignored and named; ollama/test_routes.py"
ANYWHERE = {
    "request_id": "a name for cancel and replay; test_requests",
    "queue_timeout": "how long it may wait; generation/test_overload",
    "stream_interval": "how many tokens a chunk has; generation/test_pacing",
    "add_special_tokens": "the tokenizer adds none; completions/test_routes.py has one that does",
}
ELSEWHERE: dict[str, dict[str, str]] = {
    COMPLETIONS: {
        "suffix": "the tokenizer has no FIM tokens; completions/test_routes.py has one that does",
        "thinking_token_budget": "completions have no reasoning; rejected",
    },
    CHAT: {"reasoning_effort": "the template knows none; chat/test_conversion.py has one that does"},
    RESPONSES: {
        "previous_response_id": "responses/test_routes.py",
        "service_tier": "there is one tier",
        "stream_options": "nothing is obfuscated",
    },
    INPUT_TOKENS: {
        "model": "any of the names, or none",
        "previous_response_id": "responses/test_routes.py",
        "truncation": "responses/test_items.py",
        **dict.fromkeys(
            (
                *("max_output_tokens", "temperature", "top_p", "include", "top_logprobs", "stop", "tool_choice"),
                *("parallel_tool_calls", "max_tool_calls", "text", "metadata", "user", "safety_identifier"),
                *("prompt_cache_key", "service_tier", "store", "background", "stream", "stream_options"),
            ),
            "the prompt is the same",
        ),
    },
    ANTHROPIC: {
        "metadata": "accepted",
        "service_tier": "accepted",
        "return_tokens_as_token_ids": "answers have no log probabilities",
    },
    COUNT: {"model": "any of the names", **dict.fromkeys(("output_config", "output_format"), "the prompt is the same")},
    RERANK: {"instruction": "only for rerankers; rerank/test_routes.py"},
    SCORE: dict.fromkeys(("instruction", "queries", "documents"), "rerank/test_routes.py"),
    TOKENIZE: {"model": "any of the names", "messages": "instead of a prompt; test_tokenize"},
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
    OLLAMA_SHOW: {"name": "alias of model; ollama/test_models.py"},
    LOAD: dict.fromkeys(("lora_path", "load_inplace", "base_model_name"), "admin/test_lora_adapters.py"),
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


def document(**fields: Any) -> Fields:
    source = {"type": "text", "media_type": "text/plain", "data": "A"}
    return messages([{"type": "document", "source": source} | fields])


def item(**fields: Any) -> Fields:
    return {"input": [fields]}


def output_format(name: str, schema: Fields) -> Fields:
    return {"text": {"format": {"type": "json_schema", "name": name, "schema": schema}}}


NAMED: Fields = {"type": "function", "function": {"name": "g"}}
ALLOWED: Fields = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}
PDF: Fields = {"type": "base64", "media_type": "application/pdf", "data": "AAAA"}
BAD_SCHEMA: Fields = {"type": "json_schema", "schema": {"type": "x"}}
NO_ARGUMENTS: Fields = {"function": {"name": "f"}}
EMPTY_ARGUMENTS: Fields = {"function": {"name": "f", "arguments": ""}}
REFUSED: dict[str, dict[str, list[Fields]]] = {
    COMPLETIONS: {
        "prompt": [
            *each("prompt", "", [], [[]], [""], None, 5, 1.5, True, {}, {"prompt": "a"}, ["a"] * 1025, [[1]] * 1025),
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
        "messages[0]": each("messages", ["Hi"], [None]),
        "messages[1]": each("messages", [*MESSAGES, 5]),
        "messages[0].role": each("messages", [{}], [{"content": "Hi"}])
        + [messages("Hi", role=role) for role in ("wizard", 5, None)],  # type: ignore[arg-type]
        "messages[0].content": [
            *map(messages, (None, 5, True, {}, "\ud800")),
            *each("messages", [{"role": "user"}], [{"role": "user", "content": None, "reasoning": "Hm"}]),
        ],
        "messages[0].content[0]": [messages(["a"])],
        "messages[0].content[0].type": [messages([{"text": "a"}])],
        "messages[0].content[0].text": [messages([{"type": "text"}]), messages([{"type": "text", "text": 5}])],
        "messages[1].content": each("messages", [*MESSAGES, {"role": "developer", "content": None}]),
        "messages[0].name": each("messages", [MESSAGES[0] | {"name": 5}], [MESSAGES[0] | {"name": "\udfff"}]),
        "top_logprobs": [
            *each("top_logprobs", 21, -1, 1.0, True, "1", logprobs=True),
            *({"top_logprobs": 1} | fields for fields in ({}, {"logprobs": False})),
        ],
        "logprobs": each("logprobs", 0, 1),
        "max_completion_tokens": each("max_completion_tokens", 0, -2, 1.0, True, "5"),
        "max_tokens": each("max_tokens", 7, max_completion_tokens=8),
        **{name: each(name, "true", 1, []) for name in ("echo", "add_special_tokens", "return_prompt_text")},
        "reasoning_effort": each("reasoning_effort", "extreme"),
        "documents[0]": each("documents", ["T"]),
        "continue_final_message": [
            {"continue_final_message": True} | fields
            for fields in ({}, BEGUN | {"add_generation_prompt": True}, *earlier_calls(EMPTY_ARGUMENTS))
        ],
        "tools": [
            *each("tools", {}, "x", [TOOL, TOOL]),
            {"tools": [{"type": "function", "function": {"name": f"f{number}"}} for number in range(129)]},
        ],
        "tools[0]": each("tools", [5]),
        "tools[0].type": each("tools", [{"type": "custom"}], [{"function": {"name": "f"}}]),
        "tools[0].function": each("tools", [{"type": "function"}]),
        "tools[0].function.name": [
            *functions("name", "", "a b", "é", "a" * 129, "a.b", 5, None),
            *functions("strict", True),
        ],
        "tools[0].function.parameters": functions(
            "parameters", [], "x", {"type": "string"}, {"type": None}, {"type": ["object"]}, name="f"
        ),
        "tools[0].function.strict": functions("strict", "yes", name="f"),
        "tool_choice": [
            *each("tool_choice", "required", NAMED),
            *each("tool_choice", "always", 5, NAMED, ALLOWED, tools=[TOOL]),
        ],
        "tool_choice.type": each("tool_choice", {}, {"type": "custom"}, tools=[TOOL]),
        "tool_choice.function": each("tool_choice", {"type": "function"}, tools=[TOOL]),
        "tool_choice.function.name": each("tool_choice", {"type": "function", "function": {}}, tools=[TOOL]),
        "tool_choice.allowed_tools": each("tool_choice", {"type": "allowed_tools"}, tools=[TOOL]),
        "parallel_tool_calls": each("parallel_tool_calls", 1, tools=[TOOL]),
        "messages[0].tool_calls[0]": earlier_calls(5),
        "messages[0].tool_calls[0].function.arguments": earlier_calls(
            NO_ARGUMENTS, {"function": {"name": "f", "arguments": {}}}
        ),
    },
    RESPONSES: {
        "input": each("input", [], 5, None, [{"type": "web_search_call"}]),
        "input[0].content": [item(role="user")],
        "input[0].content[0].type": [item(role="user", content=[{"type": "file"}])],
        "input[0].type": [item(type="compaction", id="x"), item(type=["message"])],
        "input[0]": [
            item(type="custom_tool_call", call_id="1", name="f"),
            item(type="shell_call", call_id="1", action=5),
        ],
        "input[0].call_id": [item(type="shell_call", action={}), item(type="shell_call_output", output=[])],
        "max_output_tokens": each("max_output_tokens", 0),
        "temperature": each("temperature", 3),
        "tools[0].type": each("tools", [{}], [{"type": 5}]),
        "tools[0]": each("tools", [5]),
        "tools": each("tools", [RESPONSES_TOOL, RESPONSES_TOOL]),
        "tools[0].name": each("tools", [RESPONSES_TOOL | {"name": "a b"}]),
        "tools[0].parameters": each("tools", [RESPONSES_TOOL | {"parameters": {"type": "string"}}]),
        "text.format.name": [output_format("a b", {})],
        "text.format.schema": [output_format("a", {"type": "x"})],
        "text.verbosity": each("text", {"verbosity": "some"}),
        "tool_choice": [
            *each("tool_choice", "required", "some", {"type": "function", "name": "weather"}),
            *each("tool_choice", {"type": "function", "name": "time"}, tools=[RESPONSES_TOOL]),
        ],
        "truncation": each("truncation", "some"),
        "reasoning.effort": each("reasoning", {"effort": "some"}),
        "reasoning.summary": each("reasoning", {"summary": "some"}),
        "service_tier": each("service_tier", 5),
        "stop[0]": each("stop", [5]),
        "top_logprobs": each("top_logprobs", 2),
        "background": each("background", True, store=False),
        "stream_options": each("stream_options", {}),
        "metadata.a": each("metadata", {"a": 1}),
        "metadata": each("metadata", {"a" * 65: ""}, {"a": "b" * 513}),
        "seed": each("seed", "x"),
    },
    INPUT_TOKENS: {"input": each("input", None)},
    ANTHROPIC: {
        "max_tokens": each("max_tokens", ..., 0),
        "temperature": each("temperature", 1.5, "1"),
        "stop_sequences": each("stop_sequences", "x", list(map(str, range(65)))),
        "min_p": each("min_p", 2),
        "system": each("system", 5),
        "system[0].type": each("system", [{"type": "image"}]),
        "messages": [
            *each("messages", ..., []),
            messages([{"type": "tool_use", "id": "x", "name": "x", "input": {}}], role="assistant"),
        ],
        "messages[0].role": [messages("x", role="tool")],
        "messages[0].content": [messages([]), {"messages": [{"role": "user"}]}],
        "messages[0].content[0].type": [messages([{"type": "image"}])],
        "messages[0].content[0].tool_use_id": [messages([{"type": "tool_result"}])],
        "messages[0].content[0].source.type": [
            *(document(source=source) for source in (PDF, {"type": "url", "url": "http://x"})),
        ],
        "messages[0].content[0].source.media_type": [document(source=PDF | {"type": "text"})],
        "messages[0].content[0].source": [messages([{"type": "document"}])],
        "messages[0].content[0].title": [document(title=5)],
        "messages[0].content[0].context": [document(context=["A"])],
        "messages[0].clear_at": each("messages", [{"role": "system", "content": "A", "clear_at": "soon"}]),
        "tools": each("tools", [ANTHROPIC_TOOL, ANTHROPIC_TOOL]),
        "tools[0].name": each("tools", [ANTHROPIC_TOOL | {"name": "a b"}]),
        "tools[0].input_schema": each("tools", [ANTHROPIC_TOOL | {"input_schema": {"type": "string"}}]),
        "tools[0].strict": each("tools", [ANTHROPIC_TOOL | {"strict": "yes"}], [ANTHROPIC_TOOL | {"strict": 1}]),
        "tool_choice.name": each("tool_choice", {"type": "tool"}),
        "tool_choice.type": each("tool_choice", {"type": "some"}),
        "tool_choice": each("tool_choice", {"type": "any"}, {"type": "tool", "name": "x"}),
        "tool_choice.disable_parallel_tool_use": [
            {"tool_choice": choice} for choice in each("disable_parallel_tool_use", "no", 1, type="auto")
        ],
        "thinking.type": each("thinking", {"type": "perhaps"}),
        "thinking.budget_tokens": [
            {"thinking": thinking} for thinking in each("budget_tokens", 0, 1.5, "5", True, None, 60, type="enabled")
        ],
        "thinking.display": [{"thinking": thinking} for thinking in each("display", "full", True, type="adaptive")],
        "output_config.effort": each("output_config", *each("effort", "much", 5, "none")),
        "output_config.format.schema": each("output_config", {"format": BAD_SCHEMA}),
        "output_format.schema": each("output_format", BAD_SCHEMA),
    },
    EMBEDDINGS: {
        "input": each("input", "", [], ["a", ""], [[1], []], [259], [-1], ["a", 1], None, {}, ..., ["a"] * 2049),
        "encoding_format": each("encoding_format", "int8"),
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
        "text_1": [*each("text_1", ..., ""), {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}],
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
        "messages": [
            *({"messages": MESSAGES}, {"prompt": ..., "messages": []}),
            {"prompt": ..., **messages("ü" * (MAX_TEXT_BYTES // 2 + 1))},
        ],
        "messages[0].role": [{"prompt": ..., **messages("x", role="robot")}],
        "tools[0].type": [CHAT_PROMPT | {"tools": [{}]}],
        "chat_template": [CHAT_PROMPT | {"chat_template": "{{ 1 }}"}],
        "logits_processors": each("logits_processors", ["a"]),
        "truncate_prompt_tokens": each("truncate_prompt_tokens", 1),
    },
    DETOKENIZE: {
        "tokens": each("tokens", [259], [2**40], "abc", None, [1] * (MAX_DETOKENIZE_TOKENS + 1)),
        "tokens[0]": each("tokens", [-1], [1.5], [True], ["1"]),
    },
    LOAD: {
        "lora_name": each("lora_name", ..., "", "a,b", "a" * 129, 5, "tiny", "org/tiny"),
        "lora_path": each("lora_path", ..., "", "/nothing/there", "x\0y", "~\0x", "~\0/x", "/"),
        "load_inplace": each("load_inplace", "yes"),
    },
    OLLAMA_CHAT: {
        "options.temperature": each("options", {"temperature": "3"}),
        "options.num_predict": each("options", {"num_predict": "x"}),
        "options.stop[0]": each("options", {"stop": [7]}),
        "very": each("think", "very"),
        "messages[0].images": each("messages", [MESSAGES[0] | {"images": ["aGk="]}]),
        "messages": each("messages", 7),
        "tools[0].function.name": each("tools", [{"function": {"name": "a b"}}]),
        "n": each("n", 2),
        "format": each("format", {"not": {}}),
    },
    OLLAMA_GENERATE: {
        "context": each("context", [10**6], stream=False)
        + each("context", [1], raw=True)
        + each("context", [1], suffix="x"),
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
MESSAGES_OF_REFUSALS: list[tuple[str, Fields, str]] = [
    (COMPLETIONS, {"suffix": "b"}, "Invalid 'suffix': not supported by this model, which has no fill-in-the-middle"),
    (CHAT, {"messages": [{"role": "user"}]}, "Missing required parameter: 'messages[0].content'."),
    *(
        (CHAT, messages([{"type": kind}]), f"{ONLY_TEXT} parts of type {kind!r} are not supported")
        for kind in ("image_url", "input_audio", "file", 5, ["text"])
    ),
    (RESPONSES, {"prompt": {"id": "pmpt_1"}}, NOT_YET.format("prompt")),
    (RESPONSES, {"conversation": "conv_1"}, NOT_YET.format("conversation")),
    (RESPONSES, {"n": 2}, NOT_YET.format("n")),
    (RESPONSES, {"messages": []}, NOT_YET.format("messages")),
    (RESPONSES, {"top_logprobs": 2}, "Invalid 'top_logprobs': only allowed with"),
    (RESPONSES, {"stream_options": {}}, "The 'stream_options' parameter is only allowed"),
    (RESPONSES, {"metadata": {"a" * 65: ""}}, "Invalid 'metadata': expected keys of at most 64 characters"),
    (RESPONSES, {"metadata": {"a": "b" * 513}}, "Invalid 'metadata': expected values of at most 512 characters"),
    (ANTHROPIC, {"max_tokens": ...}, "Missing required parameter: 'max_tokens'."),
    (ANTHROPIC, {"n": 2}, NOT_YET.format("n")),
    (ANTHROPIC, {"return_token_ids": True}, NOT_YET.format("return_token_ids")),
    (COUNT, {"n": 2}, f"{NOT_YET.format('n')} It is a parameter of /v1/chat/completions."),
    (ANTHROPIC, {"stop_sequences": list(map(str, range(65)))}, "Invalid 'stop_sequences': array too long."),
    (ANTHROPIC, messages([{"type": "image"}]), "messages[0].content[0].type: Invalid value: 'image'. Supported values"),
    (ANTHROPIC, {"tool_choice": {"type": "any"}}, "Invalid 'tool_choice': only allowed when 'tools' are given."),
    (ANTHROPIC, {"tools": [ANTHROPIC_TOOL, ANTHROPIC_TOOL]}, "Invalid 'tools': the name 'weather'"),
    (
        ANTHROPIC,
        {"thinking": {"type": "enabled", "budget_tokens": 60}},
        "`max_tokens` must be greater than `thinking.budget_tokens`.",
    ),
    (
        ANTHROPIC,
        {"output_format": BAD_SCHEMA, "output_config": {"format": BAD_SCHEMA}},
        "Invalid 'output_format': it is an alias of 'output_config.format'",
    ),
    (SCORE, {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "Invalid 'text_1': expected one text or 3"),
    (LOAD, {"lora_name": "org/tiny"}, "Invalid 'lora_name': 'org/tiny' is the name of a model"),
    (LOAD, {"lora_path": "/"}, "Invalid 'lora_path': adapter /: no adapter_config.json in the folder"),
    (LOAD, {"lora_path": "~\0/x"}, "Invalid 'lora_path': adapter"),
]
