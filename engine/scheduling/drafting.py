"""Which drafts a step computes, and what becomes of them. No torch.

A draft is a run of tokens that may follow a request's last one. There are two kinds: tokens that a grammar forces, and
n-gram drafts (engine.scheduling.speculation). Drafts only use rows and blocks that no request needs.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.scheduling.kv_manager import KVManager
from engine.scheduling.lifecycle import Lifecycle
from engine.scheduling.request import Request, Scheduled, Status
from engine.scheduling.speculation import Drafter, SpeculationPolicy
from engine.shared.messages import EngineStats

MIN_FORCED = 4  # lower bound of `DraftingState.max_forced` after a mismatch


class Drafting:
    """Adds drafts to the requests of a step, and settles them once the step's tokens are read."""

    def __init__(
        self,
        kv: KVManager,
        lifecycle: Lifecycle,
        stats: EngineStats,
        policy: SpeculationPolicy | None,
        max_model_len: int,
    ) -> None:
        """`policy`: when n-gram drafts are made; None: never."""
        self.kv = kv
        self.lifecycle = lifecycle
        self.stats = stats
        self.policy = policy
        self.max_model_len = max_model_len
        self.drafts_forced = True  # whether tokens that a grammar forces are drafted

    def add_drafts(self, scheduled: Sequence[Scheduled], budget: int) -> None:
        """Add drafts to scheduled requests that generate, at most `budget` rows in all.

        Forced tokens are drafted wherever there is room, n-gram drafts are made as far as the policy allows.
        """
        generating = [item for item in scheduled if item.num_samples and not item.is_prompt]
        generating = [item for item in generating if item.request.drafting.is_enabled]
        for item in [each for each in generating if each.request.matcher is not None] if self.drafts_forced else ():
            with self.lifecycle.isolated(item.request):
                budget -= self._add_draft(item, self._forced_tokens(item.request)[:budget])
        if self.policy is not None:
            running = [item for item in generating if item.request.status is Status.RUNNING]  # not failed above
            without_draft = [item for item in running if not item.draft_token_ids]
            num_rows = sum([item.num_tokens for item in scheduled])
            self._add_ngram_drafts(self.policy, without_draft, self.policy.num_spare_rows(num_rows, budget))

    def settle(self, item: Scheduled, num_accepted: int) -> None:
        """Adapt later drafts to how many tokens of this one were accepted, and drop the rest from the KV cache."""
        request, num_drafted = item.request, len(item.draft_token_ids)
        state = request.drafting
        if state.drafter is not None:
            state.drafter.adapt(num_drafted, num_accepted)
        if not num_drafted:
            return
        if request.matcher is not None:  # the model may tokenize the forced text in another way
            is_right = num_accepted == num_drafted
            state.max_forced = 2 * state.max_forced if is_right else max(MIN_FORCED, 2 * num_accepted)
        request.record.num_accepted_tokens += num_accepted
        self.stats.accepted_tokens_total += num_accepted
        self.kv.truncate(request, num_drafted - num_accepted)

    def take_back(self, item: Scheduled) -> None:
        """Count a draft of a step that does not run as never made."""
        if item.draft_token_ids:
            self.stats.drafts_total -= 1
            self.stats.draft_tokens_total -= len(item.draft_token_ids)

    def retry_without_draft(self, item: Scheduled) -> None:
        """Let the next step compute the rows again, without drafts from then on.

        A draft whose logits are not finite can spoil the rows before it.
        """
        item.request.drafting.is_enabled = False
        self.kv.truncate(item.request, item.num_tokens)

    def _add_ngram_drafts(self, policy: SpeculationPolicy, generating: Sequence[Scheduled], num_spare: int) -> None:
        """Share `num_spare` rows evenly among the drafts. Rows that a short draft does not use go to longer ones."""
        if num_spare < 1:
            return
        drafts: list[tuple[Scheduled, list[int]]] = []
        for item in generating:
            try:
                draft = self._ngram_draft(policy, item.request)
            except BaseException as error:
                self.lifecycle.take_fault(item.request, error, has_ended=False)
            else:
                if draft:
                    drafts.append((item, draft))
        drafts.sort(key=lambda pair: len(pair[1]))
        for index, (item, draft) in enumerate(drafts):
            share = -(-num_spare // (len(drafts) - index))
            try:
                num_spare -= self._add_draft(item, draft[:share])
            except BaseException as error:
                self.lifecycle.take_fault(item.request, error, has_ended=False)

    def _forced_tokens(self, request: Request) -> list[int]:
        if request.matcher is None or (room := self._max_draft_length(request)) < 1:
            return []
        forced = request.matcher.forced_tokens(request.output_token_ids)
        return forced[: min(room, request.drafting.max_forced)]

    def _ngram_draft(self, policy: SpeculationPolicy, request: Request) -> list[int]:
        room = self._max_draft_length(request)
        if room < 1:
            return []
        if request.drafting.drafter is None:
            request.drafting.drafter = Drafter(policy)
        draft = request.drafting.drafter.draft(request.token_ids, room)
        return draft if request.matcher is None else request.matcher.cut(request.output_token_ids, draft)

    def _max_draft_length(self, request: Request) -> int:
        """Return how many tokens a draft may have: one token that is not drafted must fit after it."""
        num_tokens = len(request.token_ids)
        num_left = request.params.max_tokens - (num_tokens - request.num_prompt_tokens)
        return min(num_left - 1, self.max_model_len - num_tokens - 1, request.kv.max_draft)

    def _add_draft(self, item: Scheduled, draft: list[int]) -> int:
        """Append a draft to a scheduled request unless blocks are short. Return the number of rows added."""
        if not draft or not self.kv.extend_blocks(item.request, len(draft)):
            return 0
        item.request.kv.num_computed += len(draft)
        item.draft_token_ids = draft
        item.num_tokens += len(draft)
        item.num_samples += len(draft)
        self.stats.drafts_total += 1
        self.stats.draft_tokens_total += len(draft)
        return len(draft)
