"""Tokenized prompts, and the checks that they fit the model's context."""

from dataclasses import dataclass, field, replace

from engine.shared.messages import TokenLogprobs
from server.http.errors import ContextLengthExceededError, clip, invalid
from server.models.served_model import ServedModel
from server.schemas.request_fields import NO_LIMIT
from server.text.parsers.answer_parser import AnswerFormat

MAX_TOKEN_BYTES = 256  # no vocabulary in use has longer tokens; the longest are runs of 128 spaces
MAX_COUNTED = 1 << 16  # characters of a text that is refused with its number of tokens; that takes about 30 ms


@dataclass(slots=True)
class Prompt:
    """One prompt of a request, with what the engine reports about it."""

    token_ids: list[int]
    text: str | None = None  # None: the client sent token ids or messages
    answer_format: AnswerFormat | None = None  # None: answers are plain text
    num_cached_tokens: int = 0  # taken from the prefix cache
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of all tokens but the first, if requested


def truncate_prompt(prompt: Prompt, num_tokens: int, side: str) -> Prompt:
    """Return the last `num_tokens` tokens of a prompt, or the first if `side`, the one to cut, is `right`."""
    if len(prompt.token_ids) <= num_tokens:
        return prompt
    token_ids = prompt.token_ids[:num_tokens] if side == "right" else prompt.token_ids[-num_tokens:]
    return replace(prompt, token_ids=token_ids, text=None)


def vocab_size(model: ServedModel) -> int:
    """Return the number of usable tokens: the model's embedding table may have more rows than there are tokens."""
    return min(model.client.ready_info().vocab_size, model.tokenizer.vocab_size)


def check_text_size(num_bytes: int, max_model_len: int, noun: str) -> None:
    """Raise ContextLengthExceededError for a text that cannot fit, however it is tokenized.

    This saves the time to tokenize it.
    """
    if num_bytes > max_model_len * MAX_TOKEN_BYTES:
        num_tokens = -(-num_bytes // MAX_TOKEN_BYTES)
        raise ContextLengthExceededError(max_model_len, num_tokens, noun=noun, at_least=True)


def check_min_tokens(model: ServedModel, text: str, *, limit: int | None, noun: str) -> None:
    """Raise ContextLengthExceededError for a long text that certainly has more tokens than `limit`. None is no limit.

    This takes a fraction of the time to tokenize it.
    """
    if limit is None or len(text) <= max(limit, MAX_COUNTED):
        return
    if (num_tokens := model.tokenizer.min_tokens(text, enough=limit)) > limit:
        raise ContextLengthExceededError(limit, num_tokens, noun=noun, at_least=True)


def encode_prompt(
    model: ServedModel,
    value: str | list[int],
    *,
    noun: str = "prompt",
    add_special_tokens: bool = True,
    limit: int | None = None,
) -> Prompt:
    """Return the prompt for a text or token ids.

    Raises BadRequestError, whose message calls the field `noun`. A long text that certainly has more tokens than
    `limit` is not tokenized.
    """
    if isinstance(value, str):
        max_len = limit or model.max_model_len
        if len(value) > min(max_len, MAX_COUNTED):
            check_text_size(len(value.encode()), max_len, noun)
            check_min_tokens(model, value, limit=limit, noun=noun)
        prompt = Prompt(model.tokenizer.encode(value, add_special_tokens=add_special_tokens), value)
    else:
        prompt = Prompt(value)
    check_token_range(model, prompt.token_ids, noun)
    if not prompt.token_ids:
        raise invalid(noun, "expected at least one token, but got none")
    return prompt


def encode_fim_prompt(
    model: ServedModel,
    prefix: str | list[int],
    suffix: str,
    *,
    add_special_tokens: bool = True,
    limit: int | None = None,
) -> Prompt:
    """Return the prompt for the text between a prefix and a suffix.

    As at llama.cpp's /infill, the text of special tokens is plain text in both. Raises BadRequestError. A long
    prefix or suffix that certainly has more tokens than `limit` is not tokenized.
    """
    tokenizer = model.tokenizer
    if tokenizer.fim is None:
        problem = "not supported by this model, which has no fill-in-the-middle (FIM) tokens"
        raise invalid("suffix", problem, code="unsupported_parameter")
    text = prefix if isinstance(prefix, str) else ""
    check_text_size(len(text.encode()) + len(suffix.encode()), model.max_model_len, "prompt")
    for part in (text, suffix):
        check_min_tokens(model, part, limit=limit, noun="prompt")
    if isinstance(prefix, str):
        prefix = tokenizer.encode_plain(prefix)
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None and tokenizer.add_bos else []
    joined = tokenizer.fim.join(prefix, tokenizer.encode_plain(suffix, is_continuation=True))
    token_ids = [*(bos if add_special_tokens else ()), *joined]
    check_token_range(model, token_ids, "prompt")
    return Prompt(token_ids)


def check_token_range(model: ServedModel, token_ids: list[int], noun: str) -> None:
    """Raise InvalidValueError for a token id that the model does not have. The tokenizer may have more ids."""
    size = vocab_size(model)
    smallest, largest = min(token_ids, default=0), max(token_ids, default=0)
    if smallest < 0 or largest >= size:
        wrong = smallest if smallest < 0 else largest
        raise invalid(noun, f"expected token ids from 0 to {size - 1}, but got {clip(str(wrong))} instead")


def max_prompt_tokens(max_tokens: int | None, max_model_len: int) -> int:
    """Return how long a prompt may be that is truncated to leave room for `max_tokens`.

    A number that no prompt would leave room for is no more than a wish for long answers.
    """
    return max_model_len - (1 if max_tokens in (None, NO_LIMIT) or max_tokens >= max_model_len else max_tokens)


def fit_max_tokens(
    max_tokens: int | None,
    num_prompt_tokens: int,
    max_model_len: int,
    noun: str,
    *,
    default: int | None = None,
    is_strict: bool = False,
) -> int:
    """Return the maximum number of tokens of a choice: `max_tokens`, or the rest of the context if that is less.

    If `max_tokens` is None, it is `default`. NO_LIMIT and None stand for the rest of the context. All lengths are in
    tokens.

    Raises ContextLengthExceededError if the context has no room for a prompt and one token after it (for the prompt
    alone, if `max_tokens` is 0), or with `is_strict` for `max_tokens`.
    """
    room = max_model_len - num_prompt_tokens
    if room < 0:
        raise ContextLengthExceededError(max_model_len, num_prompt_tokens, noun=noun)
    num_required = 1
    if max_tokens is not None and max_tokens != NO_LIMIT and (is_strict or max_tokens == 0):
        num_required = max_tokens
    if num_required > room:
        raise ContextLengthExceededError(max_model_len, num_prompt_tokens, num_required, noun=noun)
    limit = default if max_tokens is None else max_tokens
    return room if limit is None or limit == NO_LIMIT else min(limit, room)
