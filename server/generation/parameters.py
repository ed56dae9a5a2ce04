"""Judges the parameters of a request, and translates them into the engine's."""

import hashlib
import re
import secrets
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from pydantic import BaseModel

from engine.shared.messages import RepetitionDetection, SamplingParams
from server.api.chat.schemas import ChatMessage
from server.generation.tokenized_settings import TokenizedSettings
from server.http.errors import (
    InvalidValueError,
    UnknownParameterError,
    UnsupportedParameterError,
    clip,
)
from server.schemas.common import GenerationRequest
from server.schemas.common import RepetitionDetection as RepetitionFields

Body = TypeVar("Body", bound=GenerationRequest)

GREEDY_TEMPERATURE = 1e-5  # below it the noise would decide nothing but ties
MAX_WARNINGS_CHARS = 1024  # of the header
SEED_DOMAIN = b"lightwell-seed"

# Parameters that change an answer and are not supported yet, or not by every endpoint -> the values, beside null, that
# ask for nothing.
UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "include_reasoning": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "web_search_options": (),
    "n_predict": (-1,),
    "n_probs": (0,),
    "t_max_predict_ms": (0, -1),
    "thinking_budget_tokens": (-1,),
    "reasoning_budget_tokens": (-1,),
    "reasoning_format": ("auto", "deepseek"),
    "reasoning_effort": ("none", "medium"),
    "structural_tag": (),
    "guided_whitespace_pattern": (),
    "json_schema": (),
    "grammar": ("",),
    "regex": (),
    "ebnf": (),
    "stop_regex": (),
    "logits_processors": ([],),
    "custom_logit_processor": (),
    "vllm_xargs": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "logprobs_mode": ("raw_logprobs",),
    "prompt_embeds": (),
    "truncate_prompt_tokens": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "add_special_tokens": (False,),
    "return_prompt_text": (False,),
    "echo": (False,),
    "max_completion_tokens": (),
    "top_a": (0,),
    "tfs_z": (1,),
    "no_repeat_ngram_size": (0,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "smoothing_factor": (0,),
    "dynatemp_range": (0,),
    "mirostat_mode": (0,),
    "lora_path": (),
    "lora": ([],),
    "mcp_servers": ([],),
    "container": (),
    "kv_transfer_params": (),
}

# What other servers call parts of one parameter -> what to send instead.
INSTEAD: Mapping[str, str] = {
    "json_schema": "structured_outputs.json",
    "regex": "structured_outputs.regex",
    "grammar": "structured_outputs.grammar",
    "ebnf": "structured_outputs.grammar",
    "structural_tag": "structured_outputs.structural_tag",
    "n_predict": "max_tokens",
    "n_probs": "logprobs",
    "thinking_budget_tokens": "thinking_token_budget",
    "reasoning_budget_tokens": "thinking_token_budget",
    "lora_path": "the adapter's name as model",
    "lora": "the adapter's name as model",
}

# Known parameters that change no text.
HARMLESS = frozenset(
    {
        "user",
        "store",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "guided_decoding_backend",
        "spaces_between_special_tokens",  # there are none that the text has not
        # These only qualify what is refused above.
        "dynatemp_exponent",
        "smoothing_curve",
    }
)

# What OpenAI's clients send back of an earlier answer; it was never shown to the model as text.
HARMLESS_IN_MESSAGES = frozenset(("refusal", "annotations"))


def unknown_parameters(body: BaseModel, *, strict: bool, unread: Sequence[str] = ()) -> list[str]:
    """The fields that are ignored because nobody knows them; `unread` are more of them.

    Raises UnsupportedParameterError for one that cannot be ignored, UnknownParameterError for any if `strict`.
    """
    for name, value in _extra(body):
        if name in UNSUPPORTED and not _asks_for_nothing(value, UNSUPPORTED[name]):
            raise UnsupportedParameterError(name, f"Use {INSTEAD[name]}." if name in INSTEAD else None)
    names = [name for name, _ in _extra(body) if name not in UNSUPPORTED and name not in HARMLESS]
    for part in ("stream_options", "lightwell"):
        names += [f"{part}.{name}" for name, _ in _extra(getattr(body, part, None))]
    if "messages" in type(body).model_fields:
        names += dict.fromkeys(_unknown_in_messages(getattr(body, "messages", None) or ()))
    names += unread
    if names and strict:
        raise UnknownParameterError(clip(names[0]))
    return names


def _unknown_in_messages(messages: Sequence[ChatMessage]) -> Iterator[str]:
    """A null there is what a client has made of an absent field."""
    for message in messages:
        for name, value in _extra(message):
            if value is not None and name not in HARMLESS_IN_MESSAGES:
                yield f"messages[].{name}"
        for part in message.content if isinstance(message.content, list) else ():
            for name, value in _extra(part):
                if value is not None:
                    yield f"messages[].content[].{name}"


def _extra(model: object) -> Iterator[tuple[str, object]]:
    """Nothing of what the endpoint's model does not declare, which is named as a whole."""
    extra = model.model_extra if isinstance(model, BaseModel) else None
    yield from (extra or {}).items()


def _asks_for_nothing(value: object, passing: tuple[object, ...]) -> bool:
    return value is None or any(
        value == other and isinstance(value, bool) == isinstance(other, bool) for other in passing
    )


def warnings_header(names: Sequence[str]) -> str:
    """One line of harmless characters, whatever the names are."""
    shown = [re.sub(r"[^A-Za-z0-9_.\[\]-]", "?", clip(name, 64)) or "?" for name in names]
    text = f"ignored parameters: {', '.join(shown)}"
    return text if len(text) <= MAX_WARNINGS_CHARS else f"{text[:MAX_WARNINGS_CHARS].rsplit(', ', 1)[0]}, ..."


def choose_seed(server_seed: int | None, number: int) -> int:
    """For a request without a seed: derived from the server's seed and the request's number, else 64 random bits."""
    return secrets.randbits(64) - 2**63 if server_seed is None else _derive(server_seed, number, b"request")


def prompt_seed(seed: int, index: int) -> int:
    """The seed of the request's prompt `index`. The first prompt has the request's own."""
    return _derive(seed, index, b"prompt") if index else seed


def _derive(seed: int, index: int, domain: bytes) -> int:
    digest = hashlib.sha256(SEED_DOMAIN + domain + struct.pack("<qq", seed, index)).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def check_token_ids(body: GenerationRequest, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
    """Raises InvalidValueError for a token id that the model does not have, or if none that is allowed can be."""
    for name in ("logit_bias", "stop_token_ids", "allowed_token_ids", "logprob_token_ids"):
        if too_high := [token_id for token_id in getattr(body, name) or () if token_id >= vocab_size]:
            message = f"Invalid '{name}': expected token ids from 0 to {vocab_size - 1}, but got {too_high[0]} instead."
            raise InvalidValueError(message, param=name)
    ends = {*(body.stop_token_ids or ()), *(() if body.ignore_eos else eos_token_ids)}
    if body.min_tokens and body.allowed_token_ids and ends.issuperset(body.allowed_token_ids):
        message = "Invalid 'allowed_token_ids': all of them would end the text before 'min_tokens'."
        raise InvalidValueError(message, param="allowed_token_ids")


def with_num_logprobs(body: Body, max_logprobs: int, vocab_size: int) -> Body:
    """The request with the size of the vocabulary in the place of -1, where `max_logprobs` is -1 too.

    Raises InvalidValueError if it asks for more than is allowed.
    """
    limit = vocab_size if max_logprobs == -1 else max_logprobs
    names = ("logprobs", "top_logprobs", "prompt_logprobs")
    fields = {name: getattr(body, name) for name in names if name in type(body).model_fields}
    for name, number in fields.items():
        if number == -1 and max_logprobs != -1:
            message = f"Invalid '{name}': all tokens were asked for, but the server allows {max_logprobs} at most."
            raise InvalidValueError(message, param=name, code="integer_below_min_value")
        if number is not None and number is not True and number > limit:
            message = (
                f"Invalid '{name}': integer above maximum value. Expected a value <= {limit}, but got "
                f"{clip(str(number))} instead."
            )
            raise InvalidValueError(message, param=name, code="integer_above_max_value")
    return body.model_copy(update={name: vocab_size for name, number in fields.items() if number == -1})


def sampling_params(
    body: GenerationRequest,
    tokenized: TokenizedSettings,
    *,
    max_tokens: int,
    seed: int,
    vocab_size: int,
    defaults: Mapping[str, float],
) -> SamplingParams:
    """The engine's view of a request whose fields and token ids have been judged.

    `defaults` are the model's own. Raises InvalidValueError if min_tokens is more than max_tokens.
    """
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        message = f"Invalid 'min_tokens': expected a value <= {max_tokens} (max_tokens), but got {min_tokens} instead."
        raise InvalidValueError(message, param="min_tokens")

    def choose(name: str, value: float | None, default: float) -> float:
        return defaults.get(name, default) if value is None else value

    temperature = choose("temperature", body.temperature, 1.0)
    top_k = int(choose("top_k", body.top_k, 0))
    return SamplingParams(
        max_tokens=max_tokens,
        seed=seed,
        temperature=temperature if temperature >= GREEDY_TEMPERATURE else 0.0,
        top_k=top_k if 0 < top_k < vocab_size else 0,
        top_p=choose("top_p", body.top_p, 1.0),
        min_p=choose("min_p", body.min_p, 0.0),
        repetition_penalty=choose("repetition_penalty", body.chosen_repetition_penalty, 1.0),
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        logit_bias=body.logit_bias or {},
        allowed_token_ids=tuple(dict.fromkeys(body.allowed_token_ids or ())),
        bad_words=tokenized.bad_words,
        chain=tokenized.chain,
        min_tokens=min_tokens,
        ignore_eos=bool(body.ignore_eos),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        repetition_detection=_repetition_detection(body.repetition_detection),
        logprobs=0 if body.logprob_token_ids else body.num_logprobs,
        logprob_token_ids=tuple(dict.fromkeys(body.logprob_token_ids or ())),
        prompt_logprobs=body.num_prompt_logprobs,
        post_sampling_probs=bool(body.post_sampling_probs),
    )


def _repetition_detection(wanted: RepetitionFields | None) -> RepetitionDetection | None:
    if wanted is None or not wanted.max_pattern_size:
        return None
    return RepetitionDetection(
        min_pattern_size=wanted.min_pattern_size or 1,
        max_pattern_size=wanted.max_pattern_size,
        min_count=wanted.min_count or 2,
    )
