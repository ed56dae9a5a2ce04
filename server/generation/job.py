"""One request to generate: its state from its validation to the end of its answer, and its way into the engine."""

import time
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Generic

from msgspec.structs import replace

from engine.shared.messages import EngineInfo, Submit
from server.constrained.grammars import encode_request
from server.context import RequestSteps, ServerContext
from server.engine_client.answer_budget import (
    ECHO_FIELDS,
    LARGE_FIELDS,
    AnswerShare,
    least_bytes,
    prompt_bytes,
    too_large,
)
from server.engine_client.reservation import Reservation
from server.generation.choice import ChoiceState
from server.generation.endpoint import AnswerMetadata, Body, Endpoint, Writer
from server.generation.generation import Generation
from server.generation.parameters import (
    NO_SETTINGS,
    TOKENIZED_FIELDS,
    TokenizedSettings,
    derive_seed,
    reasoning_limit,
    sampling_params,
    tokenize_settings,
)
from server.generation.preamble import WARNINGS, Preamble
from server.generation.prompts import Prompt, fit_max_tokens, max_prompt_tokens, truncate_prompt
from server.http.errors import APIError
from server.models.served_model import ModelVariant, ServedModel
from server.schemas.generation_request import Requested
from server.schemas.structured_outputs import CONSTRAINED_FIELDS
from server.tenants import OwnedId, Tenant
from server.text.choice_text import ChoiceText


@dataclass(slots=True, kw_only=True)
class Job(Generic[Body]):
    """A valid request."""

    context: ServerContext
    endpoint: Endpoint[Body]
    body: Body
    requested: Requested
    fields: Set[str]  # the names of the fields that the request or the default sampling sets
    model: ModelVariant
    info: EngineInfo
    metadata: AnswerMetadata
    ids: tuple[str, ...]  # by which the request can be cancelled and replayed
    seed: int
    arrival: float  # seconds of time.monotonic()
    request_id: str  # for logs and errors
    preamble: Preamble
    tenant: Tenant
    text_size: int  # bytes
    steps: RequestSteps

    prompts: list[Prompt] = field(default_factory=list)  # once it is tokenized

    # Once it has been submitted to the engine:
    submitted: float = 0.0  # seconds of time.monotonic()
    num_prompt_bytes: int = 0  # of the prompts' part of the answer
    headers: dict[str, str] = field(default_factory=dict)  # of the response
    reservation: Reservation = field(init=False)
    generation: Generation = field(init=False)
    writer: Writer = field(init=False)
    share: AnswerShare = field(init=False)  # of the answer
    keys: tuple[OwnedId, ...] = ()  # while it can be cancelled

    def set_headers(self, submits: Sequence[Submit]) -> None:
        """Set the headers of the response, whose choices have the lengths that `submits` allow."""
        max_tokens = min([each.params.max_tokens for each in submits])
        is_plain = not self.preamble.ignored and not self.preamble.is_model_missing
        warnings = {} if is_plain else self.preamble.accept()
        requested, priority = self.requested.max_tokens, self.body.priority or 0
        if requested is not None and requested > max_tokens:
            capped = f"{self.endpoint.max_tokens_field(self.body)} capped at {max_tokens}, the rest of the context"
            warnings[WARNINGS] = "; ".join([*warnings.values(), capped])
        if priority < 0 and self.tenant.allowed_priority(priority) != priority:
            raised = "priority raised to 0: the API key allows no lower one"
            warnings[WARNINGS] = "; ".join([*warnings.values(), raised])
        deterministic = "true" if self.info.deterministic else "false"
        self.headers = {"x-lightwell-seed": str(self.seed), "x-lightwell-deterministic": deterministic, **warnings}

    def failure(self, error: APIError) -> bytes:
        """Return the last events of a stream that failed."""
        self.steps.fail(error)
        return self.writer.failure(error)

    def end(self, *, is_answered: bool = False) -> None:
        """End the generation, and count its answer no longer, unless a response that sends it does so.

        May be called again.
        """
        if not is_answered:
            self.share.release()
        self.generation.close()
        self.context.running.remove(self.generation, self.keys)
        self.keys = ()
        self.steps.end()


async def prepare(job: Job[Body]) -> tuple[list[Submit], float]:
    """Tokenize the request in a thread, and make its grammar.

    Returns a message to the engine for each prompt, and the seconds that tokenizing took. Raises BadRequestError.
    """
    submits, grammar_request, seconds = await job.context.text_threads.run(job.tenant, job.text_size, _tokenize, job)
    if grammar_request is not None:  # all prompts share the grammar
        grammar = await job.model.base.grammars.make(grammar_request, job.body, job.tenant)
        job.preamble.ignore(grammar.unenforced)
        submits = [replace(each, params=replace(each.params, grammar=grammar.text)) for each in submits]
    return submits, seconds


def _tokenize(job: Job[Body]) -> tuple[list[Submit], bytes | None, float]:
    """Set the prompts, and return the messages to the engine, the request for its grammar, and the seconds."""
    start, base, body = time.monotonic(), job.model.base, job.body
    if body.truncate_prompt_tokens is None:
        job.prompts = job.endpoint.encode(base, body, limit=job.info.max_model_len)
    else:
        job.prompts = encode_prompts(base, body, job.endpoint)
    tokenized = NO_SETTINGS if TOKENIZED_FIELDS.isdisjoint(job.fields) else tokenize_settings(base, body)
    seconds = time.monotonic() - start
    submits = [_make_submit(job, prompt, index, tokenized) for index, prompt in enumerate(job.prompts)]
    # The grammar depends on the prompt only for chats, which have a single one.
    has_grammar = not CONSTRAINED_FIELDS.isdisjoint(job.fields)
    return submits, encode_request(body, job.prompts[0].answer_format) if has_grammar else None, seconds


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
        seed=derive_seed(job.seed, index, b"prompt") if index else job.seed,
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


def submit(job: Job[Body], submits: Sequence[Submit], reservation: Reservation) -> None:
    """Send a request to the engine. Raises APIError."""
    context, body, base = job.context, job.body, job.model.base
    prompts, answers = job.prompts, context.answers
    error = partial(too_large, body, job.endpoint.max_tokens_field, answers.max_bytes)
    if not LARGE_FIELDS.isdisjoint(job.fields) and least_bytes(body, submits) > answers.max_bytes:
        raise error()
    choices = [_make_choice(job, index) for index in range(len(prompts) * job.requested.num_choices)]
    sent = submits
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
    job.set_headers(submits)
    for step in job.steps.on_submitted:
        step(job, submits)


def _make_choice(job: Job[Body], index: int) -> ChoiceState:
    tokenizer, body, requested = job.model.base.tokenizer, job.body, job.requested
    include_stop = bool(body.include_stop_str_in_output)
    skip_special_tokens = body.skip_special_tokens is not False
    format = job.prompts[index // requested.num_choices].answer_format
    # Special tokens that delimit reasoning and tool calls are never skipped: the parser must see them to remove them.
    special = {} if format is None else tokenizer.special_ids_in(format.markers)
    parser = None
    if format is not None:
        hidden = (*format.content_markers, *special) if skip_special_tokens else ()
        parser = format.new_parser(hidden=hidden)
    text = ChoiceText(
        tokenizer,
        stop=body.stop or (),
        include_stop=include_stop,
        min_tokens=body.min_tokens or 0,
        skip_special_tokens=skip_special_tokens,
        shown_ids=frozenset(special.values()),
        track_offsets=requested.num_logprobs is not None,
    )
    return ChoiceState(
        index,
        text,
        include_stop=include_stop,
        stop_token_ids=body.stop_token_ids or (),
        parser=parser,
        choice_id=f"{job.metadata.id}-{index}",
    )
