"""The limit on the number of reasoning tokens."""

from engine.shared.messages import ReasoningLimit
from server.constrained.grammar_process import EXCLUSIVE
from server.generation.prompts import Prompt
from server.http.errors import InvalidValueError, UnsupportedParameterError
from server.models.served_model import ServedModel
from server.schemas.generation_request import GenerationRequest
from server.text.parsers.reasoning_parser import ReasoningTags

PARAM = "thinking_token_budget"


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
