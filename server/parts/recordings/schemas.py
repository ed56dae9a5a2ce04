"""The answer of a replay."""

from typing import Literal

import msgspec


class TokenAlternative(msgspec.Struct, frozen=True):
    token_id: int
    token: str
    logprob: float


class TokenDistribution(msgspec.Struct, frozen=True):
    """The token at one position and the most likely tokens there."""

    token_id: int
    token: str
    logprob: float
    rank: int  # 1: the most likely token
    top: list[TokenAlternative]


class ReplayDifference(msgspec.Struct, frozen=True):
    part: Literal["prompt", "output"]
    position: int  # index of the token in its part
    recorded: TokenDistribution
    replayed: TokenDistribution | None  # None: the replayed output is shorter


class ReplayedChoice(msgspec.Struct, frozen=True):
    index: int
    num_tokens: int  # output tokens that were compared
    bit_equal: bool  # tokens and log probabilities are identical
    difference: ReplayDifference | None  # the first one


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["replay"] = "replay"
    bit_equal: bool
    choices: list[ReplayedChoice]
