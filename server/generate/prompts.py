"""What a request's input becomes, and whether it fits."""

from dataclasses import dataclass, field, replace

from engine.messages import TokenLogprobs
from server.context import ServerContext
from server.errors import BadRequestError, ContextLengthExceededError
from server.text.output_parser import OutputFormat

MAX_TOKEN_BYTES = 256  # no vocabulary in use has longer tokens; the longest are runs of 128 spaces


@dataclass(slots=True)
class Prompt:
    """One prompt of a request, and what becomes known of it while it runs."""

    token_ids: list[int]
    text: str | None = None  # None: the client sent token ids, or messages
    output_format: OutputFormat | None = None  # None: an answer is plain text
    num_cached_tokens: int = 0  # found in the prefix cache
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of all tokens but the first, if asked for


def truncated(prompt: Prompt, num_tokens: int, side: str) -> Prompt:
    """The last tokens of a prompt, or with side `right` the first, where it has more than `num_tokens`."""
    if len(prompt.token_ids) <= num_tokens:
        return prompt
    token_ids = prompt.token_ids[:num_tokens] if side == "right" else prompt.token_ids[-num_tokens:]
    return replace(prompt, token_ids=token_ids, text=None)


def vocab_size(context: ServerContext) -> int:
    """Tokens that exist: the model's table may have rows beyond the tokenizer's last one."""
    return min(context.client.ready_info().vocab_size, context.tokenizer.vocab_size)


def check_text_size(num_bytes: int, max_model_len: int, noun: str) -> None:
    """Raises BadRequestError for a text that cannot fit, whatever its tokens are; tokenizing it would take long."""
    if num_bytes > max_model_len * MAX_TOKEN_BYTES:
        message = (
            f"This model's maximum context length is {max_model_len} tokens. However, your {noun} resulted in more "
            f"than {max_model_len} tokens. Please reduce the length of the {noun}."
        )
        raise BadRequestError(message, param=noun, code="context_length_exceeded")


def fit_max_tokens(
    max_tokens: int | None, num_prompt_tokens: int, max_model_len: int, noun: str, *, default: int | None = None
) -> int:
    """How many tokens a choice may have.

    Where the client did not say (None) it is `default`, or what the context has room for if that is less or `default`
    is None; but at least 1. Raises ContextLengthExceededError: nothing that a client sent is ever cut.
    """
    room = max_model_len - num_prompt_tokens
    if room < 0:
        raise ContextLengthExceededError(max_model_len, num_prompt_tokens, noun=noun)
    num_wanted = 1 if max_tokens is None else max_tokens
    if num_wanted > room:
        raise ContextLengthExceededError(max_model_len, num_prompt_tokens, num_wanted, noun=noun)
    if max_tokens is not None:
        return max_tokens
    return room if default is None else min(default, room)
