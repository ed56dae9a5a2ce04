"""The limit of what a model thinks before it answers."""

from engine.shared.messages import ThinkingLimit
from server.constrained.constraints import EXCLUSIVE
from server.context import ServerContext
from server.generation.prompts import Prompt
from server.http.errors import InvalidValueError, UnsupportedParameterError
from server.schemas.common import GenerationRequest
from server.text.reasoning import ThinkTags

PARAM = "thinking_token_budget"


def thinking_limit(context: ServerContext, body: GenerationRequest, prompt: Prompt) -> ThinkingLimit | None:
    """Raises UnsupportedParameterError for a model whose thoughts have no tags, or tags of several tokens."""
    if body.thinking_token_budget in (None, -1):
        return None
    format = prompt.output_format
    if format is None or format.think_tags is None:
        raise UnsupportedParameterError(PARAM, "The model's chat template has no tags of thoughts.")
    tags = _tag_ids(context, format.think_tags)
    if tags is None:
        raise UnsupportedParameterError(PARAM, "The tags of the model's thoughts are not tokens of their own.")
    for name in EXCLUSIVE:
        if getattr(body, name):
            raise InvalidValueError(f"Invalid '{name}': not allowed with '{PARAM}'.", param=name)
    max_tokens, (start_id, end_id) = body.thinking_token_budget or 0, tags
    return ThinkingLimit(max_tokens=max_tokens, start_id=start_id, end_id=end_id, is_open=format.is_thinking)


def can_limit_thoughts(context: ServerContext) -> bool:
    """Whether a chat may have a `thinking_token_budget`."""
    tags = None if context.chat_template is None else context.chat_template.think_tags
    return tags is not None and _tag_ids(context, tags) is not None


def _tag_ids(context: ServerContext, tags: ThinkTags) -> tuple[int, int] | None:
    """The tokens that begin and end thoughts, if that is one each."""
    ids = [context.tokenizer.encode(tag, add_special_tokens=False) for tag in (tags.start, tags.end)]
    return (ids[0][0], ids[1][0]) if all(len(of_tag) == 1 for of_tag in ids) else None
