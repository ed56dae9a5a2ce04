"""Token masks for requests with a grammar: which tokens may come next in the output. No torch."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from itertools import takewhile

from llguidance import LLMatcher

from engine.grammar.compiler import STACK_BYTES, GrammarCompiler, GrammarError, compute_mask, error_message
from engine.shared.messages import SamplingParams

logger = logging.getLogger(__name__)


class Matcher:
    """Tracks the position of one request's output in its grammar.

    The position depends on the output alone: each call gets the whole output, and consumes the new tokens. So a
    matcher survives preemption. Draft tokens are rolled back within the call. The masks also enforce ignore_eos and
    min_tokens, unless the grammar allows nothing but the end.
    """

    def __init__(
        self, compiled: Future[LLMatcher], params: SamplingParams, eos_token_ids: Sequence[int], num_token_ids: int
    ) -> None:
        """`num_token_ids`: of the model; the tokenizer of the grammar may have more."""
        self._compiled = compiled
        self._params = params
        self._eos_token_ids = eos_token_ids
        self._num_token_ids = num_token_ids
        self._matcher: LLMatcher | None = None
        self._num_consumed = 0
        self._can_roll_back = True  # not if the grammar limits the tokens of a part, or has stop strings of its own
        self.problem: str | None = None  # why the last masks are incomplete

    @property
    def is_ready(self) -> bool:
        """True if the grammar is compiled, so that the other methods do not wait."""
        return self._compiled.done()

    def wait(self, timeout: float) -> None:
        """Block until the grammar is compiled, for at most `timeout` seconds."""
        wait([self._compiled], timeout)

    def cancel(self) -> None:
        """Cancel the compilation if it has not begun. The matcher must not be used afterwards."""
        self._compiled.cancel()

    def rewind(self) -> None:
        """Return to the beginning, so that the next call consumes the whole output again."""
        self._matcher = None

    def masks(self, output: Sequence[int], draft: Sequence[int] = ()) -> list[bytes]:
        """Return the masks of the token after the output, and of the token after each draft token.

        Bit i of byte j is 1 if token 8 j + i is allowed. End tokens are allowed exactly where the grammar may end. If
        the grammar cannot be followed any further, because it exceeds a limit or no text can match it, the remaining
        masks are empty, and `problem` says why.
        """
        masks: list[bytes] = []
        self.problem = None
        try:
            matcher = self._at(output)
            masks.append(self._mask(matcher, len(output)))
            drafted = matcher if self._can_roll_back else matcher.deep_copy()
            while len(masks) <= len(draft) and drafted.try_consume_tokens([draft[len(masks) - 1]]):
                masks.append(self._mask(drafted, len(output) + len(masks)))
            if self._can_roll_back and not matcher.rollback(len(masks) - 1):
                raise GrammarError(error_message(matcher))
        except GrammarError as error:
            self.problem = str(error)
            logger.warning("a grammar cannot be followed: %s", error)
            self._matcher = None  # a failed matcher does not recover; the next call creates another
        return masks + [b""] * (len(draft) + 1 - len(masks))  # rows after a forbidden draft token are dropped

    def forced_tokens(self, output: Sequence[int]) -> list[int]:
        """Return the tokens that the grammar forces after the output, in the tokenizer's own tokenization.

        They end before the first that the model cannot sample.
        """
        try:
            forced = self._at(output).compute_ff_tokens()
            return list(takewhile(lambda token_id: token_id < self._num_token_ids, forced))
        except GrammarError:  # `masks` reports it
            return []

    def cut(self, output: Sequence[int], draft: Sequence[int]) -> list[int]:
        """Return the longest prefix of `draft` that the grammar allows after the output."""
        try:
            return list(draft[: self._at(output).validate_tokens(list(draft))])
        except GrammarError:
            return []

    def _at(self, output: Sequence[int]) -> LLMatcher:
        """Return the matcher, advanced to the end of the output."""
        if self._matcher is None:
            try:
                compiled = self._compiled.result()
                self._can_roll_back = _can_roll_back(compiled.deep_copy())
                self._matcher, self._num_consumed = compiled.deep_copy(), 0
            except Exception as error:  # any error of llguidance must end only this request
                raise GrammarError(f"it cannot be compiled: {error}") from error
        if not self._matcher.consume_tokens(list(output[self._num_consumed :])):
            raise GrammarError(error_message(self._matcher))
        self._num_consumed = len(output)
        return self._matcher

    def _mask(self, matcher: LLMatcher, num_output_tokens: int) -> bytes:
        mask, params = compute_mask(matcher), self._params
        if _first_allowed(mask) >= self._num_token_ids:
            raise GrammarError("it allows only tokens that the model does not have")
        is_early = num_output_tokens < params.min_tokens
        ends = [*(self._eos_token_ids if is_early or params.ignore_eos else ())]
        ends += params.stop_token_ids if is_early else ()
        return _without(mask, ends) if ends else mask


def _can_roll_back(matcher: LLMatcher) -> bool:
    """Return whether tokens can be taken back from a new matcher, which is spent afterwards. Raises GrammarError."""
    return matcher.try_consume_tokens([_first_allowed(compute_mask(matcher))]) == 1 and matcher.rollback(1)


def _first_allowed(mask: bytes) -> int:
    """Return the lowest token that a mask allows; one past its end if there is none."""
    rest = mask.lstrip(b"\0")
    first = rest[0] if rest else 1
    return 8 * (len(mask) - len(rest)) + (first & -first).bit_length() - 1


def _without(mask: bytes, token_ids: Sequence[int]) -> bytes:
    """Return the mask with `token_ids` forbidden, or the mask itself if it allows no other token."""
    narrowed = bytearray(mask)
    for token_id in token_ids:
        if token_id < 8 * len(mask):
            narrowed[token_id >> 3] &= ~(1 << (token_id & 7))
    return bytes(narrowed) if any(narrowed) else mask


class GrammarManager:
    """Creates the matchers of an engine's requests. Grammars are compiled in a thread."""

    def __init__(self, eos_token_ids: Sequence[int], num_token_ids: int) -> None:
        self._eos_token_ids = eos_token_ids
        self._num_token_ids = num_token_ids
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        others = threading.stack_size(STACK_BYTES)
        self._thread.submit(int)  # which starts the thread
        threading.stack_size(others)
        self._tokenizer: str | None = None  # until `prepare` has read it
        self._compiler: GrammarCompiler | None = None

    def set_tokenizer(self, tokenizer: str) -> None:
        """Set the text of the tokenizer.json. Later calls are ignored: all are of the same model."""
        if self._compiler is None:
            self._tokenizer = tokenizer

    def prepare(self) -> None:
        """Read the tokenizer, unless it has been read or is not set. No Python thread runs meanwhile.

        If llguidance does not support the tokenizer, no request may have a grammar.
        """
        if self._tokenizer is not None:
            with suppress(ValueError):
                self._compiler = GrammarCompiler(self._tokenizer, self._eos_token_ids)
            self._tokenizer = None

    def new_matcher(self, params: SamplingParams) -> Matcher:
        """Return a matcher for `params.grammar`, and start to compile it. The tokenizer must have been set."""
        self.prepare()
        assert self._compiler is not None
        assert params.grammar is not None
        compiled = self._thread.submit(self._compiler.compile, params.grammar)
        return Matcher(compiled, params, self._eos_token_ids, self._num_token_ids)
