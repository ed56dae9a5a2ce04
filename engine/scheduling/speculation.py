"""N-gram drafts, or prompt lookup (Saxena 2023): the tokens that followed an n-gram before may follow it again.

A step computes the rows of a draft together with the request's own row, and samples all of them as usual. Sampled
tokens are accepted while they equal the draft. The first that differs is accepted too, because all tokens before it
are right; the rows after it are dropped. A row's result does not depend on its neighbours (batch invariance), so the
answer is bit for bit the answer without drafts, and only the number of steps changes. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NGRAM_LENGTHS = (3, 2)  # the longer n-gram has fewer matches, but better ones
START_LENGTH = 2  # tokens of the first draft of a policy that adapts
MAX_SKIPPED = 15  # steps without a draft after a failure, at most


@dataclass(frozen=True)
class SpeculationPolicy:
    """When n-gram drafts are made, and how long they may be."""

    max_length: int  # tokens per draft
    max_rows: int | None = None  # drafts fill steps up to this many rows; None: up to the token budget
    adapts: bool = False  # whether the length follows the success of earlier drafts

    def num_spare_rows(self, num_rows: int, budget: int) -> int:
        """Return how many draft rows a step of `num_rows` rows may add if `budget` more rows fit."""
        return budget if self.max_rows is None else min(budget, self.max_rows - num_rows)


# Cost of a step, SmolLM2-135M on two cores. One row reads all weights, as eight rows do, so the first rows are nearly
# free:
#
#     rows                       1     2     4     8    16    32
#     milliseconds             4.1   4.1   4.9   6.0   9.8  16.8
#     ... per additional row          0.0   0.4   0.3   0.5   0.4
#
# With one running request, a draft of one token always pays; with four, if more than one in five is accepted; with
# eight, only if two in three are. So `auto` fills steps up to eight rows.
AUTO = SpeculationPolicy(max_length=7, max_rows=8, adapts=True)
NGRAM = SpeculationPolicy(max_length=4)
MODES = ("auto", "ngram", "off")


def choose_policy(mode: str, *, auto_enabled: bool) -> SpeculationPolicy | None:
    """Return the policy of `--speculative`, or None for no n-gram drafts.

    `auto_enabled`: whether `auto` makes drafts on this device. Raises ValueError if `mode` is unknown.
    """
    if mode not in MODES:
        raise ValueError(f"--speculative {mode}: must be {', '.join(MODES[:-1])} or {MODES[-1]}")
    if mode == "ngram":
        return NGRAM
    return AUTO if mode == "auto" and auto_enabled else None


def num_confirmed(token_ids: Sequence[int], is_finite: Sequence[bool], draft_token_ids: Sequence[int]) -> int:
    """Return how many of a request's sampled tokens count: the first, and each after a correct draft token.

    A row whose logits are not finite ends them. If it is not the first row, the next step computes it again as its
    first row.
    """
    num = 0
    while num < len(token_ids) and is_finite[num] and (num == 0 or token_ids[num - 1] == draft_token_ids[num - 1]):
        num += 1
    return num


class NgramIndex:
    """The last positions of the n-grams of a growing sequence. Adding a token takes constant time."""

    def __init__(self) -> None:
        self.num_tokens = 0  # added so far
        # For each length: n-gram -> position after its latest occurrence, not counting one at the very end.
        self.followers: dict[int, dict[tuple[int, ...], int]] = {length: {} for length in NGRAM_LENGTHS}

    def add(self, token_ids: Sequence[int]) -> None:
        """Add the tokens that are new since the last call."""
        for length, followers in self.followers.items():
            first = max(0, self.num_tokens - length)  # start of the first n-gram whose next token is new
            ngrams = zip(*(token_ids[first + offset :] for offset in range(length)), strict=False)
            followers.update(zip(ngrams, range(first + length, len(token_ids)), strict=False))
        self.num_tokens = len(token_ids)

    def find(self, token_ids: Sequence[int]) -> int | None:
        """Return the position after an earlier occurrence of the last tokens. All tokens must have been added."""
        for length, followers in self.followers.items():
            position = followers.get(tuple(token_ids[-length:]))
            if position is not None:
                return position
        return None


class Drafter:
    """Makes n-gram drafts for one request. They depend only on its tokens and on the success of its earlier drafts."""

    def __init__(self, policy: SpeculationPolicy) -> None:
        self.policy = policy
        self.index = NgramIndex()
        self.length = START_LENGTH if policy.adapts else policy.max_length
        self.num_to_skip = 0  # steps without a draft that are still to come
        self.next_skip = 0  # steps without a draft after the next failure

    def draft(self, token_ids: Sequence[int], max_length: int) -> list[int]:
        """Return up to `max_length` tokens that may follow; none if the last tokens have not occurred before."""
        length = min(self.length, max_length)
        if self.num_to_skip or length < 1:
            return []
        self.index.add(token_ids)
        start = self.index.find(token_ids)
        if start is None:
            return []
        draft = list(token_ids[start : start + length])
        while len(draft) < length:  # past the end of the text, the draft continues with itself
            draft.append(draft[len(draft) - (len(token_ids) - start)])
        return draft

    def adapt(self, num_drafted: int, num_accepted: int) -> None:
        """Lengthen drafts after a fully accepted one, shorten them otherwise, and pause after consecutive failures.

        To be called once for each step of the request, also if it had no draft.
        """
        if not num_drafted:
            self.num_to_skip = max(0, self.num_to_skip - 1)
        if not num_drafted or not self.policy.adapts:
            return
        if num_accepted == num_drafted:  # the draft may have been shorter than `length`
            self.length = max(self.length, min(2 * num_drafted, self.policy.max_length))
        else:
            self.length = max(1, num_accepted)
        if num_accepted:
            self.next_skip = 0
        else:
            self.num_to_skip = self.next_skip
            self.next_skip = min(2 * self.next_skip + 1, MAX_SKIPPED)
