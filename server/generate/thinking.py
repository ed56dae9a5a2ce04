"""The limit of what a model thinks before it answers."""

from engine.messages import ThinkingLimit
from server.context import ServerContext
from server.errors import InvalidValueError, UnsupportedParameterError
from server.generate.constraints import EXCLUSIVE
from server.generate.prompts import Prompt
from server.schemas.common import GenerationRequest

PARAM = "thinking_token_budget"


def thinking_limit(context: ServerContext, body: GenerationRequest, prompt: Prompt) -> ThinkingLimit | None:
    """Raises UnsupportedParameterError for a model whose thoughts have no tags, or tags of several tokens."""
    if body.thinking_token_budget in (None, -1):
        return None
    format = prompt.output_format
    if format is None or format.think_tags is None:
        raise UnsupportedParameterError(PARAM, "The model's chat template has no tags of thoughts.")
    tags = (format.think_tags.start, format.think_tags.end)
    ids = [context.tokenizer.encode(tag, add_special_tokens=False) for tag in tags]
    if any(len(of_tag) != 1 for of_tag in ids):
        raise UnsupportedParameterError(PARAM, "The tags of the model's thoughts are not tokens of their own.")
    for name in EXCLUSIVE:
        if getattr(body, name):
            raise InvalidValueError(f"Invalid '{name}': not allowed with '{PARAM}'.", param=name)
    return ThinkingLimit(
        max_tokens=body.thinking_token_budget or 0, start_id=ids[0][0], end_id=ids[1][0], is_open=format.is_thinking
    )
