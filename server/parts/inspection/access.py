"""Who may read the records of the engine.

They say who sends how much and when, and an inspection shows texts: without keys, they are for this machine's user.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Annotated, Self, TypeVar, TypeVarTuple, Unpack

import msgspec
from fastapi import Query
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response

from engine.parts.inspection.records import ChoiceDetail, Question, QueuedChoiceView, RequestInfo, StepRowView
from server.context import ServerContext, get_context
from server.generation.preamble import find_model
from server.http.access_control import HostRules, host_of_url, tenant_of_keys
from server.http.errors import APIError, ForbiddenError, InvalidValueError, UnauthorizedError
from server.models.served_model import ServedModel
from server.parts.inspection.questions import A, RecordQuestions, questions_to
from server.settings.load import hidden_without_keys
from server.settings.table import Settings
from server.tenants import Tenant, get_tenant
from server.text.text_threads import LONG_BYTES

EngineNumber = Annotated[int, Query(ge=0, description="Number of the engine, with --data-parallel-size.")]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

FORWARDING_HEADERS = frozenset(
    {"forwarded", "via", "x-real-ip", "x-client-ip", "x-cluster-client-ip", "true-client-ip", "cf-connecting-ip"}
)
FORWARDING_PREFIX = "x-forwarded-"
ALLOWED_BY = "; --inspect-public allows it."


async def check_may_read(
    request: Request,
    model: Annotated[str | None, Query(description="The model whose engine is asked. Default: the first one.")] = None,
) -> None:
    """Raise APIError unless the client may read records: its own ones, or with an admin key those of all."""
    settings = get_context(request).settings
    request.state.model = model
    if not settings.inspect:
        raise APIError(404, "This server was started with --no-inspect.", code="not_enabled")
    if (error := _check_page(settings, request.headers)) is not None:
        raise error
    if not settings.needs_key and not settings.inspect_public and (reason := _refusal(settings, request.headers)):
        raise ForbiddenError(reason + ALLOWED_BY)


def _check_page(settings: Settings, headers: Headers) -> APIError | None:
    """Return why a request is refused for its Host or Origin, or None. Origins must be named: `*` allows none here.

    With keys, a page that names another host gains nothing: it does not have the key.
    """
    rules = HostRules([settings.host], [origin for origin in settings.allowed_origins if origin != "*"])
    own_host = host_of_url(f"//{headers.get('host', '')}") or None  # of the origin `null`, it is empty, too
    host_error = None if settings.needs_key else rules.check_host(headers)
    return host_error or rules.check_origin(headers, own_host=own_host) or _check_site(headers)


def _check_site(headers: Headers) -> APIError | None:
    """Return why a request is refused that another site's page makes for an image or a link, or None.

    Browsers send no Origin with it. The page cannot read the answer, but the engine would work for it.
    """
    if headers.get("sec-fetch-site") == "cross-site" and "origin" not in headers:
        return ForbiddenError("What the engine does is not shown to other sites' pages that send no Origin.")
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
            raise InvalidValueError(message, param="engine")
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
            raise UnauthorizedError(key_given=True)
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
        if self.context.source.unloads and (info := self.engine.liveness.info) is not None:
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
