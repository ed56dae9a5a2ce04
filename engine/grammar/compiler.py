"""Compilation of grammars with llguidance, within limits on their size and on the time they take. No torch.

A grammar is a text that llguidance reads: Lark with its extensions, or a JSON object with a JSON schema or a regular
expression. It is compiled twice: before admission (server.constrained.grammars), and in the engine, to constrain the
output. llguidance computes a mask by walking the trie of all tokens along a lexer, made of
derivatives of regular expressions, and an Earley parser (https://github.com/guidance-ai/llguidance).
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from engine.shared.recently_used import RecentlyUsed

MAX_GRAMMAR_BYTES = 128 * 1024
MAX_KEPT_BYTES = 1 << 20  # of the texts of compiled grammars in the cache; compiled, they take up to 60 times as much
MIN_KEPT_BYTES = 1 << 14  # for which a shorter grammar counts
NUM_ERROR_CHARS = 200
STACK_BYTES = 16 << 20  # of the engine's thread that compiles; llguidance recurses
MAX_FORCED_TOKENS = 2048  # at the beginning of a grammar
MAX_CHECK_SECONDS = 0.4  # of processor time. Most grammars take a few milliseconds; the engine stalls meanwhile

# Sets of tokens (slices). Where a JSON string may continue with any token of a set, llguidance allows the whole set
# without trying each token. Without sets of short tokens, it would try nearly all tokens in a string of limited length.
_LENGTHS = ("{1,4}", "{1,8}", "{1,12}", "{1,16}", "{1,20}", "{1,30}", "+")
SLICES = tuple(r'[^"\\\x00-\x1F\x7F]' + length for length in _LENGTHS)

# Bounds on one grammar: some milliseconds for a mask, some hundred for compilation.
LIMITS = LLParserLimits(
    max_grammar_size=100_000,
    initial_lexer_fuel=300_000,
    step_lexer_fuel=200_000,
    step_max_items=10_000,
    max_items_in_row=1_000,
    max_lexer_states=50_000,
    precompute_large_lexemes=False,
    verbose_errors=False,
)


class GrammarError(ValueError):
    """A grammar that cannot be followed. The message may be shown to the client that sent it."""


class GrammarCompiler:
    """Compiles grammars for one vocabulary, and caches the most recently used. Thread-safe."""

    def __init__(self, tokenizer: str, eos_token_ids: Iterable[int]) -> None:
        """Read the text of a tokenizer.json. Raises ValueError if llguidance does not support the tokenizer.

        This takes a quarter of a second for 49,000 tokens, in which no other Python thread runs.
        """
        self._tokenizer = LLTokenizer(tokenizer, eos_token=list(eos_token_ids), slices=list(SLICES))
        self._compiled: RecentlyUsed[str, LLMatcher] = RecentlyUsed(MAX_KEPT_BYTES)
        self._lock = threading.Lock()  # held while a matcher that is in the cache is copied

    def compile(self, grammar: str) -> LLMatcher:
        """Return a matcher at the beginning of `grammar`. Raises GrammarError. Other Python threads run meanwhile."""
        if (kept := self._compiled.get(grammar)) is not None:
            return self._copy(kept)
        num_bytes = len(grammar.encode())
        if num_bytes > MAX_GRAMMAR_BYTES:
            raise GrammarError(f"it is larger than {MAX_GRAMMAR_BYTES} bytes")
        compiled = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
        _check(compiled.deep_copy())  # not all grammars can be rolled back
        self._compiled.put(grammar, compiled, max(num_bytes, MIN_KEPT_BYTES))
        return self._copy(compiled)

    def _copy(self, matcher: LLMatcher) -> LLMatcher:
        with self._lock:
            return matcher.deep_copy()


def _check(matcher: LLMatcher) -> None:
    """Raise GrammarError unless masks are computed in time and allow a token, at the start and after forced tokens.

    The matcher is at another position afterwards.
    """
    start = time.thread_time()
    for _ in range(2):
        compute_mask(matcher)
        if len(forced := matcher.compute_ff_tokens()) > MAX_FORCED_TOKENS:
            raise GrammarError(f"more than {MAX_FORCED_TOKENS} tokens are forced at its beginning")
        matcher.consume_tokens(forced)
        if time.thread_time() - start > MAX_CHECK_SECONDS:
            raise GrammarError("following it takes too long")


def compute_mask(matcher: LLMatcher) -> bytes:
    """Return one bit per token, the lowest id first. Raises GrammarError if the matcher has failed.

    A failed matcher would allow the end of the output, which the grammar does not.
    """
    if matcher.is_error():
        raise GrammarError(error_message(matcher))
    mask = matcher.compute_bitmask()
    if matcher.is_error() or (matcher.is_stopped() and not matcher.is_accepting()):
        raise GrammarError(error_message(matcher))
    return mask


def error_message(matcher: LLMatcher) -> str:
    """Return the matcher's error as one line of at most NUM_ERROR_CHARS characters."""
    message = matcher.get_error()
    if not message or message.startswith("NoExtension"):
        return "no text matches it"
    found = re.search("^error: (.+)", message, re.MULTILINE)  # errors in regular expressions come after the expression
    line = found[1] if found else message.strip().partition("\n")[0]
    return line[:NUM_ERROR_CHARS]
