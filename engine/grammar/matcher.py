"""Token bytes in, masks out: which tokens may come next in the output of a constrained request. No torch.

A grammar is a text that llguidance reads: Lark with its extensions, or a JSON object that holds a JSON schema or a
regular expression. It is compiled before admission, in a process that may be killed (`grammar_process.py`), and again
in the engine, to be followed. llguidance computes a mask by walking the tree of all tokens along a lexer of regular
expressions' derivatives and an Earley parser (https://github.com/guidance-ai/llguidance).
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from engine.shared.messages import SamplingParams

logger = logging.getLogger(__name__)

MAX_GRAMMAR_BYTES = 128 * 1024
NUM_KEPT = 64  # compiled grammars
NUM_ERROR_CHARS = 200
MAX_FORCED_TOKENS = 2048  # at the beginning
MAX_CHECK_SECONDS = 0.4  # of processor time; most take a few milliseconds, and the engine would stand still for longer

# Tokens that llguidance allows in one go where a string of JSON has room for all of them. Without the short ones each
# mask of a string whose length has a bound is a walk along nearly all tokens.
_LENGTHS = ("{1,4}", "{1,8}", "{1,12}", "{1,16}", "{1,20}", "{1,30}", "+")
SLICES = tuple(r'[^"\\\x00-\x1F\x7F]' + length for length in _LENGTHS)

# What one grammar may take: some milliseconds for a mask, some hundred for compiling.
LIMITS = LLParserLimits(
    max_grammar_size=100_000,
    initial_lexer_fuel=300_000,
    step_lexer_fuel=100_000,
    step_max_items=10_000,
    max_items_in_row=1_000,
    max_lexer_states=50_000,
    precompute_large_lexemes=False,
    verbose_errors=False,
)


class GrammarError(ValueError):
    """A grammar that cannot be followed. The message is fit for the client that sent it."""


class GrammarCompiler:
    """Makes matchers for one vocabulary, and keeps the last ones. Safe to use from several threads."""

    def __init__(self, tokenizer: str, eos_token_ids: Iterable[int]) -> None:
        """`tokenizer` is the text of a tokenizer.json. This takes a quarter of a second for 49,000 tokens, in which no
        other Python thread runs. Raises ValueError where llguidance cannot use the tokenizer.
        """
        self._tokenizer = LLTokenizer(tokenizer, eos_token=list(eos_token_ids), slices=list(SLICES))
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, grammar: str) -> LLMatcher:
        """A matcher at the beginning of the grammar. Raises GrammarError. Other Python threads run meanwhile."""
        with self._lock:
            if (compiled := self._compiled.get(grammar)) is not None:
                self._compiled.move_to_end(grammar)
                return compiled.deep_copy()
        if len(grammar.encode()) > MAX_GRAMMAR_BYTES:
            raise GrammarError(f"it is larger than {MAX_GRAMMAR_BYTES} bytes")
        compiled = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
        _check(compiled)
        with self._lock:
            self._compiled[grammar] = compiled
            if len(self._compiled) > NUM_KEPT:
                self._compiled.popitem(last=False)
            return compiled.deep_copy()


def _check(matcher: LLMatcher) -> None:
    """Raise GrammarError unless it allows something, as it begins and behind what it forces, and tells so soon."""
    start = time.thread_time()
    for _ in range(2):
        _compute_mask(matcher)
        if len(forced := matcher.compute_ff_tokens()) > MAX_FORCED_TOKENS:
            raise GrammarError(f"more than {MAX_FORCED_TOKENS} tokens are forced at its beginning")
        matcher.consume_tokens(forced)
        if time.thread_time() - start > MAX_CHECK_SECONDS:
            raise GrammarError("following it takes too long")
    matcher.reset()


def _compute_mask(matcher: LLMatcher) -> bytes:
    """One bit for each token, the lowest first. Raises GrammarError rather than allow what the grammar does not."""
    if matcher.is_error():  # it would allow the end
        raise GrammarError(_reason(matcher))
    mask = matcher.compute_bitmask()
    if matcher.is_error() or (matcher.is_stopped() and not matcher.is_accepting()):
        raise GrammarError(_reason(matcher))
    return mask


def _reason(matcher: LLMatcher) -> str:
    """What is wrong, in a line."""
    message = matcher.get_error()
    if not message or message.startswith("NoExtension"):
        return "no text matches it"
    found = re.search("^error: (.+)", message, re.MULTILINE)  # of a regular expression, which is shown before
    line = found[1] if found else message.strip().partition("\n")[0]
    return line[:NUM_ERROR_CHARS]


class Matcher:
    """Where one request's output stands in its grammar.

    This depends on the output alone: each call is told all of it, and takes in what is new. So it survives
    preemption, and what a draft adds is taken back in the same call. What keeps a request from ending too early is
    part of its masks, unless nothing else is allowed: the end of the grammar overrules ignore_eos and min_tokens.
    """

    def __init__(self, compiled: Future[LLMatcher], params: SamplingParams, eos_token_ids: Sequence[int]) -> None:
        self._compiled = compiled
        self._params = params
        self._eos_token_ids = eos_token_ids
        self._matcher: LLMatcher | None = None
        self._num_consumed = 0
        self.problem: str | None = None  # why the last masks ended early

    @property
    def is_ready(self) -> bool:
        """Whether the calls below need not wait for the compiler."""
        return self._compiled.done()

    def wait(self, timeout: float) -> None:
        """Until it is ready, for so many seconds at most."""
        wait([self._compiled], timeout)

    def cancel(self) -> None:
        """Compile it no more, if that has not begun. None of the other calls may follow."""
        self._compiled.cancel()

    def masks(self, output: Sequence[int], draft: Sequence[int] = ()) -> list[bytes]:
        """For the token behind the output, and behind each token of a draft, one bit for each token that may come.

        Bit i of byte j is token 8 j + i. End tokens are allowed exactly where the grammar may end. Where the grammar
        cannot be followed any further, because it takes too much, or because no text can match it, a mask is empty.
        """
        masks: list[bytes] = []
        self.problem = None
        try:
            matcher = self._at(output)
            masks.append(self._mask(matcher, len(output)))
            while len(masks) <= len(draft) and matcher.try_consume_tokens([draft[len(masks) - 1]]):
                masks.append(self._mask(matcher, len(output) + len(masks)))
            if not matcher.rollback(len(masks) - 1):
                raise GrammarError(_reason(matcher))
        except GrammarError as error:
            self.problem = str(error)
            logger.warning("a grammar cannot be followed: %s", error)
            self._matcher = None  # it would never recover, and the draft may have been wrong
        return masks + [b""] * (len(draft) + 1 - len(masks))  # behind a token that cannot be, nothing counts

    def forced_tokens(self, output: Sequence[int]) -> list[int]:
        """What can only follow the output, in the tokens in which the tokenizer spells it."""
        try:
            return self._at(output).compute_ff_tokens()
        except GrammarError:  # which the masks will show
            return []

    def cut(self, output: Sequence[int], draft: Sequence[int]) -> list[int]:
        """As much of a draft of what follows the output as the grammar allows."""
        try:
            return list(draft[: self._at(output).validate_tokens(list(draft))])
        except GrammarError:
            return []

    def _at(self, output: Sequence[int]) -> LLMatcher:
        """The matcher behind the output."""
        if self._matcher is None:
            try:
                self._matcher, self._num_consumed = self._compiled.result().deep_copy(), 0
            except Exception as error:  # of llguidance, whatever it may be: it ends this request alone
                raise GrammarError(f"it cannot be compiled: {error}") from error
        if not self._matcher.consume_tokens(list(output[self._num_consumed :])):
            raise GrammarError(_reason(self._matcher))
        self._num_consumed = len(output)
        return self._matcher

    def _mask(self, matcher: LLMatcher, num_output_tokens: int) -> bytes:
        mask, params = _compute_mask(matcher), self._params
        is_early = num_output_tokens < params.min_tokens
        ends = [*(self._eos_token_ids if is_early or params.ignore_eos else ())]
        ends += params.stop_token_ids if is_early else ()
        return _without(mask, ends) if ends else mask


def _without(mask: bytes, token_ids: Sequence[int]) -> bytes:
    """The mask without some tokens, unless no other is in it."""
    narrowed = bytearray(mask)
    for token_id in token_ids:
        if token_id < 8 * len(mask):
            narrowed[token_id >> 3] &= ~(1 << (token_id & 7))
    return bytes(narrowed) if any(narrowed) else mask


class Grammars:
    """Makes the matchers of an engine's requests, in a thread of its own."""

    def __init__(self, eos_token_ids: Sequence[int]) -> None:
        self._eos_token_ids = eos_token_ids
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        self._compiler: GrammarCompiler | None = None

    def learn(self, tokenizer: str) -> None:
        """Take the text of a tokenizer.json as the vocabulary. Only the first counts: all are of the same model.

        Where llguidance cannot use it, no request may have a grammar.
        """
        if self._compiler is None:
            with suppress(ValueError):
                self._compiler = GrammarCompiler(tokenizer, self._eos_token_ids)

    def new_matcher(self, params: SamplingParams) -> Matcher:
        """The matcher of `params.grammar`, once the vocabulary is known."""
        assert self._compiler is not None
        assert params.grammar is not None
        return Matcher(self._thread.submit(self._compiler.compile, params.grammar), params, self._eos_token_ids)
