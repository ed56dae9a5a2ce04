"""One limit on the bytes of all answers in memory, and how much memory an answer takes, or must take at least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from engine.shared.messages import Submit, TokenEvent
from server.http.errors import APIError, BuffersExceedMemoryError, InvalidValueError
from server.schemas.generation_request import GenerationRequest
from server.tenants import Tenant

TOKEN_BYTES = 100  # of a token of an answer
POSITION_BYTES = 300  # of a token's log probabilities, as the engine sends them and as JSON
ALTERNATIVE_BYTES = 100  # of each alternative to it
ECHO_BYTES = 12  # of a token of the prompt that is part of the answer
NUMBER_BYTES = 50  # of an element of an embedding

ECHO_FIELDS = frozenset({"echo", "return_token_ids"})  # of requests whose answer has the prompts
# Fields of requests whose answer must have some size.
LARGE_FIELDS = ECHO_FIELDS | {"ignore_eos", "min_tokens", "logprobs", "prompt_logprobs"}

Body = TypeVar("Body", bound=GenerationRequest)


class AnswerShare:
    """What one request's answer takes of an `AnswerBudget`: all of it, or what a stream's client has not read yet."""

    def __init__(
        self,
        budget: AnswerBudget,
        tenant: Tenant,
        refuse: Callable[[APIError], None],
        too_large: Callable[[], APIError],
    ) -> None:
        """`refuse` ends the request with an error; `too_large` makes that of one that exceeds the budget alone."""
        self.tenant = tenant
        self.num_bytes = 0
        self.too_large = too_large
        self.error: APIError | None = None  # that has refused the answer
        self._budget = budget
        self._refuse = refuse
        self._is_listed = False  # in the budget, from the first byte on

    def add(self, num_bytes: int) -> None:
        """Count bytes that were received or made. This may refuse the answer, or another one."""
        budget = self._budget
        if not self._is_listed:
            self._is_listed = True
            budget.shares.setdefault(self.tenant.name, {})[self] = None
        self.num_bytes += num_bytes
        budget.num_bytes += num_bytes
        if budget.num_bytes > budget.max_bytes:
            budget.make_room(self)

    def sent(self, num_bytes: int) -> None:
        """Count bytes no longer."""
        self.num_bytes -= num_bytes
        self._budget.num_bytes -= num_bytes

    @property
    def is_refused(self) -> bool:
        return self.error is not None

    def check(self) -> None:
        """Raise the error that has refused the answer, if one has."""
        if self.error is not None:
            raise self.error

    def refuse(self, error: APIError) -> None:
        """End the request. Its bytes count until the share is released."""
        self.error = error
        self._refuse(error)

    def on_refusal(self, refuse: Callable[[APIError], None]) -> None:
        """Replace what ends the request, as the answer is complete and being sent now."""
        self._refuse = refuse

    def release(self) -> None:
        """Count the answer no longer. Has no effect the second time."""
        self.sent(self.num_bytes)
        if self._is_listed:
            self._is_listed = False
            own = self._budget.shares[self.tenant.name]
            del own[self]
            if not own:
                del self._budget.shares[self.tenant.name]
        self._refuse = _ignore  # it refers to the request, which refers to this share


class AnswerBudget:
    """Counts the bytes of answers in memory, and ends requests when there are too many.

    When all answers exceed the limit, the largest answer of the tenant that holds most is refused, so that none can
    push out the answers of others. An answer that exceeds it alone is refused for good.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.shares: dict[str, dict[AnswerShare, None]] = {}  # by the tenant's name

    def make_room(self, newest: AnswerShare) -> None:
        """Refuse answers until those that are not refused fit; refused ones end soon. `newest` has grown."""
        if newest.num_bytes > self.max_bytes and not newest.is_refused:
            newest.refuse(newest.too_large())
        while True:
            holders = [[share for share in shares if not share.is_refused] for shares in self.shares.values()]
            totals = [sum(share.num_bytes for share in shares) for shares in holders]
            if sum(totals) <= self.max_bytes:
                return
            largest = holders[totals.index(max(totals))]
            max(largest, key=lambda share: share.num_bytes).refuse(BuffersExceedMemoryError("large answers"))


def _ignore(error: APIError) -> None:
    """End nothing: the request has ended."""


def event_bytes(event: TokenEvent, num_choices: int) -> int:
    """Return the estimated size of an event in the answer. Each of `num_choices` choices has the prompt's part."""
    return (
        TOKEN_BYTES * len(event.token_ids)
        + sum([_position_bytes(each.num_top) for each in event.logprobs or ()])
        + num_choices * sum([_position_bytes(each.num_top) for each in event.prompt_logprobs or ()])
        + NUMBER_BYTES * len(event.embedding or ())
    )


def too_large(body: Body, max_tokens_field: Callable[[Body], str], max_bytes: int) -> InvalidValueError:
    """Return the error of a request whose answer would be larger than `max_bytes`: it names the field to reduce."""
    declared = type(body).model_fields.keys() & {"top_logprobs", "logprobs", "prompt_logprobs"}
    numbers = {name: getattr(body, name) or 0 for name in sorted(declared)}
    param = max(numbers, key=lambda name: numbers[name])
    if not numbers[param]:
        param = "n" if body.requested().num_choices > 1 else max_tokens_field(body)
    return too_large_error(param, "answer that has not been read yet" if body.stream else "answer", max_bytes)


def too_large_error(param: str | None, answer: str, max_bytes: int) -> InvalidValueError:
    """Return the error of a request whose answer, called `answer`, would be larger than `max_bytes`."""
    message = f"the {answer} takes more than {max_bytes} bytes of memory, the limit of this server"
    start = "" if param is None else f"Invalid '{param}': "
    return InvalidValueError(f"{start}{message} (--max-buffered-bytes).", param=param, code=None)


def prompt_bytes(body: GenerationRequest, submits: Sequence[Submit]) -> int:
    """Return how much of the answer is the text or the token ids of the prompts."""
    is_echoed = getattr(body, "echo", None) or body.return_token_ids
    return ECHO_BYTES * sum(len(submit.prompt_token_ids) * submit.n for submit in submits) if is_echoed else 0


def least_bytes(body: GenerationRequest, submits: Sequence[Submit]) -> int:
    """Return the least size that the answer can have, of what is in memory at once."""
    return prompt_bytes(body, submits) + sum(submit.n * _choice_bytes(body, submit) for submit in submits)


def least_embedding_bytes(submits: Sequence[Submit], hidden_size: int) -> int:
    """Return the least size of the embeddings of prompts, each of which has `hidden_size` numbers."""
    return NUMBER_BYTES * hidden_size * sum(submit.params.pooling is not None for submit in submits)


def _choice_bytes(body: GenerationRequest, submit: Submit) -> int:
    params = submit.params
    ends_early = body.stop or params.stop_token_ids or params.grammar or params.repetition_detection
    num_tokens = params.max_tokens if params.ignore_eos and not ends_early else params.min_tokens
    token = TOKEN_BYTES + _position_bytes(params.logprobs)
    in_prompt = (len(submit.prompt_token_ids) - 1) * _position_bytes(params.prompt_logprobs)
    return in_prompt + (0 if body.stream else num_tokens * token)


def _position_bytes(num_logprobs: int | None) -> int:
    return 0 if num_logprobs is None else POSITION_BYTES + ALTERNATIVE_BYTES * num_logprobs
