"""The limit on the bytes of all answers, as a state machine."""

import gc
import weakref

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from engine.shared.messages import FinishReason, TokenEvent, TokenLogprobs
from server.engine_client.answer_budget import AnswerBudget, AnswerShare
from server.engine_client.answer_size import ALTERNATIVE_BYTES, POSITION_BYTES, TOKEN_BYTES, event_bytes
from server.http.errors import APIError, BadRequestError, BuffersExceedMemoryError
from server.tenants import Tenant

MAX_BYTES = 1000
TENANTS = [Tenant(name=name) for name in ("alice", "bob", "carol")]


class Answers(RuleBasedStateMachine):
    """Answers of several tenants grow, are sent and end in any order."""

    answers = Bundle("answers")

    def __init__(self) -> None:
        super().__init__()
        self.budget = AnswerBudget(MAX_BYTES)
        self.errors: dict[AnswerShare, APIError] = {}
        self.sizes: dict[AnswerShare, int] = {}  # of those that have not been released

    @rule(target=answers, tenant=st.sampled_from(TENANTS))
    def begin(self, tenant: Tenant) -> AnswerShare:
        def refuse(error: APIError) -> None:
            assert share not in self.errors  # only once
            self.errors[share] = error

        share = AnswerShare(self.budget, tenant, refuse, BadRequestError("too large"))
        self.sizes[share] = 0
        return share

    @rule(share=answers, num_bytes=st.integers(0, MAX_BYTES + 100))
    def add(self, share: AnswerShare, num_bytes: int) -> None:
        others = {each: size for each, size in self.sizes.items() if each not in self.errors}
        self.sizes[share] += num_bytes
        share.add(num_bytes)
        if self.sizes[share] > MAX_BYTES:
            assert share in self.errors
        for refused in others.keys() & self.errors.keys() - {share}:
            assert isinstance(self.errors[refused], BuffersExceedMemoryError)
            holdings = [
                sum(size for each, size in (others | {share: self.sizes[share]}).items() if each.tenant is tenant)
                for tenant in TENANTS
            ]
            # Whoever has lost an answer to another holds more than an equal part.
            assert holdings[TENANTS.index(refused.tenant)] * len(TENANTS) > MAX_BYTES

    @rule(share=answers, part=st.floats(0, 1))
    def send(self, share: AnswerShare, part: float) -> None:
        num_bytes = int(part * self.sizes[share])
        self.sizes[share] -= num_bytes
        share.sent(num_bytes)

    @rule(share=consumes(answers))
    def end(self, share: AnswerShare) -> None:
        for _ in range(2):
            share.release()
        del self.sizes[share]

    @invariant()
    def sums_agree_and_what_is_not_refused_fits(self) -> None:
        assert self.budget.num_bytes == sum(self.sizes.values())
        assert sum(size for share, size in self.sizes.items() if share not in self.errors) <= MAX_BYTES
        assert all(share.is_refused == (share in self.errors) for share in self.sizes)


TestAnswers = Answers.TestCase


def test_small_answers_of_others_stay() -> None:
    budget, refused = AnswerBudget(MAX_BYTES), []
    for name, sizes in (("alice", [10, 400, 300]), ("bob", [200])):
        for size in sizes:
            share = AnswerShare(budget, Tenant(name=name), lambda _: None, BadRequestError("too large"))
            share.on_refusal(lambda _, size=size: refused.append(size))  # type: ignore[misc]
            share.add(size)
    AnswerShare(budget, Tenant(name="carol"), lambda _: refused.append(0), BadRequestError("too large")).add(450)
    assert refused == [400]


def test_a_released_share_does_not_keep_its_request() -> None:
    """Their reference to each other ends, so that the request is freed without the garbage collector."""

    class Request:
        def __init__(self) -> None:
            self.share = AnswerShare(AnswerBudget(MAX_BYTES), TENANTS[0], self.refuse, BadRequestError("too large"))

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
    assert event_bytes(TokenEvent(request_id="r", finish_reason=FinishReason.STOP)) == 0
    assert event_bytes(TokenEvent(request_id="r", token_ids=[1, 2]), num_choices=5) == 2 * TOKEN_BYTES
    positions = 2 * POSITION_BYTES + 10 * ALTERNATIVE_BYTES
    event = TokenEvent(request_id="r", token_ids=[1, 2], logprobs=[few, many], prompt_logprobs=[few, many])
    assert event_bytes(event, num_choices=5) == 2 * TOKEN_BYTES + positions + 5 * positions
