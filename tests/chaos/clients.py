"""Clients that keep to the rules: what they ask for must come, exactly once, and always with the same bits."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import httpx

from tests.chaos.bodies import KNOWN, STREAMED, bad_requests, random_request, stable
from tests.chaos.report import Report
from tests.support.clients import merge
from tests.support.server_process import COMPLETIONS, MODEL, ServerProcess
from tests.support.serving import check_envelope, check_error

ANSWER_SECONDS = 300.0  # bounds hangs only
NO_REUSE = httpx.Limits(max_connections=None, max_keepalive_connections=0)


class RefusedError(Exception):
    """A request was not answered, for a reason that it may have. The argument names it."""


class Clients:
    """Sends requests of all kinds, and reports those that do not end as they must."""

    def __init__(self, server: ServerProcess, report: Report, keys: list[str]) -> None:
        """`keys` are API keys that stay valid."""
        self._server = server
        self._report = report
        self._keys = keys
        self._http = httpx.AsyncClient(
            base_url=server.url, timeout=ANSWER_SECONDS, trust_env=False, limits=NO_REUSE, headers=_of(keys[0])
        )
        self._known: dict[str, Any] = {}
        self._bad = bad_requests()

    async def learn(self) -> None:
        """Ask for all known answers, while the server has nothing else to do."""
        for name, (path, body) in KNOWN.items():
            answer = await self._http.post(path, json={"model": MODEL} | body)
            assert answer.status_code == 200, f"{name}: {answer.text}\n{self._server.end_of_log()}"
            self._known[name] = answer.json()

    async def check_known(self) -> None:
        """Ask for all known answers again. None may be refused."""
        for name in KNOWN:
            await self._whole(name, self._keys[0])

    async def run(self, rng: random.Random, until: float) -> None:
        """Send one request after the other until the time `until`."""
        kinds = (
            *(self._known_whole, self._known_whole, self._known_whole, self._known_stream, self._known_stream),
            *(self._random, self._random, self._bad_request),
            *(self._cancelled, self._impatient, self._responses_stream, self._background),
        )
        while time.monotonic() < until:
            kind = rng.choice(kinds)
            await self.send(kind.__name__.strip("_"), kind(rng, rng.choice(self._keys)))

    async def send(self, kind: str, request: Awaitable[str]) -> None:
        """Await a request that returns how it ended. Report it."""
        started = time.monotonic()
        try:
            end = await request
        except RefusedError as refused:
            end = str(refused)
            if end == "failed by a death" and not self._report.deaths.excuse(started):
                self._report.add_problem(f"{kind}: the engine is said to be dead, but is not")
        except Exception as error:
            self._report.add_problem(f"{kind}, after {time.monotonic() - started:.1f} s: {error!r}")
            end = "problem"
        self._report.count(kind, end)

    async def close(self) -> None:
        await self._http.aclose()

    # Requests with a known answer.

    async def _known_whole(self, rng: random.Random, key: str) -> str:
        return await self._whole(rng.choice(list(KNOWN)), key)

    async def _whole(self, name: str, key: str) -> str:
        path, body = KNOWN[name]
        answer = await self._ask(path, body, key)
        self._check(name, stable(answer), stable(self._known[name]))
        return "answered"

    async def _known_stream(self, rng: random.Random, key: str) -> str:
        name = rng.choice(STREAMED)
        path, body = KNOWN[name]
        self._check(name, merge(await self._stream(path, body, key)), merge([self._known[name]]))
        return "answered"

    async def _responses_stream(self, rng: random.Random, key: str) -> str:
        path, body = KNOWN["responses"]
        answer = await self._http.post(path, json={"model": MODEL, "stream": True} | body, headers=_of(key))
        if answer.status_code != 200:
            raise _refusal(answer.status_code, _code(answer.content, path))
        events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        return self._end_of_response(events[-1]["response"])

    async def _background(self, rng: random.Random, key: str) -> str:
        """Ask for a response in the background, and come back for it."""
        path, body = KNOWN["responses"]
        response = await self._ask(path, body | {"background": True, "store": True}, key)
        while response["status"] in ("queued", "in_progress"):
            await asyncio.sleep(0.2)
            answer = await self._http.get(f"{path}/{response['id']}", headers=_of(key))
            assert answer.status_code == 200, answer.text
            response = answer.json()
        return self._end_of_response(response)

    def _end_of_response(self, response: dict[str, Any]) -> str:
        if response.get("status") == "failed":
            error = response["error"]
            if error["code"] == "rate_limit_exceeded":  # it had to make room for another client's while it waited
                raise RefusedError("429")
            assert "engine" in error["message"].lower(), error
            raise RefusedError("failed by a death")
        self._check("responses", stable(response["output"]), stable(self._known["responses"]["output"]))
        return "answered"

    def _check(self, name: str, answer: object, expected: object) -> None:
        assert answer == expected, f"{name}: {answer!r} instead of {expected!r}"

    # Other requests.

    async def _random(self, rng: random.Random, key: str) -> str:
        path, body, num_choices = random_request(rng)
        answers = await self._stream(path, body, key) if rng.random() < 0.5 else [await self._ask(path, body, key)]
        choices = merge(answers)
        assert len(choices) == num_choices
        assert all(choice.finish_reason in ("stop", "length") for choice in choices.values())
        return "answered"

    async def _bad_request(self, rng: random.Random, key: str) -> str:
        status, request = rng.choice(self._bad)
        answer = await self._http.request(**request | {"headers": _of(key) | request.get("headers", {})})
        error = check_error(answer, answer.status_code)
        if answer.status_code != status:
            raise _refusal(answer.status_code, error["code"])
        return "rejected"

    async def _cancelled(self, rng: random.Random, key: str) -> str:
        """Cancel a stream from another connection."""
        body = {"prompt": "A", "max_tokens": 500, "ignore_eos": True}
        reasons = []
        async for chunk in self._chunks(COMPLETIONS, body, key):
            reasons += [choice["finish_reason"] for choice in chunk["choices"] if choice["finish_reason"]]
            if rng.random() < 0.2:
                answer = await self._http.post(f"/v1/requests/{chunk['id']}/cancel", headers=_of(key))
                assert answer.status_code in (200, 404), answer.text
        assert reasons in (["abort"], ["length"]), reasons
        return "answered"

    async def _impatient(self, rng: random.Random, key: str) -> str:
        """Leave after a moment, whatever happens."""
        path, body, _ = random_request(rng)
        request = self._stream(path, body, key) if rng.random() < 0.5 else self._ask(path, body, key)
        try:
            await asyncio.wait_for(request, rng.random() * 2)
        except TimeoutError:
            return "left"
        return "answered"

    # How requests are sent.

    async def _ask(self, path: str, body: dict[str, Any], key: str) -> Any:
        """Return the answer. Raises RefusedError."""
        answer = await self._http.post(path, json={"model": MODEL} | body, headers=_of(key))
        if answer.status_code != 200:
            raise _refusal(answer.status_code, _code(answer.content, path))
        return answer.json()

    async def _stream(self, path: str, body: dict[str, Any], key: str) -> list[dict[str, Any]]:
        """Return the chunks of a stream. Raises RefusedError."""
        return [chunk async for chunk in self._chunks(path, body, key)]

    async def _chunks(self, path: str, body: dict[str, Any], key: str) -> AsyncIterator[dict[str, Any]]:
        """Yield the chunks of a stream, which must end with one [DONE]. Raises RefusedError."""
        started, events = time.monotonic(), list[str]()
        body = {"model": MODEL, "stream": True} | body
        async with self._http.stream("POST", path, json=body, headers=_of(key)) as answer:
            if answer.status_code != 200:
                raise _refusal(answer.status_code, _code(await answer.aread(), path))
            async for line in answer.aiter_lines():
                if not line.startswith("data: "):
                    assert not line or line.startswith(":"), line
                    continue
                events.append(line.removeprefix("data: "))
                if len(events) == 1:
                    self._report.round.first_tokens.append(time.monotonic() - started)
                if not events[-1].startswith(("[", '{"error"')):
                    yield json.loads(events[-1])
        assert events, "an empty stream"
        assert [event for event in events if event == "[DONE]"] == events[-1:], events[-3:]
        errors = [event for event in events if event.startswith('{"error"')]
        assert errors in ([], events[-2:-1]), errors
        if errors:
            raise _refusal(503, check_envelope(errors[0].encode())["code"])


def _of(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def _code(body: bytes, path: str) -> str | None:
    """Return the code of an error, which has another form in Anthropic's API."""
    if path == "/v1/messages":
        error = json.loads(body)["error"]
        return {"rate_limit_error": "rate_limit_exceeded", "overloaded_error": "engine_unavailable"}.get(error["type"])
    code: str | None = check_envelope(body)["code"]
    return code


def _refusal(status: int, code: str | None) -> RefusedError:
    """Return how a request was refused. Raises AssertionError if it may not be."""
    if status == 429:
        return RefusedError("429")
    assert (status, code) == (503, "engine_unavailable"), (status, code)
    return RefusedError("failed by a death")
