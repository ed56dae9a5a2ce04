"""Guesses of the next tokens (prompt lookup, Saxena 2023): text repeats itself, so what followed the last tokens
where they stood before may follow them again. No torch.

A step computes the rows of such a draft together with the request's own and samples all of them as it always does. Its
tokens are kept while they equal the draft: the first that differs is still true, for all before it were, and the rows
behind it are as if they had never been. A row's result does not depend on its neighbours (promise 1), so the answer is
bit for bit the one without drafts, and only the number of steps changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NGRAM_LENGTHS = (3, 2)  # the longer one finds less, and is right more often
START_LENGTH = 2
MAX_RESTS = 15


@dataclass(frozen=True)
class Policy:
    """When drafts are made, and how long they may be."""

    max_length: int  # tokens of a draft
    max_rows: int | None = None  # drafts are made for steps of up to so many rows, their own included; None: for all
    adapts: bool = False  # whether a request's drafts follow how its last ones fared

    def num_spare_rows(self, num_rows: int, budget: int) -> int:
        """How many rows of drafts a step of `num_rows` may have, if `budget` more would fit."""
        return budget if self.max_rows is None else min(budget, self.max_rows - num_rows)


# What a step costs, SmolLM2-135M on two cores. All weights are read for one row as for eight, so the first rows are
# nearly free:
#
#     rows                       1     2     4     8    16    32
#     milliseconds             4.1   4.1   4.9   6.0   9.8  16.8
#     ... for each row more           0.0   0.4   0.3   0.5   0.4
#
# Beside one request a draft of one token always pays, beside four if it is right more than once in five times, beside
# eight only if it is right twice in three times. So auto fills steps up to eight rows.
AUTO = Policy(max_length=7, max_rows=8, adapts=True)
NGRAM = Policy(max_length=4)
MODES = ("auto", "ngram", "off")


def choose_policy(mode: str, *, suits: bool) -> Policy | None:
    """The policy of a setting; None: no drafts. `suits` says whether auto makes some here. Raises ValueError."""
    if mode not in MODES:
        raise ValueError(f"--speculative {mode}: must be {', '.join(MODES)}")
    if mode == "ngram":
        return NGRAM
    return AUTO if mode == "auto" and suits else None


def num_confirmed(token_ids: Sequence[int], is_finite: Sequence[bool], draft_token_ids: Sequence[int]) -> int:
    """How many of the tokens that a request's rows yielded are true: the first, and each behind a draft that is right.

    A row without numbers yields nothing. Where it is the first, none is true; otherwise the next step computes it
    again, and it is the first there.
    """
    num = 0
    while num < len(token_ids) and is_finite[num] and (num == 0 or token_ids[num - 1] == draft_token_ids[num - 1]):
        num += 1
    return num


class NgramIndex:
    """Where the n-grams of a growing sequence last stood. Taking in a token costs the same however long it is."""

    def __init__(self) -> None:
        self.num_tokens = 0  # taken in so far
        # For each length: n-gram -> position of the token behind its last occurrence that has one.
        self.followers: dict[int, dict[tuple[int, ...], int]] = {length: {} for length in NGRAM_LENGTHS}

    def add(self, token_ids: Sequence[int]) -> None:
        """Take in what is new in a sequence since the last time."""
        for length, followers in self.followers.items():
            first = max(0, self.num_tokens - length)  # the first n-gram whose follower is new
            ngrams = zip(*(token_ids[first + offset :] for offset in range(length)), strict=False)
            followers.update(zip(ngrams, range(first + length, len(token_ids)), strict=False))
        self.num_tokens = len(token_ids)

    def find(self, token_ids: Sequence[int]) -> int | None:
        """Where what followed the last tokens begins. All of `token_ids` must have been added."""
        for length, followers in self.followers.items():
            position = followers.get(tuple(token_ids[-length:]))
            if position is not None:
                return position
        return None


class Drafter:
    """The drafts of one request. They depend on its own tokens and on how its drafts fared, on nothing else."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.index = NgramIndex()
        self.length = START_LENGTH if policy.adapts else policy.max_length
        self.num_rests = 0  # how many times no draft is made
        self.next_rests = 0  # ... after the next failure

    def draft(self, token_ids: Sequence[int], max_length: int) -> list[int]:
        """Up to `max_length` tokens that may follow; none where the last tokens are new."""
        length = min(self.length, max_length)
        if self.num_rests or length < 1:
            self.num_rests = max(0, self.num_rests - 1)
            return []
        self.index.add(token_ids)
        start = self.index.find(token_ids)
        if start is None:
            return []
        draft = list(token_ids[start : start + length])
        while len(draft) < length:  # the copy has reached its own beginning: what repeats itself goes on so
            draft.append(draft[len(draft) - (len(token_ids) - start)])
        return draft

    def learn(self, num_drafted: int, num_accepted: int) -> None:
        """Longer drafts after one that was right, shorter ones after another, rests after failures in a row."""
        if not self.policy.adapts:
            return
        if num_accepted == num_drafted:  # it may have been shorter than allowed
            self.length = max(self.length, min(2 * num_drafted, self.policy.max_length))
        else:
            self.length = max(1, num_accepted)
        if num_accepted:
            self.next_rests = 0
        else:
            self.num_rests = self.next_rests
            self.next_rests = min(2 * self.next_rests + 1, MAX_RESTS)
