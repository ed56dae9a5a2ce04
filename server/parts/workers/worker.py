"""A worker's end: what an API process needs of the coordinator, and what it has in place of its own."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

from engine.shared.messages import Submit
from server.context import RunningRequests
from server.engine_client.admission import AdmissionLimits
from server.engine_client.client import EngineClient
from server.engine_client.connected_engine import EngineConnection, EngineOptions
from server.engine_client.reservation import Reservation
from server.engine_client.streams import EventInbox, RequestStream
from server.http.errors import APIError, EngineDeadError
from server.metrics import Metrics
from server.parts.recordings.part import Recording, Recordings
from server.parts.workers import messages
from server.parts.workers.forwarded_requests import Forwarder
from server.settings.process_configs import EngineProcess
from server.tenants import ANYBODY, Ledger, Tenant

NO_LIMIT = 1 << 30  # choices; the coordinator has one


class Coordinator(EngineConnection):
    """The connection to the coordinator: questions to it, requests that it answers, and what it orders."""

    received = messages.FromCoordinator

    def __init__(self, address: str, running: RunningRequests) -> None:
        super().__init__(address)
        self.address = address
        self.forwarder = Forwarder(self.send, self.next_number)
        self.reservations: WeakValueDictionary[int, HeldReservation] = WeakValueDictionary()
        self.find_stream: Callable[[str], RequestStream | None] = lambda request_id: None
        self._running = running
        self._numbers = itertools.count()
        self._replies: dict[int, asyncio.Future[Any]] = {}

    def open(self, on_message: Callable[[Any], None], on_failure: Callable[[], None]) -> None:
        """Connect, as to an engine, whose messages go to `on_message`."""

        def dispatch(message: Any) -> None:
            if not self._take(message):
                on_message(message)

        super().open(dispatch, on_failure)

    def disconnect(self) -> None:
        super().disconnect()
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(EngineDeadError())
        self.forwarder.fail()

    def next_number(self) -> int:
        """Return a number for a message."""
        return next(self._numbers)

    def send(self, message: Any) -> None:
        super().send(message)

    async def ask(self, message: messages.Question) -> Any:
        """Send a message, and return the reply to it. Raises the APIError that the coordinator replies."""
        if self._socket is None:
            raise EngineDeadError
        reply = self._replies[message.number] = asyncio.get_running_loop().create_future()
        self.send(message)
        try:
            return await reply
        finally:
            del self._replies[message.number]

    def _take(self, message: Any) -> bool:
        """Take a message unless it is an engine's."""
        match message:
            case messages.Reply():
                self._on_reply(message)
            case messages.Refused():
                if reservation := self.reservations.get(message.reservation):
                    reservation.fail(message.error.error())
            case messages.Failed():
                if stream := self.find_stream(message.request_id):
                    stream.fail(message.error.error())
            case messages.Cancel():
                was_running = self._running.cancel(message.request_id, message.owner)
                self.send(messages.Cancelled(message.number, was_running))
            case _ if isinstance(message, messages.OfForwarded):
                self.forwarder.on_message(message)
            case _:
                return False
        return True

    def _on_reply(self, message: messages.Reply) -> None:
        reply = self._replies.get(message.number)
        if reply is None or reply.done():  # nobody waits for it
            return
        if message.error is None:
            reply.set_result(message.value)
        else:
            reply.set_exception(message.error.error())


class HeldReservation(Reservation):
    """The capacity of a request, which the coordinator holds under a number."""

    def __init__(self, number: int, tenant: Tenant, coordinator: Coordinator) -> None:
        super().__init__(tenant, lambda reservation, change: None)  # the coordinator counts
        self.number = number
        self._coordinator = coordinator
        coordinator.reservations[number] = self

    def release(self) -> None:
        super().release()
        self._coordinator.send(messages.Release(self.number))

    async def wait_for_start(self, seconds: float) -> None:
        await super().wait_for_start(seconds)
        self._coordinator.send(messages.Answered(self.number))


class WorkerClient(EngineClient):
    """A client whose only engine is the coordinator, which admits requests."""

    def __init__(self, coordinator: Coordinator, *, step_timeout: float, metrics: Metrics) -> None:
        super().__init__(
            [EngineProcess(coordinator.address)],
            EngineOptions(step_timeout=step_timeout, connect=lambda address: coordinator),
            limits=AdmissionLimits(max_queued_requests=NO_LIMIT),
            metrics=metrics,
        )
        self._coordinator = coordinator
        coordinator.find_stream = self.engines[0].streams.find

    async def admit(
        self, count: int, *, param: str = "n", tenant: Tenant = ANYBODY, queue_timeout: float | None = None
    ) -> Reservation:
        """Reserve capacity in the coordinator; see `Admission.reserve`."""
        reservation = HeldReservation(self._coordinator.next_number(), tenant, self._coordinator)
        try:
            await self._coordinator.ask(messages.Reserve(reservation.number, tenant.name, count, param, queue_timeout))
        except asyncio.CancelledError:
            self._coordinator.send(messages.Release(reservation.number))
            raise
        reservation.add(count)
        return reservation

    async def refill(self, reservation: Reservation, count: int) -> int:
        """Wait until the coordinator has capacity; see `Admission.refill`."""
        assert isinstance(reservation, HeldReservation)
        number = self._coordinator.next_number()
        num_added: int = await self._coordinator.ask(messages.Refill(number, reservation.number, count))
        reservation.check()
        reservation.add(num_added)
        return num_added

    def submit(
        self, message: Submit, reservation: Reservation | None = None, inbox: EventInbox | None = None
    ) -> RequestStream:
        """Send a request to the coordinator, which submits it to an engine as the reservation's tenant."""
        assert isinstance(reservation, HeldReservation)
        self.ready_info()
        reservation.check()
        self._coordinator.send(messages.Use(reservation.number, message.request_id))
        return self.engines[0].streams.open(message, reservation, inbox=inbox)


class RemoteLedger(Ledger):
    """The accounts that the coordinator keeps."""

    def __init__(self, coordinator: Coordinator, *, records_requests: bool) -> None:
        super().__init__()
        self._coordinator = coordinator
        self._records_requests = records_requests

    async def enter(self, tenant: Tenant) -> int:
        message = messages.Admit(self._coordinator.next_number(), tenant.name)
        if not tenant.account.rules:
            self._coordinator.send(message)
            return message.number
        try:
            await self._coordinator.ask(message)
        except BaseException:
            await self.leave(tenant, message.number)
            raise
        return message.number

    async def leave(self, tenant: Tenant, number: int) -> None:
        message = messages.Leave(number)
        if not tenant.account.rules and not self._records_requests:
            self._coordinator.send(message)
        else:  # the client's next request, through another process, must find that this one has ended
            with suppress(EngineDeadError):
                await self._coordinator.ask(message)

    async def headers(self, tenant: Tenant) -> Mapping[str, str]:
        if not tenant.account.rules:
            return {}
        try:
            headers: dict[str, str] = await self._coordinator.ask(
                messages.ReadRates(self._coordinator.next_number(), tenant.name)
            )
        except APIError:  # the answer is complete without them
            return {}
        return headers

    async def take_number(self) -> int:
        number: int = await self._coordinator.ask(messages.TakeNumber(self._coordinator.next_number()))
        return number


class RemoteMetrics(Metrics):
    """Metrics that the coordinator keeps. It observes itself what its engines do."""

    def __init__(self, prefix: str, model_name: str, coordinator: Coordinator) -> None:
        super().__init__(prefix, model_name)
        self._coordinator = coordinator
        for method in ("observe_tokenizer", "observe_detokenizer", "count_retry", "observe_http"):
            setattr(self, method, partial(self._observe, method))

    def count_unknown_parameters(self, num_parameters: int) -> None:
        if num_parameters:
            self._observe("count_unknown_parameters", num_parameters)

    def _observe(self, method: str, *arguments: str | int | float) -> None:
        self._coordinator.send(messages.Observe(method, arguments))


class RemoteRecordings(Recordings):
    """Recordings that the coordinator keeps once their requests have ended."""

    def __init__(self, max_requests: int, coordinator: Coordinator) -> None:
        super().__init__(max_requests)
        self._coordinator = coordinator

    def add(self, recording: Recording) -> None:
        if self.end(recording) and not recording.is_abandoned:
            self._coordinator.send(recording)
