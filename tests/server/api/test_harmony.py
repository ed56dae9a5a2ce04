"""Chats with a model in the harmony format, in all dialects, with the official clients and a fake engine."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from anthropic import Anthropic
from openai import OpenAI

from engine.grammar.compiler import GrammarCompiler
from server.text.templates.chat_template import ChatTemplate
from server.text.templates.sandbox import SandboxedTemplate
from tests.support.chat_templates import CHATML, chat_template
from tests.support.clients import CHAT, MESSAGES, ask, ask_json, ask_stream, openai_client, shared_server
from tests.support.harmony import TEMPLATE, write_harmony_model
from tests.support.serving import RunningServer, check_error
from tests.support.tiny_tokenizer_model import END_OF_TEXT_ID
from tests.support.tool_model import PARAMETERS, TOOLS, messages_of, prompt, say

NEXT = "<|start|>assistant"
ANALYSIS = f"<|channel|>analysis<|message|>Hm.<|end|>{NEXT}"
PREAMBLE = f"<|channel|>commentary<|message|>Let me see.<|end|>{NEXT}"
CALL = '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "東京"}'
FINAL = "<|channel|>final<|message|>"
CITY = {"city": "東京"}
STRICT = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS, "strict": True}}


@pytest.fixture(scope="module", params=["plain", "special"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Run each test with markers as control tokens and as plain text."""
    folder = write_harmony_model(tmp_path_factory.mktemp("harmony"), special_markers=request.param == "special")
    with shared_server(folder, vocab_size=266) as server:
        yield server


@pytest.fixture
def client(model: RunningServer) -> Iterator[OpenAI]:
    with openai_client(model.url) as client:
        yield client


@pytest.fixture
def anthropic_client(model: RunningServer) -> Iterator[Anthropic]:
    with Anthropic(base_url=model.url, api_key="none", max_retries=0, _strict_response_validation=True) as client:
        yield client


def test_detection() -> None:
    template = ChatTemplate(SandboxedTemplate(TEMPLATE.read_text()), bos_token=None, eos_token=None)
    assert template.is_harmony
    assert template.tool_format.name == "harmony"
    assert not chat_template(CHATML).is_harmony


def test_chat(model: RunningServer) -> None:
    say(model, ANALYSIS + PREAMBLE + CALL)
    (choice,) = ask_json(model.url, CHAT, tools=TOOLS)["choices"]
    message = choice["message"]
    assert (choice["finish_reason"], message["reasoning"], message["content"]) == ("tool_calls", "Hm.", "Let me see.")
    (call,) = message["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("weather", CITY)
    streamed = messages_of(ask_stream(model.url, CHAT, tools=TOOLS))[0]
    assert (streamed["reasoning"], streamed["content"]) == ("Hm.", "Let me see.")
    assert [each["function"] for each in streamed["tool_calls"]] == [call["function"]]
    say(model, f"{ANALYSIS}{FINAL}Yes")
    (choice,) = ask_json(model.url, CHAT)["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", "Yes")
    num_tokens = len(model.model.tokenizer.encode("<|channel|>analysis<|mess"))
    (choice,) = ask_json(model.url, CHAT, max_tokens=num_tokens)["choices"]
    assert not choice["message"]["content"]  # no part of a header


def test_reasoning_tokens_are_counted(model: RunningServer) -> None:
    say(model, f"{ANALYSIS}{FINAL}Yes")
    usage = ask_json(model.url, CHAT)["usage"]
    is_special = "<|end|>" in model.model.tokenizer.special_tokens
    num_reasoning = 1 + len("Hm.") + (0 if is_special else len("<|end|>") - 1)  # from the end of the header on
    assert usage["completion_tokens_details"] == {"reasoning_tokens": num_reasoning}


def test_the_conversation_is_sent_back(model: RunningServer) -> None:
    say(model, ANALYSIS + CALL)
    first = prompt(model, tools=TOOLS, reasoning_effort="high")
    assert "\nReasoning: high\n" in first
    assert "type time = () => any;" in first
    message = ask_json(model.url, CHAT, tools=TOOLS)["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "sunny<|end|>"}
    chat = [*MESSAGES, message, result]
    text = prompt(model, messages=chat, tools=TOOLS)
    called = f'{ANALYSIS} to=functions.weather<|channel|>commentary json<|message|>{{"city": "東京"}}<|call|>'
    given = '<|start|>functions.weather to=assistant<|channel|>commentary<|message|>"sunny<|end|>"<|end|>'
    assert text.endswith(f"<|start|>user<|message|>Hi<|end|>{NEXT}{called}{given}{NEXT}")
    chat += [{"role": "assistant", "content": "Sunny.", "reasoning": "So."}, *MESSAGES]
    assert "Hm." not in prompt(model, messages=chat)


def test_the_final_message_is_continued(model: RunningServer) -> None:
    say(model, " see")
    chat = [*MESSAGES, {"role": "assistant", "content": "I", "reasoning": "Hm."}]
    body = {"messages": chat, "continue_final_message": True}
    assert prompt(model, **body).endswith(f"<|end|>{NEXT}{ANALYSIS}{FINAL}I")
    assert ask_json(model.url, CHAT, **body)["choices"][0]["message"]["content"] == " see"


@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        ({"tools": TOOLS, "tool_choice": "required"}, ANALYSIS + PREAMBLE + CALL, f"{FINAL}Hi"),
        ({"tools": [STRICT]}, PREAMBLE + CALL, CALL.partition("{")[0] + "{}"),
        ({"response_format": {"type": "json_object"}}, ANALYSIS + FINAL + "{}", ANALYSIS + FINAL + "Hi"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, f"{FINAL}b", "b"),
    ],
)
def test_grammars(model: RunningServer, fields: dict[str, Any], good: str, bad: str) -> None:
    say(model, good)
    ask_json(model.url, CHAT, **fields)
    grammar = model.engine.submits[-1].params.grammar
    assert grammar is not None
    assert accepts(model, grammar, good)
    assert not accepts(model, grammar, bad)


def accepts(model: RunningServer, grammar: str, text: str) -> bool:
    tokenizer = model.model.tokenizer
    matcher = GrammarCompiler(tokenizer.to_json(), [END_OF_TEXT_ID]).compile(grammar)
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


def test_a_budget_for_reasoning_is_refused(model: RunningServer) -> None:
    error = check_error(ask(model.url, CHAT, thinking_token_budget=5), 400)
    assert error["param"] == "thinking_token_budget"


def test_responses(model: RunningServer, client: OpenAI) -> None:
    say(model, ANALYSIS + PREAMBLE + CALL)
    function: Any = {"type": "function", "name": "weather", "parameters": PARAMETERS}
    request: dict[str, Any] = {"model": "tiny", "tools": [function], "reasoning": {"effort": "low"}}
    response = client.responses.create(input="Hi", **request)
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
    assert response.output_text == "Let me see."
    call = response.output[2]
    assert call.type == "function_call"
    assert json.loads(call.arguments) == CITY
    with client.responses.stream(input="Hi", **request) as stream:
        assert [item.type for item in stream.get_final_response().output] == [item.type for item in response.output]
    results: list[Any] = [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
    say(model, f"{FINAL}Sunny.")
    answer = client.responses.create(input=results, previous_response_id=response.id, **request)
    assert answer.output_text == "Sunny."
    expected = (
        f"{NEXT}<|channel|>analysis<|message|>Hm.\n\nLet me see.<|end|>"
        f'{NEXT} to=functions.weather<|channel|>commentary json<|message|>{{"city": "東京"}}<|call|>'
        f'<|start|>functions.weather to=assistant<|channel|>commentary<|message|>"sunny"<|end|>{NEXT}'
    )
    text = model.model.tokenizer.decode(model.engine.submits[-1].prompt_token_ids, skip_special_tokens=False)
    assert text.endswith(expected)
    assert "\nReasoning: low\n" in text


def test_log_probabilities_are_those_of_the_content(model: RunningServer, client: OpenAI) -> None:
    say(model, f"{ANALYSIS}{PREAMBLE}{ANALYSIS}{FINAL}Yes")
    include: list[Any] = ["message.output_text.logprobs"]
    response = client.responses.create(model="tiny", input="Hi", include=include)
    contents: list[Any] = [item.content[0] for item in response.output if item.type == "message"]
    assert [content.text for content in contents] == ["Let me see.", "\n\nYes"]
    tokens = ["".join(each.token for each in content.logprobs) for content in contents]
    assert tokens == ["Let me see.", "Yes<|endoftext|>"]


def test_messages(model: RunningServer, anthropic_client: Anthropic) -> None:
    say(model, ANALYSIS + PREAMBLE + CALL)
    tool: Any = {"name": "weather", "input_schema": PARAMETERS}
    request: dict[str, Any] = {"model": "tiny", "max_tokens": 500, "tools": [tool]}
    message = anthropic_client.messages.create(messages=[{"role": "user", "content": "Hi"}], **request)
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
    assert message.stop_reason == "tool_use"
    request |= {"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 1100}  # the model has no budget
    with anthropic_client.messages.stream(messages=[{"role": "user", "content": "Hi"}], **request) as stream:
        streamed = stream.get_final_message()
    assert [block.model_dump(exclude={"id"}) for block in streamed.content] == [
        block.model_dump(exclude={"id"}) for block in message.content
    ]
