"""The limit on reasoning tokens, in chats and in Anthropic's messages."""

from collections.abc import Iterator

import httpx
import pytest

from engine.shared.messages import ReasoningLimit
from tests.support.clients import CHAT, MESSAGES, ask, ask_json, shared_server
from tests.support.serving import RunningServer, check_error
from tests.support.tool_model import write_tool_model


@pytest.fixture(scope="module", params=["plain", "special"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Run each test with tags as special tokens and as plain text."""
    folder = write_tool_model(tmp_path_factory.mktemp("tools"), special_tags=request.param == "special")
    with shared_server(folder, vocab_size=263) as server:
        yield server


def test_reasoning_budget(model: RunningServer) -> None:
    body = {"model": "tiny", "max_tokens": 9, "messages": MESSAGES, "thinking": {"type": "enabled", "budget_tokens": 7}}
    tokenizer = model.model.tokenizer
    if "<think>" not in tokenizer.special_tokens:
        error = check_error(ask(model.url, CHAT, thinking_token_budget=5), 400)
        assert (error["param"], error["code"]) == ("thinking_token_budget", "unsupported_parameter")
        assert httpx.post(f"{model.url}/v1/messages", json=body).status_code == 200
        return
    start_id, end_id = (tokenizer.special_ids_in([tag])[tag] for tag in ("<think>", "</think>"))
    for budget, is_open in ((0, False), (7, True)):
        ask_json(model.url, CHAT, thinking_token_budget=budget, chat_template_kwargs={"enable_thinking": is_open})
        expected = ReasoningLimit(max_tokens=budget, start_id=start_id, end_id=end_id, is_open=is_open)
        assert model.engine.submits[-1].params.reasoning_limit == expected
    for nothing in (None, -1):
        ask_json(model.url, CHAT, thinking_token_budget=nothing)
        assert model.engine.submits[-1].params.reasoning_limit is None
    assert httpx.post(f"{model.url}/v1/messages", json=body).status_code == 200
    assert model.engine.submits[-1].params.reasoning_limit == expected
    fields = {"thinking_token_budget": 5, "bad_words": ["a"]}
    assert check_error(ask(model.url, CHAT, **fields), 400)["param"] == "bad_words"
