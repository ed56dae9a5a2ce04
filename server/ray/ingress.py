"""The ingress: takes HTTP requests from Ray Serve's proxies, and forwards them to the replicas.

A proxy routes by the head of a request alone, so this deployment reads the body, which decides the replica.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator
from http import HTTPStatus
from typing import Any, cast

import httpx
from prometheus_client import CONTENT_TYPE_LATEST
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Scope

from server.http.body_middleware import BODY_TIMEOUT
from server.http.errors import (
    APIError,
    BodyTimeoutError,
    BodyTooLargeError,
    EngineUnavailableError,
    is_for_anthropic,
    is_for_ollama,
)
from server.http.sse import NDJSON, SERVER_SENT_EVENTS, error_event
from server.ray.messages import ForwardedRequest, ResponseHead
from server.ray.metrics import merged
from server.ray.placement import opening

logger = logging.getLogger("ray.serve")

ATTEMPTS = 3  # for a request whose replica dies before it has answered
REPLICA_HEADER = b"x-lightwell-replica"
PROXY_HEADERS = {b"connection", b"date", b"server", b"transfer-encoding", b"x-request-id"}  # which Ray's proxy sets

CONNECTION_HEADERS = {b"connection", b"transfer-encoding", b"x-forwarded-for"}  # not forwarded

LOST = (RayActorError, httpx.TransportError)  # the replica, or its server

Answer = DeploymentResponseGenerator[Any]  # a ResponseHead, and the chunks of the body


class Ingress:
    """The deployment that Ray Serve's proxies call."""

    def __init__(self, replicas: DeploymentHandle[Any], max_body_size: int) -> None:
        self._replicas = replicas.options(method_name="respond", stream=True)
        self._max_body_size = max_body_size

    async def __call__(self, request: Request) -> Response:
        """Forward a request. One that has no answer yet when its replica dies is sent to another one."""
        scope = below_prefix(request.scope)
        try:
            forwarded = forwarded_request(scope, await self._read_body(request))
            if forwarded.target == b"/metrics" and forwarded.replica is None:
                return await self._metrics(forwarded)
            for _ in range(ATTEMPTS):
                answer = cast("Answer", self._replicas.remote(forwarded))
                try:
                    head = await anext(answer)
                except LOST:
                    logger.warning("a replica died; its request is sent to another one")
                    continue
                except BaseException:
                    answer.cancel()
                    raise
                return forwarded_response(scope, head, answer)
            raise EngineUnavailableError("The replicas that had this request died.")
        except APIError as error:
            return error.response(scope)

    async def _metrics(self, request: ForwardedRequest) -> Response:
        """Return the metrics of all replicas, or the first error."""
        pages = await self._replicas.broadcast("fetch", request).results_async(return_exceptions=True)
        found = [page for page in pages if not isinstance(page, BaseException)]
        for head, body in found:
            if head.status != HTTPStatus.OK:
                return Response(body, head.status, media_type="application/json")
        return Response(merged({head.replica: body.decode() for head, body in found}), media_type=CONTENT_TYPE_LATEST)

    async def _read_body(self, request: Request) -> bytes:
        """Return the body. Raises BodyTooLargeError or BodyTimeoutError."""
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_TIMEOUT):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > self._max_body_size:
                        raise BodyTooLargeError(self._max_body_size)
        except TimeoutError:
            raise BodyTimeoutError(BODY_TIMEOUT) from None
        return bytes(body)


def below_prefix(scope: Scope) -> Scope:
    """Return the scope of a request without the application's route prefix, which servers do not know."""
    prefix: str = scope["root_path"]
    raw_path = scope["raw_path"].removeprefix(prefix.encode()) or b"/"
    return {**scope, "path": scope["path"].removeprefix(prefix) or "/", "raw_path": raw_path}


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
    """Yield the body. If the replica dies, a stream ends with an error event; another body is cut off."""
    try:
        async for chunk in answer:
            yield chunk
    except LOST:
        if not content_type.startswith((SERVER_SENT_EVENTS.media_type, NDJSON.media_type)):
            raise
        yield last_events(scope, EngineUnavailableError("The replica that generated this answer died."))
    finally:
        answer.cancel()


def last_events(scope: Scope, error: APIError) -> bytes:
    """Return the end of a stream that failed, in the format of the API that the request uses."""
    if is_for_anthropic(scope):
        return b"event: error\ndata: " + error.anthropic_body() + b"\n\n"
    if is_for_ollama(scope):
        return error.ollama_body() + b"\n"
    return error_event(error)
