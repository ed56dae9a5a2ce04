"""How much memory an answer takes, or must take at least, and its share of the limit on all answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from engine.shared.messages import Submit, TokenEvent
from server.http.errors import APIError, BuffersExceedMemoryError, InvalidValueError
from server.schemas.generation_request import GenerationRequest
from server.shares import MemoryBudget, MemoryShare
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


class AnswerShare(MemoryShare):
    """What one request's answer takes of the memory: all of it, or what a stream's client has not read yet.

    A tenant's largest answer gives way first. One that exceeds the limit alone is refused for good.
    """

    def __init__(
        self, budget: MemoryBudget, tenant: Tenant, end: Callable[[APIError], None], too_large: Callable[[], APIError]
    ) -> None:
        """`end` ends the request with an error; `too_large` makes that of one that exceeds the budget alone."""
        super().__init__(budget, tenant.name, end)
        self.too_large = too_large

    @property
    def rank(self) -> float:
        return -self.num_bytes

    def refusal(self) -> APIError:
        is_too_large = self.num_bytes > self._budget.max_bytes
        return self.too_large() if is_too_large else BuffersExceedMemoryError("answers")


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


def _choice_bytes(body: GenerationRequest, submit: Submit) -> int:
    params = submit.params
    ends_early = body.stop or params.stop_token_ids or params.grammar or params.repetition_detection
    num_tokens = params.max_tokens if params.ignore_eos and not ends_early else params.min_tokens
    token = TOKEN_BYTES + _position_bytes(params.logprobs)
    in_prompt = (len(submit.prompt_token_ids) - 1) * _position_bytes(params.prompt_logprobs)
    return in_prompt + (0 if body.stream else num_tokens * token)


def _position_bytes(num_logprobs: int | None) -> int:
    return 0 if num_logprobs is None else POSITION_BYTES + ALTERNATIVE_BYTES * num_logprobs
