"""Statistics of one choice of a request."""

from dataclasses import dataclass

from engine.shared.records import RequestTimes


@dataclass(slots=True)
class ChoiceStats:
    """Token counts and times of one choice, from which its metrics are computed.

    Times are in seconds of `time.monotonic()`.
    """

    arrival: float
    max_tokens: int
    num_prompt_tokens: int
    num_expected_tokens: float = 0.0  # that the engine is expected to compute, until it begins with the choice
    load: float = 0.0  # tokens that it is expected to take of its engine, more or less
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    first_token: float | None = None
    last_token: float | None = None
    times: RequestTimes | None = None  # the latest ones that the engine reported
    has_ended: bool = False
