"""The application for `serve run server.parts.ray.app:app` and for the `import_path` of a `serve deploy` file.

Its ingress takes HTTP requests from Ray Serve's proxies, and forwards them to the replicas. A proxy routes by the head
of a request alone, so this deployment reads the body, which decides the replica.
"""

import logging
import os
from collections.abc import AsyncGenerator, Mapping
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any, cast

import httpx
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from server.app import ERROR_FORMATS
from server.http.access_control import METRICS, Authentication
from server.http.bodies import BodyReader
from server.http.errors import APIError, BadRequestError, EngineUnavailableError
from server.http.responses import NDJSON, SERVER_SENT_EVENTS
from server.parts.ray.replica import (
    FETCH_SECONDS,
    STOP_SECONDS,
    ForwardedRequest,
    PrefixRouter,
    Replica,
    ResponseHead,
    opening,
)
from server.settings.load import load_settings, named_settings
from server.settings.setting import SettingsError
from server.settings.table import SETTINGS, Settings
from server.tenants import load_api_keys

logger = logging.getLogger("ray.serve")

ATTEMPTS = 3  # for a request whose replica dies before it has answered
REPLICA_HEADER = b"x-lightwell-replica"
PROXY_HEADERS = {b"connection", b"date", b"server", b"transfer-encoding", b"x-request-id"}  # which Ray's proxy sets

CONNECTION_HEADERS = {b"connection", b"content-length", b"transfer-encoding", b"x-forwarded-for"}  # not forwarded

LOST = (RayActorError, httpx.TransportError)  # the replica, or its server
SEPARATORS = {SERVER_SENT_EVENTS.media_type: b"\n\n", NDJSON.media_type: b"\n"}  # of the events in a stream

Answer = DeploymentResponseGenerator[Any]  # a ResponseHead, and the chunks of the body
# What Ray Serve has: the socket, the certificate and the path.
ADDRESS = ("host", "port")  # refused as arguments only, since the image of the server sets them in its environment
OWNED = ("uds", "ssl_certfile", "ssl_keyfile", "root_path", "forwarded_allow_ips")
OTHER_REQUESTS = 64  # besides those that generate: health probes, metrics


class Ingress:
    """The deployment that Ray Serve's proxies call."""

    def __init__(self, replicas: DeploymentHandle[Any], settings: Settings) -> None:
        """Raises SettingsError if the file of keys is invalid."""
        self._replicas = replicas.options(method_name="respond", stream=True)
        self._bodies = BodyReader(settings.max_body_size, settings.max_buffered_bytes)
        self._authentication = Authentication(load_api_keys(settings), public_metrics=settings.public_metrics)

    async def __call__(self, request: Request) -> Response:
        """Return the response to a request. The body of a POST is read if its key is valid, others have none."""
        return AppResponse(self._forward, below_prefix(request.scope))

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, share = b"", None
        try:
            if scope["method"] == "POST":
                self._authentication.find_tenant(scope)
                body, share = await self._bodies.read(scope, receive)
            response = await self._respond(scope, forwarded_request(scope, body))
        except APIError as error:
            response = ERROR_FORMATS.response(error, scope)
        finally:
            if share is not None:
                share.release()
        await response(scope, receive, send)

    async def _respond(self, scope: Scope, request: ForwardedRequest) -> Response:
        """Return a replica's response. A request that has none yet when its replica dies is sent to another one.

        Raises BadRequestError or EngineUnavailableError.
        """
        if request.target == METRICS.encode() and request.replica is None:
            return await self._metrics(request)
        for _ in range(ATTEMPTS):
            answer = cast("Answer", self._replicas.remote(request))
            try:
                head = await anext(answer)
            except httpx.LocalProtocolError:
                raise BadRequestError("The URL or a header of your request is invalid.") from None
            except LOST:
                logger.warning("a replica died; its request is sent to another one")
                continue
            except BaseException:
                answer.cancel()
                raise
            return forwarded_response(scope, head, answer)
        raise EngineUnavailableError("The replicas that had this request died.")

    async def _metrics(self, request: ForwardedRequest) -> Response:
        """Return the metrics of the replicas that answer, or the first error.

        Raises EngineUnavailableError if there are none.
        """
        try:
            answers = self._replicas.broadcast("fetch", request)
            pages = await answers.results_async(return_exceptions=True, timeout_s=2 * FETCH_SECONDS)
        except TimeoutError:
            pages = []
        found = [page for page in pages if not isinstance(page, BaseException)]
        if not found:
            raise EngineUnavailableError("No replica has answered.")
        for head, body in found:
            if head.status != HTTPStatus.OK:
                return Response(body, head.status, media_type="application/json")
        return Response(merged({head.replica: body.decode() for head, body in found}), media_type=CONTENT_TYPE_LATEST)


class AppResponse(Response):
    """The response that an application sends."""

    def __init__(self, app: ASGIApp, scope: Scope) -> None:
        super().__init__()
        self._app = app
        self._scope = scope

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(self._scope, receive, send)


def below_prefix(scope: Scope) -> Scope:
    """Return the scope of a request without the application's route prefix, which servers do not know."""
    prefix: str = scope["root_path"]
    raw_path = scope["raw_path"].removeprefix(prefix.encode()) or b"/"
    return {**scope, "path": scope["path"].removeprefix(prefix) or "/", "raw_path": raw_path, "state": {}}


def forwarded_request(scope: Scope, body: bytes) -> ForwardedRequest:
    """Return a request for a replica."""
    query = b"?" + scope["query_string"] if scope["query_string"] else b""
    headers = [(name, value) for name, value in scope["headers"] if name not in CONNECTION_HEADERS]
    if scope["client"]:
        headers.append((b"x-forwarded-for", scope["client"][0].encode()))  # its tenant, unless it has a key
    replica = dict(headers).get(REPLICA_HEADER, b"").decode("latin-1") or None
    return ForwardedRequest(scope["method"], scope["raw_path"] + query, headers, body, opening(body), replica)


def forwarded_response(scope: Scope, head: ResponseHead, answer: Answer) -> Response:
    """Return a replica's response for the client. It also names the replica."""
    headers = [(name.lower(), value) for name, value in head.headers]
    content_type = dict(headers).get(b"content-type", b"").decode("latin-1")
    response = StreamingResponse(_body(scope, content_type, answer), head.status)
    response.raw_headers = [header for header in headers if header[0] not in PROXY_HEADERS]
    response.raw_headers.append((REPLICA_HEADER, head.replica.encode()))
    return response


async def _body(scope: Scope, content_type: str, answer: Answer) -> AsyncGenerator[bytes, None]:
    """Yield the body, that of a stream by whole events.

    If the replica dies, a stream ends with an error event; another body is cut off.
    """
    separator = SEPARATORS.get(content_type.partition(";")[0])
    begun, num_events = b"", 0
    try:
        async for chunk in answer:
            if separator is None:
                yield chunk
                continue
            events, end, begun = (begun + chunk).rpartition(separator)
            num_events += events.count(separator) + len(end) // len(separator)
            if end:
                yield events + end
        if begun:
            yield begun
    except LOST:
        if separator is None:
            raise
        error = EngineUnavailableError("The replica that generated this answer died.")
        yield ERROR_FORMATS.find(scope).last_events(error, num_events)
    finally:
        answer.cancel()


def merged(pages: Mapping[str, str]) -> bytes:
    """Return one page of metrics from the pages of the replicas. Each sample gets the label `replica`."""
    families: dict[str, Metric] = {}
    for replica, page in pages.items():
        for family in text_string_to_metric_families(page):
            all_of_it = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            all_of_it.samples += [s._replace(labels={**s.labels, "replica": replica}) for s in family.samples]
    registry = cast("CollectorRegistry", SimpleNamespace(collect=families.values))
    return generate_latest(registry)


def app(args: Mapping[str, object]) -> serve.Application:
    """Return the application. `args` are settings by the names of the config file, such as `max-num-seqs`.

    Raises SettingsError.
    """
    settings = replica_settings(args)
    room = settings.data_parallel_size * settings.max_num_seqs + settings.max_queued_requests + OTHER_REQUESTS
    grace = settings.drain_timeout + STOP_SECONDS
    replicas = serve.deployment(
        name="Lightwell",
        max_ongoing_requests=room,  # the server itself refuses requests, with status 429
        graceful_shutdown_timeout_s=grace,
        request_router_config={"request_router_class": PrefixRouter},
    )(Replica)
    ingress = serve.deployment(name="Ingress", max_ongoing_requests=100_000, graceful_shutdown_timeout_s=grace)(Ingress)
    return ingress.bind(replicas.bind(settings), settings)


def replica_settings(args: Mapping[str, object]) -> Settings:
    """Return the settings of each replica, from `args` and the environment. Raises SettingsError."""
    flags = {name: value for name, value, _ in named_settings(args.items(), "args")}
    settings = load_settings(flags, os.environ)
    owned = [name for name in OWNED if getattr(settings, name) != SETTINGS[name].default]
    if refused := [name for name in ADDRESS if name in flags] + owned:
        raise SettingsError(f"{', '.join(refused)}: not here, Ray Serve has this in its http_options and route_prefix")
    if not (settings.needs_key or settings.allow_unauthenticated):
        raise SettingsError(
            "args: other machines may reach Ray Serve: set api-key (or LIGHTWELL_API_KEY), "
            "or allow-unauthenticated: true if everyone may use this server"
        )
    return settings
