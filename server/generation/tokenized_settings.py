"""The settings of a request that need its tokenizer: words that must not come, and the chain of samplers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from engine.shared.messages import MIROSTAT_ORDER, SamplerChain
from server.context import ServerContext
from server.http.errors import InvalidValueError
from server.http.validation import echo
from server.schemas.common import GenerationRequest
from server.schemas.samplers import SamplerFields
from server.text.tokenizer import Tokenizer
from server.text.words import spellings

SEQUENCE_BREAKERS = ("\n", ":", '"', "*")  # llama.cpp's

# sampler -> from where on it acts, and what only says how
SAMPLERS: dict[str, tuple[float, tuple[str, ...]]] = {
    "top_n_sigma": (0, ()),
    "xtc_probability": (0, ("xtc_threshold",)),
    "dry_multiplier": (0, ("dry_base", "dry_allowed_length", "dry_penalty_last_n")),
    "mirostat": (0, ("mirostat_tau", "mirostat_eta")),
    "repeat_last_n": (-1, ()),
}


class TokenizedSettings(NamedTuple):
    """What `SamplingParams` calls by the same names."""

    bad_words: tuple[tuple[int, ...], ...] = ()
    chain: SamplerChain | None = None


def tokenize_settings(context: ServerContext, body: GenerationRequest) -> TokenizedSettings:
    """May take long, if `body` has such settings. Raises InvalidValueError for a bad word without tokens."""
    return TokenizedSettings(
        bad_words=_bad_words(context.tokenizer, body.bad_words or ()), chain=_sampler_chain(context, body)
    )


def _bad_words(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    found: list[tuple[int, ...]] = []
    for index, word in enumerate(words):
        sequences = spellings(tokenizer, word)
        if not sequences:
            message = f"Invalid 'bad_words[{index}]': the model has no tokens for {echo(word)}."
            raise InvalidValueError(message, param=f"bad_words[{index}]")
        found += map(tuple, sequences)
    return tuple(found)


def _sampler_chain(context: ServerContext, body: SamplerFields) -> SamplerChain | None:
    """None where the request asks for none of its samplers, nor for an order."""
    fields: dict[str, Any] = {}
    for name, (off, details) in SAMPLERS.items():
        if (value := getattr(body, name)) is not None and value > off:
            given = {detail: getattr(body, detail) for detail in details if getattr(body, detail) is not None}
            fields |= {name: value} | given
    if body.typical_p is not None and body.typical_p < 1:
        fields["typical_p"] = body.typical_p
    if body.samplers is not None:
        fields["order"] = tuple(body.samplers)
    if "mirostat" in fields:
        fields["order"] = MIROSTAT_ORDER
    if "dry_multiplier" in fields:
        strings = SEQUENCE_BREAKERS if body.dry_sequence_breakers is None else body.dry_sequence_breakers
        fields["dry_breakers"] = context.sequence_breakers.find(strings)
    return SamplerChain(**fields) if fields else None
