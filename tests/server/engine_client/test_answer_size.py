"""The estimated size of the parts of an answer. tests/server/generation/test_answer_limit.py has whole answers."""

from engine.shared.messages import FinishReason, TokenEvent, TokenLogprobs
from server.engine_client.answer_size import ALTERNATIVE_BYTES, POSITION_BYTES, TOKEN_BYTES, event_bytes


def test_the_size_of_an_event() -> None:
    few, many = TokenLogprobs.pack(-1.0, 1, [1], [-1.0]), TokenLogprobs.pack(-1.0, 1, range(9), [-1.0] * 9)
    assert event_bytes(TokenEvent(request_id="r", finish_reason=FinishReason.STOP)) == 0
    assert event_bytes(TokenEvent(request_id="r", token_ids=[1, 2]), num_choices=5) == 2 * TOKEN_BYTES
    positions = 2 * POSITION_BYTES + 10 * ALTERNATIVE_BYTES
    event = TokenEvent(request_id="r", token_ids=[1, 2], logprobs=[few, many], prompt_logprobs=[few, many])
    assert event_bytes(event, num_choices=5) == 2 * TOKEN_BYTES + positions + 5 * positions
