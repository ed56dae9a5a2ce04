"""Translates the parameters of a request into the engine's, with the checks that need the model's vocabulary."""

import hashlib
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

from engine.shared.messages import (
    GREEDY_TEMPERATURE,
    MIROSTAT_ORDER,
    ExtraSamplers,
    ReasoningLimit,
    RepetitionDetection,
    SamplingParams,
)
from server.constrained.grammars import EXCLUSIVE
from server.generation.prompts import Prompt, vocab_size
from server.http.errors import InvalidValueError, UnsupportedParameterError, clip, invalid
from server.http.validation import echo
from server.models.served_model import ServedModel
from server.schemas.generation_request import GenerationRequest, Requested
from server.schemas.request_fields import RepetitionFields
from server.schemas.sampling import SamplingFields
from server.settings.sampling import PARAMETERS
from server.text.parsers.answer_parser import ReasoningTags
from server.text.token_sequences import word_sequences

PARAM = "thinking_token_budget"

SEQUENCE_BREAKERS = ("\n", ":", '"', "*")  # llama.cpp's default for DRY

# Field that turns a sampler on -> the value up to which it is off, and the fields with its details.
SAMPLERS: dict[str, tuple[float, tuple[str, ...]]] = {
    name: (each.off, tuple(detail for detail, other in PARAMETERS.items() if other.of == name))
    for name, each in PARAMETERS.items()
    if each.off is not None
}

# Fields of a request that has any of the settings below.
TOKENIZED_FIELDS = frozenset({"bad_words", "typical_p", "samplers", *SAMPLERS})


class TokenizedSettings(NamedTuple):
    """The tokenized settings, with the field names of `SamplingParams`."""

    bad_words: tuple[tuple[int, ...], ...] = ()
    extra_samplers: ExtraSamplers | None = None


NO_SETTINGS = TokenizedSettings()


def tokenize_settings(model: ServedModel, body: GenerationRequest) -> TokenizedSettings:
    """Return the settings of a request. May be slow. Raises InvalidValueError for a bad word without tokens."""
    return TokenizedSettings(
        bad_words=_bad_words(model, body.bad_words or ()), extra_samplers=_extra_samplers(model, body)
    )


def _bad_words(model: ServedModel, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Return the token sequences of words, without those that the model cannot generate."""
    found: list[tuple[int, ...]] = []
    size = vocab_size(model)
    for index, word in enumerate(words):
        sequences = word_sequences(model.tokenizer, word)
        if not sequences:
            message = f"Invalid 'bad_words[{index}]': the model has no tokens for {echo(word)}."
            raise InvalidValueError(message, param=f"bad_words[{index}]")
        found += [tuple(sequence) for sequence in sequences if max(sequence) < size]
    return tuple(found)


def _extra_samplers(model: ServedModel, body: SamplingFields) -> ExtraSamplers | None:
    """Return the samplers that the request turns on, or None if it sets neither samplers nor their order."""
    fields: dict[str, Any] = {}
    for name, (off, details) in SAMPLERS.items():
        if (value := getattr(body, name)) is not None and value > off:
            present = {detail: getattr(body, detail) for detail in details if getattr(body, detail) is not None}
            fields |= {name: value} | present
    if body.typical_p is not None and body.typical_p < 1:
        fields["typical_p"] = body.typical_p
    if body.samplers is not None:
        fields["order"] = tuple(body.samplers)
    if "mirostat" in fields:
        fields["order"] = MIROSTAT_ORDER
    if "dry_multiplier" in fields:
        strings = SEQUENCE_BREAKERS if body.dry_sequence_breakers is None else body.dry_sequence_breakers
        fields["dry_breakers"] = model.sequence_breakers.find(strings)
    return ExtraSamplers(**fields) if fields else None


# The limit on the number of reasoning tokens.


def reasoning_limit(model: ServedModel, body: GenerationRequest, prompt: Prompt) -> ReasoningLimit | None:
    """Return the engine's limit for a request, or None if it sets none.

    Raises UnsupportedParameterError for a model without reasoning tags, or whose tags are several tokens each, and
    InvalidValueError together with a parameter that could forbid the end tag.
    """
    if body.thinking_token_budget in (None, -1):
        return None
    format = prompt.answer_format
    if format is None or format.reasoning_tags is None:
        raise UnsupportedParameterError(PARAM, "The model's chat template has no reasoning tags.")
    tags = tag_ids(model, format.reasoning_tags)
    if tags is None:
        raise UnsupportedParameterError(PARAM, "The model's reasoning tags are not single tokens.")
    for name in EXCLUSIVE:
        if getattr(body, name):
            raise invalid(name, f"not allowed with '{PARAM}'")
    max_tokens, (start_id, end_id) = body.thinking_token_budget or 0, tags
    return ReasoningLimit(max_tokens=max_tokens, start_id=start_id, end_id=end_id, is_open=format.is_reasoning)


def tag_ids(model: ServedModel, tags: ReasoningTags) -> tuple[int, int] | None:
    """Return the token ids of the start and end tags, or None if a tag is more than one token."""
    ids = [model.tokenizer.encode(tag, add_special_tokens=False) for tag in (tags.start, tags.end)]
    return (ids[0][0], ids[1][0]) if all(len(tag) == 1 for tag in ids) else None


Body = TypeVar("Body", bound=GenerationRequest)

# Fields for which the checks below are made.
TOKEN_ID_FIELDS = frozenset({"logit_bias", "stop_token_ids", "allowed_token_ids", "logprob_token_ids"})
LOGPROB_FIELDS = frozenset({"logprobs", "top_logprobs", "prompt_logprobs"})

SEED_DOMAIN = b"lightwell-seed"
MIN_TOP_P = 1e-6  # less than the most likely token of any vocabulary has: only that one is kept


def derive_seed(seed: int, index: int, domain: bytes) -> int:
    """Return a seed that follows from another one, and from a number in its domain."""
    digest = hashlib.sha256(SEED_DOMAIN + domain + struct.pack("<qq", seed, index)).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def check_token_ids(body: GenerationRequest, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
    """Check the token ids of a request against the model's vocabulary.

    Raises InvalidValueError for a token id that the model does not have, and for `allowed_token_ids` if all of them are
    end tokens, which `min_tokens` forbids at first.
    """
    for name in ("logit_bias", "stop_token_ids", "allowed_token_ids", "logprob_token_ids"):
        if too_high := [token_id for token_id in getattr(body, name) or () if token_id >= vocab_size]:
            raise invalid(name, f"expected token ids from 0 to {vocab_size - 1}, but got {too_high[0]} instead")
    ends = {*(body.stop_token_ids or ()), *(() if body.ignore_eos else eos_token_ids)}
    if body.min_tokens and body.allowed_token_ids and ends.issuperset(body.allowed_token_ids):
        raise invalid("allowed_token_ids", "all of them are end tokens, which 'min_tokens' forbids at first")


def resolve_num_logprobs(body: Body, max_logprobs: int, vocab_size: int) -> Body:
    """Return the request with -1, which means all tokens, replaced by `vocab_size`.

    Raises InvalidValueError for more log probabilities than `max_logprobs` (`--max-logprobs`; -1: no limit) allows.
    """
    limit = vocab_size if max_logprobs == -1 else max_logprobs
    names = ("logprobs", "top_logprobs", "prompt_logprobs")
    fields = {name: getattr(body, name) for name in names if name in type(body).model_fields}
    for name, number in fields.items():
        if number == -1 and max_logprobs != -1:
            problem = f"-1 requests all tokens, but this server allows at most {max_logprobs} (--max-logprobs)"
            raise invalid(name, problem, code="integer_below_min_value")
        if number is not None and number is not True and number > limit:
            problem = f"integer above maximum value. Expected a value <= {limit}, but got {clip(str(number))} instead"
            raise invalid(name, problem, code="integer_above_max_value")
    return body.model_copy(update={name: vocab_size for name, number in fields.items() if number == -1})


def sampling_params(
    body: GenerationRequest,
    requested: Requested,
    tokenized: TokenizedSettings,
    *,
    max_tokens: int,
    seed: int,
    vocab_size: int,
    reasoning_limit: ReasoningLimit | None = None,
) -> SamplingParams:
    """Return the engine's sampling parameters for a request whose fields and token ids are valid.

    The default sampling has been applied to the request. Raises InvalidValueError if min_tokens > max_tokens.
    """
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        problem = f"expected a value <= {max_tokens} (max_tokens), but got {min_tokens} instead"
        raise invalid("min_tokens", problem)

    temperature = 1.0 if body.temperature is None else body.temperature
    top_k = body.top_k or 0
    penalties = [each for each in (body.repetition_penalty, body.repeat_penalty) if each is not None]
    return SamplingParams(
        max_tokens=max_tokens,
        seed=seed,
        temperature=temperature if temperature >= GREEDY_TEMPERATURE else 0.0,
        top_k=top_k if 0 < top_k < vocab_size else 0,
        top_p=1.0 if body.top_p is None else max(body.top_p, MIN_TOP_P),
        min_p=body.min_p or 0.0,
        repetition_penalty=penalties[0] if penalties else 1.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        logit_bias=body.logit_bias or {},
        allowed_token_ids=tuple(dict.fromkeys(body.allowed_token_ids or ())),
        bad_words=tokenized.bad_words,
        extra_samplers=tokenized.extra_samplers,
        min_tokens=min_tokens,
        ignore_eos=bool(body.ignore_eos),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        repetition_detection=_repetition_detection(body.repetition_detection) if body.repetition_detection else None,
        logprobs=0 if body.logprob_token_ids else requested.num_logprobs,
        logprob_token_ids=tuple(dict.fromkeys(body.logprob_token_ids or ())),
        prompt_logprobs=requested.num_prompt_logprobs,
        post_sampling_probs=bool(body.post_sampling_probs),
        reasoning_limit=reasoning_limit,
    )


def _repetition_detection(fields: RepetitionFields) -> RepetitionDetection | None:
    if not fields.max_pattern_size:
        return None
    return RepetitionDetection(
        min_pattern_size=fields.min_pattern_size or 1,
        max_pattern_size=fields.max_pattern_size,
        min_count=fields.min_count or 2,
    )
