"""The way of a valid request into the engine: its prompts, the messages to the engine, and its choices."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import msgspec

from engine.shared.messages import Submit
from server.constrained.messages import CONSTRAINED_FIELDS, encode_request
from server.engine_client.answer_budget import (
    ECHO_FIELDS,
    LARGE_FIELDS,
    AnswerShare,
    least_bytes,
    prompt_bytes,
    too_large,
)
from server.engine_client.reservation import Reservation
from server.generation.choice import ChoiceParser, ChoiceState
from server.generation.endpoint import Endpoint
from server.generation.generation import Generation
from server.generation.job import Body, Job
from server.generation.parameters import prompt_seed, sampling_params
from server.generation.prompts import Prompt, fit_max_tokens, max_prompt_tokens, truncate_prompt
from server.generation.tokenized_settings import (
    NO_SETTINGS,
    TOKENIZED_FIELDS,
    TokenizedSettings,
    reasoning_limit,
    tokenize_settings,
)
from server.models.served_model import ServedModel
from server.text.choice_text import ChoiceText


@dataclass(slots=True)
class Prepared:
    """A tokenized request."""

    prompts: list[Prompt]
    submits: list[Submit]  # one message to the engine for each prompt
    grammar_request: bytes | None  # for the grammar process; all prompts share the grammar
    tokenizer_seconds: float


async def prepare(job: Job[Body]) -> Prepared:
    """Tokenize the request in a thread, and make its grammar in the grammar process. Raises BadRequestError."""
    prepared = await job.context.text_threads.run(job.tenant, job.text_size, _tokenize, job)
    if prepared.grammar_request is not None:
        grammar = await job.model.base.grammar_process.make(prepared.grammar_request, job.body, job.tenant)
        job.preamble.ignore(grammar.unenforced)
        prepared.submits = [_with_grammar(submit, grammar.text) for submit in prepared.submits]
    return prepared


def _with_grammar(submit: Submit, grammar: str) -> Submit:
    return msgspec.structs.replace(submit, params=msgspec.structs.replace(submit.params, grammar=grammar))


def _tokenize(job: Job[Body]) -> Prepared:
    start, base, body = time.monotonic(), job.model.base, job.body
    if body.truncate_prompt_tokens is None:
        prompts = job.endpoint.encode(base, body, limit=job.info.max_model_len)
    else:
        prompts = encode_prompts(base, body, job.endpoint)
    tokenized = NO_SETTINGS if TOKENIZED_FIELDS.isdisjoint(job.fields) else tokenize_settings(base, body)
    seconds = time.monotonic() - start
    submits = [_make_submit(job, prompt, index, tokenized) for index, prompt in enumerate(prompts)]
    # The grammar depends on the prompt only for chats, which have a single one.
    has_grammar = not CONSTRAINED_FIELDS.isdisjoint(job.fields)
    return Prepared(prompts, submits, encode_request(body, prompts[0].answer_format) if has_grammar else None, seconds)


def encode_prompts(model: ServedModel, body: Body, endpoint: Endpoint[Body]) -> list[Prompt]:
    """Return the tokenized prompts, truncated to `truncate_prompt_tokens`. Raises BadRequestError."""
    num_tokens = body.truncate_prompt_tokens
    prompts = endpoint.encode(model, body)
    if num_tokens is not None:
        if num_tokens == -1:
            num_tokens = max_prompt_tokens(body.requested().max_tokens, model.max_model_len)
        prompts = [truncate_prompt(prompt, num_tokens, body.truncation_side or "left") for prompt in prompts]
    return prompts


def _make_submit(job: Job[Body], prompt: Prompt, index: int, tokenized: TokenizedSettings) -> Submit:
    """Return the engine message for the prompt at `index`.

    Raises ContextLengthExceededError, or InvalidValueError for a min_tokens above max_tokens.
    """
    base, body, requested, settings = job.model.base, job.body, job.requested, job.context.settings
    max_tokens = fit_max_tokens(
        requested.max_tokens,
        len(prompt.token_ids),
        job.info.max_model_len,
        job.endpoint.noun,
        default=settings.default_max_tokens or requested.default_max_tokens,
        is_strict=settings.strict,
    )
    params = sampling_params(
        body,
        requested,
        tokenized,
        max_tokens=max_tokens,
        seed=prompt_seed(job.seed, index) if index else job.seed,
        vocab_size=min(job.info.vocab_size, base.tokenizer.vocab_size),
        reasoning_limit=None if body.thinking_token_budget is None else reasoning_limit(base, body, prompt),
    )
    adapter = job.model.adapter
    return Submit(
        request_id=f"{job.metadata.id}-{index}",
        prompt_token_ids=prompt.token_ids,
        params=params,
        arrival=job.arrival,
        n=requested.num_choices,
        priority=body.priority or 0,
        cache_salt=body.cache_salt or "",
        lora_name="" if adapter is None else adapter.name,
        lora_fingerprint="" if adapter is None else adapter.fingerprint,
        ids=job.ids,
        prompt=index,
    )


def submit(job: Job[Body], prepared: Prepared, reservation: Reservation) -> None:
    """Send a request to the engine. Raises APIError."""
    context, body, base = job.context, job.body, job.model.base
    prompts, submits, answers = prepared.prompts, prepared.submits, context.answers
    error = partial(too_large, body, job.endpoint.max_tokens_field, answers.max_bytes)
    if not LARGE_FIELDS.isdisjoint(job.fields) and least_bytes(body, submits) > answers.max_bytes:
        raise error()
    choices = [_make_choice(job, prompts, index) for index in range(len(prompts) * job.requested.num_choices)]
    sent: Sequence[Submit] = submits
    for change in job.steps.on_submit:
        sent = change(job, sent)
    job.submitted = time.monotonic()
    job.reservation = reservation
    streams = base.client.submit_all(sent, reservation)
    job.generation = generation = Generation(
        prompts, streams, choices, metrics=base.metrics, request_id=job.request_id, on_event=job.steps.on_event
    )
    job.share = reservation.answer = AnswerShare(answers, job.tenant, generation.refuse, error)
    if not ECHO_FIELDS.isdisjoint(job.fields):
        job.num_prompt_bytes = prompt_bytes(body, submits)
        job.share.add(job.num_prompt_bytes)
    job.keys = context.running.add(generation, job.ids, job.tenant.owner)
    job.writer = job.endpoint.writer(base, body, job.metadata, prompts)
    job.set_headers(min([each.params.max_tokens for each in submits]))
    for step in job.steps.on_submitted:
        step(job, submits)


def _make_choice(job: Job[Body], prompts: Sequence[Prompt], index: int) -> ChoiceState:
    tokenizer, body, requested = job.model.base.tokenizer, job.body, job.requested
    include_stop = bool(body.include_stop_str_in_output)
    skip_special_tokens = body.skip_special_tokens is not False
    format = prompts[index // requested.num_choices].answer_format
    # Special tokens that delimit reasoning and tool calls are never skipped: the parser must see them to remove them.
    special = {} if format is None else tokenizer.special_ids_in(format.markers)
    parser = None
    if format is not None:
        hidden = (*format.content_markers, *special) if skip_special_tokens else ()
        parser = ChoiceParser(format.new_parser(hidden=hidden), f"{job.metadata.id}-{index}")
    text = ChoiceText(
        tokenizer,
        stop=body.stop or (),
        include_stop=include_stop,
        min_tokens=body.min_tokens or 0,
        skip_special_tokens=skip_special_tokens,
        shown_ids=frozenset(special.values()),
        track_offsets=requested.num_logprobs is not None,
    )
    stop_token_ids = body.stop_token_ids or ()
    return ChoiceState(index, text, include_stop=include_stop, stop_token_ids=stop_token_ids, parser=parser)
