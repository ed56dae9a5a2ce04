"""`POST /v1/requests/{id}/cancel` and `.../replay`."""

from typing import Literal

import msgspec


class CancelResponse(msgspec.Struct, frozen=True):
    id: str
    cancelled: Literal[True] = True


class Alternative(msgspec.Struct, frozen=True):
    token_id: int
    token: str
    logprob: float


class Distribution(msgspec.Struct, frozen=True):
    """What the model said at one position."""

    token_id: int
    token: str
    logprob: float
    rank: int  # 1: the most likely token
    top: list[Alternative]


class Difference(msgspec.Struct, frozen=True):
    part: Literal["prompt", "output"]
    position: int  # of the token in its part
    recorded: Distribution
    replayed: Distribution | None  # None: the answer had ended


class ReplayedChoice(msgspec.Struct, frozen=True):
    index: int
    num_tokens: int  # that were compared
    bit_equal: bool  # tokens and log probabilities
    difference: Difference | None  # the first


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["replay"] = "replay"
    bit_equal: bool
    choices: list[ReplayedChoice]
