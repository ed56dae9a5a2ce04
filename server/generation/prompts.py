"""What a request's input becomes, and whether it fits."""

from dataclasses import dataclass, field, replace

from engine.shared.messages import TokenLogprobs
from server.context import ServerContext
from server.http.errors import ContextLengthExceededError, InvalidValueError, clip
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
    """Raises ContextLengthExceededError for a text that cannot fit, whatever its tokens are: they would take long."""
    if num_bytes > max_model_len * MAX_TOKEN_BYTES:
        num_tokens = -(-num_bytes // MAX_TOKEN_BYTES)
        raise ContextLengthExceededError(max_model_len, num_tokens, noun=noun, at_least=True)


def encode_prompt(
    context: ServerContext, value: str | list[int], *, noun: str = "prompt", add_special_tokens: bool = True
) -> Prompt:
    """A prompt as text or token ids. Raises BadRequestError, in which the field is called `noun`."""
    if isinstance(value, str):
        check_text_size(len(value.encode()), context.max_model_len, noun)
        prompt = Prompt(context.tokenizer.encode(value, add_special_tokens=add_special_tokens), value)
    else:
        _check_range(value, vocab_size(context), noun)
        prompt = Prompt(value)
    if not prompt.token_ids:
        raise InvalidValueError(f"Invalid '{noun}': expected at least one token, but got none.", param=noun)
    return prompt


def _check_range(token_ids: list[int], size: int, noun: str) -> None:
    """Raises InvalidValueError for a token id that the model does not have."""
    smallest, largest = min(token_ids, default=0), max(token_ids, default=0)
    if smallest < 0 or largest >= size:
        wrong = smallest if smallest < 0 else largest
        message = f"Invalid '{noun}': expected token ids from 0 to {size - 1}, but got {clip(str(wrong))} instead."
        raise InvalidValueError(message, param=noun)


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
