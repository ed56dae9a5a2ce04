"""Who may read the records of the engine, and the questions by which they are read.

Records say who sends how much and when, and an inspection shows texts: without keys, they are for this machine's user.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import logging
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Self, TypeVar, TypeVarTuple, Unpack

import msgspec
from fastapi import Query
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response

from engine.parts.inspection import records
from engine.parts.inspection.records import ChoiceDetail, Question, QueuedChoiceView, RequestInfo, StepRowView
from engine.shared.messages import Answer, Ask, StopAsking
from server.context import ServerContext, get_context
from server.engine_client.connected_engine import ConnectedEngine
from server.generation.preamble import find_model
from server.http import errors
from server.http.access_control import HostRules, host_of_url, tenant_of_keys
from server.models.served_model import ServedModel
from server.parts.inspection.settings import hidden_without_keys
from server.settings.table import Settings
from server.tenants import Tenant, get_tenant
from server.text.text_threads import LONG_BYTES

logger = logging.getLogger(__name__)

MAX_QUESTIONS = 4  # that the engine has at a time, since they delay its steps
MAX_WAITING = 64  # more than there are streams of steps

MAX_CHOICES = 128  # of a request, that are shown

A = TypeVar("A", bound=records.Answer)
T = TypeVar("T")
Ts = TypeVarTuple("Ts")

TOO_MANY = "Too many clients ask what the engine does. Please retry later."

EngineNumber = Annotated[int, Query(ge=0, description="Number of the engine, with --data-parallel-size.")]
FORWARDING_HEADERS = frozenset(
    {"forwarded", "via", "x-real-ip", "x-client-ip", "x-cluster-client-ip", "true-client-ip", "cf-connecting-ip"}
)
FORWARDING_PREFIX = "x-forwarded-"
ALLOWED_BY = "; --inspect-public allows it."


class RecordQuestions:
    """Asks the engine, and hands each answer to the caller that waits for it.

    The engine has a question until it has answered it: also one whose caller is gone.
    """

    def __init__(self, engine: ConnectedEngine) -> None:
        self.clock_offset = time.time() - time.monotonic()  # Unix time of the engine's times
        self._engine = engine
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[bytes]] = {}
        self._waiting: dict[asyncio.Future[bytes], records.Question] = {}  # the next ones first

    @property
    def has_room(self) -> bool:
        """True if another question may wait."""
        return len(self._waiting) < MAX_WAITING

    async def ask(self, question: records.Question, kind: type[A]) -> A:
        """Return the engine's answer, which is of this kind.

        Raises QueueFullError if too many questions wait, ServerError if the engine fails to answer, the error passed to
        `fail`, or EngineUnavailableError.
        """
        self._engine.liveness.check_ready()
        if not self.has_room:
            raise errors.QueueFullError(1, TOO_MANY)
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[answer] = question
        self._send_next()
        try:
            return msgspec.msgpack.decode(await answer, type=kind)
        except msgspec.MsgspecError:
            logger.exception("an answer of the engine cannot be read")
            raise errors.ServerError from None
        except asyncio.CancelledError:
            self._stop(answer, question)
            raise
        finally:
            self._waiting.pop(answer, None)

    def _stop(self, answer: asyncio.Future[bytes], question: records.Question) -> None:
        """Tell the engine that nobody waits for an answer that may take it long."""
        numbers = [number for number, asked in self._asked.items() if asked is answer]
        if numbers and isinstance(question, records.Inspect):
            self._engine.send(StopAsking(numbers[0]))

    def finish(self, answer: Answer) -> None:
        """Hand over an answer, unless nobody waits for it any more, and ask the next question."""
        asked = self._asked.pop(answer.number, None)
        if asked is None:
            return
        self._send_next()
        if asked.done():
            return
        if answer.answer is None:
            asked.set_exception(errors.ServerError())
        else:
            asked.set_result(answer.answer)

    def fail(self, error: errors.APIError) -> None:
        """End all questions with `error`, those that wait, too."""
        for answer in (*self._asked.values(), *self._waiting):
            if not answer.done():
                answer.set_exception(error)
        self._asked.clear()
        self._waiting.clear()

    def _send_next(self) -> None:
        """Send questions while the engine has few. Those of callers that are gone are left out."""
        while self._waiting and len(self._asked) < MAX_QUESTIONS:
            answer = next(iter(self._waiting))
            question = self._waiting.pop(answer)
            if not answer.done():
                number = next(self._numbers)
                self._asked[number] = answer
                self._engine.send(Ask(number, msgspec.msgpack.encode(question)))


def questions_to(engine: ConnectedEngine) -> RecordQuestions:
    """Return what asks an engine."""
    if engine.asker is None:
        engine.asker = RecordQuestions(engine)
    asker: RecordQuestions = engine.asker
    return asker


async def check_may_read(
    request: Request,
    model: Annotated[str | None, Query(description="The model whose engine is asked. Default: the first one.")] = None,
) -> None:
    """Raise APIError unless the client may read records: its own ones, or with an admin key those of all."""
    settings = get_context(request).settings
    request.state.model = model
    if not settings.inspect:
        raise errors.APIError(404, "This server was started with --no-inspect.", code="not_enabled")
    if (error := _check_page(settings, request.headers)) is not None:
        raise error
    if not settings.needs_key and not settings.inspect_public and (reason := _refusal(settings, request.headers)):
        raise errors.APIError(403, reason + ALLOWED_BY)


def _check_page(settings: Settings, headers: Headers) -> errors.APIError | None:
    """Return why a request is refused for its Host or Origin, or None. Origins must be named: `*` allows none here.

    With keys, a page that names another host gains nothing: it does not have the key.
    """
    rules = HostRules([settings.host], [origin for origin in settings.allowed_origins if origin != "*"])
    own_host = host_of_url(f"//{headers.get('host', '')}") or None  # of the origin `null`, it is empty, too
    host_error = None if settings.needs_key else rules.check_host(headers)
    return host_error or rules.check_origin(headers, own_host=own_host) or _check_site(headers)


def _check_site(headers: Headers) -> errors.APIError | None:
    """Return why a request is refused that another site's page makes for an image or a link, or None.

    Browsers send no Origin with it. The page cannot read the answer, but the engine would work for it.
    """
    if headers.get("sec-fetch-site") == "cross-site" and "origin" not in headers:
        return errors.APIError(403, "What the engine does is not shown to other sites' pages that send no Origin.")
    return None


def _refusal(settings: Settings, headers: Headers) -> str | None:
    """Return why a client without a key may not read, or None."""
    if (reason := hidden_without_keys(settings)) is not None:
        return reason
    for name in headers:
        if name in FORWARDING_HEADERS or name.startswith(FORWARDING_PREFIX):
            return f"Without API keys, what the engine does is not shown through a proxy (header {name})"
    return None


def _requested_model(request: Request) -> ServedModel:
    """Return the base model of the query parameter `model`, or the first one. Raises ModelNotFoundError."""
    name, models = request.state.model, get_context(request).models
    return models.default if name is None or len(models.slots) == 1 else find_model(request, name).base


class RecordAccess:
    """The records that the client of a request may see."""

    def __init__(self, request: Request, engine: int = 0) -> None:
        """`engine`: number of the engine whose records are read. Raises InvalidValueError if there is none."""
        self.context: ServerContext = get_context(request)
        self.model: ServedModel = _requested_model(request)
        engines = self.model.client.engines
        if engine >= len(engines):
            message = f"Invalid 'engine': expected 0 to {len(engines) - 1}, but got {engine} instead."
            raise errors.InvalidValueError(message, param="engine")
        self.engine = engines[engine]
        self.tenant: Tenant = get_tenant(request)
        self.has_keys = self.context.settings.needs_key
        self._request = request
        self._num_reloads: int | None = None  # of the keys, when `check_key` last found the tenant

    def check_key(self) -> None:
        """Find the tenant again if the keys may have been read again. Raises UnauthorizedError if its key is gone."""
        keys = self.context.api_keys
        if not self.has_keys or self._num_reloads == keys.num_reloads:
            return
        self._num_reloads = keys.num_reloads
        tenant = tenant_of_keys(self._request.scope, keys)
        if tenant is None:
            raise errors.UnauthorizedError(key_given=True)
        self.tenant = tenant

    @property
    def own_name(self) -> str | None:
        """The name of the tenant whose requests are shown; None: those of all."""
        return None if self.tenant.is_admin else self.tenant.name

    def may_see(self, tenant: str) -> bool:
        return self.own_name in (None, tenant)

    def key_name(self, tenant: str) -> str | None:
        """Return the name of the key of a tenant. Without keys, tenants are addresses, which are not shown."""
        return tenant if self.has_keys and tenant else None

    @property
    def engine_id(self) -> str:
        """An id of the engine process. Steps of another one are numbered from 1 again."""
        number = "" if len(self.model.client.engines) == 1 else f"-{self.engine.number}"
        if self.context.models.unloads and (info := self.engine.liveness.info) is not None:
            number = f"-{info.pid}"  # another engine comes with each model, and each time that one is loaded
        return f"{self.context.created}{number}-{self.engine.liveness.num_restarts}"

    @property
    def questions(self) -> RecordQuestions:
        """The questions to the engine."""
        return questions_to(self.engine)

    async def ask(self, question: Question, kind: type[A]) -> A:
        """Return the engine's answer; see `RecordQuestions.ask`. Raises APIError."""
        return await self.questions.ask(question, kind)

    def show_choice(self, choice: StepRowView | QueuedChoiceView) -> bool:
        """Take the name off a choice of another client. Return whether it has kept it."""
        tenant = choice.key or ""
        if self.may_see(tenant):
            choice.key = self.key_name(tenant)
            return True
        choice.id = choice.prompt = choice.index = choice.key = None
        return False

    def show_request(self, info: RequestInfo) -> ChoiceDetail:
        """Return a choice of a request with Unix times, which the client may see."""
        view, offset = info.view, self.questions.clock_offset
        view.key = self.key_name(view.key or "")
        view.model, view.engine = view.model or self.model.name, self.engine.number
        view.arrival += offset
        view.first_token = None if view.first_token is None else view.first_token + offset
        view.finished = None if view.finished is None else view.finished + offset
        for each in view.preemptions:
            each.at, each.resumed = each.at + offset, None if each.resumed is None else each.resumed + offset
        return view

    def of_all_engines(self) -> list[Self]:
        """Return the same access to the records of each engine that can answer, or to these if none can."""
        accesses = []
        for engine in self.model.client.engines:
            access = copy.copy(self)
            access.engine = engine
            accesses.append(access)
        return [access for access in accesses if access.engine.liveness.is_ready] or [self]

    async def run(self, function: Callable[[Unpack[Ts]], T], *args: *Ts) -> T:
        """Run `function`, which converts records and may need some 20 ms, in a thread."""
        return await self.context.text_threads.run(self.tenant, LONG_BYTES, function, *args)

    async def respond(
        self, function: Callable[[Unpack[Ts]], object], *args: *Ts, headers: Mapping[str, str] | None = None
    ) -> Response:
        """Return what `function` makes of records, as JSON that counts in the memory limit of answers."""
        return self.context.long_answer(self._request, await self.run(_encode, function, args), headers)


def _encode(function: Callable[[Unpack[Ts]], object], args: tuple[*Ts]) -> bytes:
    return msgspec.json.encode(function(*args))


async def read_request(access: RecordAccess, request_id: str) -> tuple[RecordAccess, records.Requests]:
    """Return the choices of the latest request with an id, with details, and access to the engine that has them.

    Of a request with several prompts, engines may have one each: the others are left out. Raises APIError if there is
    none.
    """
    question = records.ReadRequests(tenant=access.own_name, id=request_id, limit=MAX_CHOICES)
    answers = [(each, await each.ask(question, records.Requests)) for each in access.of_all_engines()]
    found = [(each, answer) for each, answer in answers if answer.requests]
    if not found:
        message = f"No request with the id '{errors.clip(request_id)}' is running or among the last that have ended."
        raise errors.APIError(404, message, code="request_not_found")
    return max(found, key=lambda pair: pair[1].requests[0].times.arrival)
