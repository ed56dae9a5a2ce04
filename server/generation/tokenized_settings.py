"""The settings that need the tokenizer: bad words, extra samplers and the limit on the number of reasoning tokens."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from engine.shared.messages import MIROSTAT_ORDER, ExtraSamplers, ReasoningLimit
from server.constrained.grammar_process import EXCLUSIVE
from server.generation.prompts import Prompt, vocab_size
from server.http.errors import InvalidValueError, UnsupportedParameterError
from server.http.validation import echo
from server.models.served_model import ServedModel
from server.schemas.generation_request import GenerationRequest
from server.schemas.samplers import SamplingFields
from server.settings.sampling_parameters import PARAMETERS
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
    tags = _tag_ids(model, format.reasoning_tags)
    if tags is None:
        raise UnsupportedParameterError(PARAM, "The model's reasoning tags are not single tokens.")
    for name in EXCLUSIVE:
        if getattr(body, name):
            raise InvalidValueError(f"Invalid '{name}': not allowed with '{PARAM}'.", param=name)
    max_tokens, (start_id, end_id) = body.thinking_token_budget or 0, tags
    return ReasoningLimit(max_tokens=max_tokens, start_id=start_id, end_id=end_id, is_open=format.is_reasoning)


def supports_reasoning_budget(model: ServedModel) -> bool:
    """Return whether chats with this model may have a `thinking_token_budget`."""
    tags = None if model.chat_template is None else model.chat_template.reasoning_tags
    return tags is not None and _tag_ids(model, tags) is not None


def _tag_ids(model: ServedModel, tags: ReasoningTags) -> tuple[int, int] | None:
    """Return the token ids of the start and end tags, or None if a tag is more than one token."""
    ids = [model.tokenizer.encode(tag, add_special_tokens=False) for tag in (tags.start, tags.end)]
    return (ids[0][0], ids[1][0]) if all(len(tag_ids) == 1 for tag_ids in ids) else None
