"""The limit on the bytes of all answers: whose answer is refused, what counts, and how much an event is."""

import gc
import weakref

import pytest

from engine.shared.messages import FinishReason, TokenEvent, TokenLogprobs
from server.engine_client.answer_budget import ALTERNATIVE_BYTES, POSITION_BYTES, TOKEN_BYTES, AnswerShare, event_bytes
from server.http.errors import APIError, BadRequestError, BuffersExceedMemoryError
from server.shares import MemoryBudget
from server.tenants import Tenant

MAX_BYTES = 1000
TOO_LARGE = BadRequestError("too large")


class Answers:
    """Answers by number, and the errors that refuse them."""

    def __init__(self) -> None:
        self.budget = MemoryBudget(MAX_BYTES)
        self.shares: list[AnswerShare] = []
        self.errors: list[tuple[int, type[APIError]]] = []

    def begin(self, tenant: str, num_bytes: int) -> AnswerShare:
        number = len(self.shares)
        refuse = lambda error: self.errors.append((number, type(error)))  # noqa: E731
        self.shares.append(AnswerShare(self.budget, Tenant(name=tenant), refuse, lambda: TOO_LARGE))
        self.shares[-1].add(num_bytes)
        return self.shares[-1]


@pytest.mark.parametrize(
    ("sizes", "refused"),
    [
        ({"alice": [600], "bob": [400]}, []),
        ({"alice": [600], "bob": [401]}, [0]),
        ({"alice": [10, 400, 300], "bob": [200], "carol": [450]}, [1]),  # small answers of others stay
        ({"alice": [300, 100], "bob": [390], "carol": [900]}, [3]),
        ({"alice": [99] * 10, "bob": [500]}, [0, 1, 2, 3, 4]),  # until the others fit
        ({"alice": [100] * 5, "bob": [500, 1]}, [5]),
    ],
)
def test_the_largest_answer_of_the_tenant_that_holds_most_makes_room(
    sizes: dict[str, list[int]], refused: list[int]
) -> None:
    answers = Answers()
    for tenant, own in sizes.items():
        for num_bytes in own:
            answers.begin(tenant, num_bytes)
    assert answers.errors == [(number, BuffersExceedMemoryError) for number in refused]
    assert [number for number, share in enumerate(answers.shares) if share.error is not None] == refused


def test_an_answer_counts_until_it_is_sent_refused_or_released() -> None:
    answers = Answers()
    share = answers.begin("alice", 1000)
    share.subtract(400)
    other = answers.begin("bob", 400)
    assert (answers.budget.num_bytes, answers.errors) == (1000, [])
    for _ in range(2):
        other.release()
    assert answers.budget.num_bytes == 600
    for _ in range(2):  # it is refused once, and counts no more
        share.add(401)
    share.subtract(401)
    assert (answers.budget.num_bytes, answers.errors) == (0, [(0, BadRequestError)])
    with pytest.raises(BadRequestError, match="too large"):
        share.check()
    answers.begin("bob", 1000).check()
    share.release()
    assert answers.budget.num_bytes == 1000


def test_a_released_share_does_not_keep_its_request() -> None:
    """Their reference to each other ends, so that the request is freed without the garbage collector."""

    class Request:
        def __init__(self) -> None:
            self.share = AnswerShare(MemoryBudget(MAX_BYTES), Tenant(name="alice"), self.refuse, lambda: TOO_LARGE)

        def refuse(self, error: APIError) -> None:
            raise AssertionError

    request = Request()
    reference = weakref.ref(request)
    request.share.add(10)
    request.share.release()
    gc.disable()
    try:
        del request
        assert reference() is None
    finally:
        gc.enable()


# The estimated size of the parts of an answer. tests/server/generation/test_answer_limit.py has whole answers.


def test_the_size_of_an_event() -> None:
    few, many = TokenLogprobs.pack(-1.0, 1, [1], [-1.0]), TokenLogprobs.pack(-1.0, 1, range(9), [-1.0] * 9)
    assert event_bytes(TokenEvent(request_id="r", finish_reason=FinishReason.STOP), num_choices=1) == 0
    assert event_bytes(TokenEvent(request_id="r", token_ids=[1, 2]), num_choices=5) == 2 * TOKEN_BYTES
    positions = 2 * POSITION_BYTES + 10 * ALTERNATIVE_BYTES
    event = TokenEvent(request_id="r", token_ids=[1, 2], logprobs=[few, many], prompt_logprobs=[few, many])
    assert event_bytes(event, num_choices=5) == 2 * TOKEN_BYTES + positions + 5 * positions
