"""The messages between the coordinator and a worker, besides those between an engine and an API process.

Numbers are chosen by the worker, and are unique for its lifetime, unless said otherwise.
"""

from typing import Any, TypeAlias

import msgspec

from engine.shared.messages import Abort, Adapters, Hello, LoadFailed, Outputs, Ready, Submit
from server.http.errors import APIError
from server.parts.recordings.part import Recording


class ErrorFields(msgspec.Struct, frozen=True):
    """An `APIError`."""

    status: int
    message: str
    type: str
    code: str | None
    param: str | None
    headers: dict[str, str]

    @classmethod
    def of(cls, error: APIError) -> "ErrorFields":
        return cls(error.status, error.message, error.type, error.code, error.param, error.headers)

    def error(self) -> APIError:
        return APIError(**msgspec.structs.asdict(self))


# From a worker. A `Reply` with the same number follows where it is said. `Recording`s are of requests that have ended.


class Reserve(msgspec.Struct, frozen=True, tag=True):
    """Reserve capacity for a request, under its number from now on; see `EngineClient.reserve`. A `Reply` follows."""

    number: int
    tenant: str
    count: int
    param: str
    queue_timeout: float | None


class Refill(msgspec.Struct, frozen=True, tag=True):
    """Add capacity to a reservation; see `EngineClient.refill`. A `Reply` with the number of choices follows."""

    number: int
    reservation: int
    count: int


class Use(msgspec.Struct, frozen=True, tag=True):
    """The `Submit` of this id, which comes next, uses the capacity of a reservation."""

    reservation: int
    request_id: str


class Answered(msgspec.Struct, frozen=True, tag=True):
    """The client of a reservation has its HTTP status."""

    reservation: int


class Release(msgspec.Struct, frozen=True, tag=True):
    """Return the capacity of a reservation that no `Submit` uses. Nothing refers to the reservation any more."""

    reservation: int


class Admit(msgspec.Struct, frozen=True, tag=True):
    """Count a request of a tenant. A `Reply` follows."""

    number: int  # of the request from now on
    tenant: str


class Leave(msgspec.Struct, frozen=True, tag=True):
    """A request that has been admitted has ended, or nobody waits to be admitted. A `Reply` follows."""

    number: int


class ReadRates(msgspec.Struct, frozen=True, tag=True):
    """A `Reply` with the headers about a tenant's rates follows."""

    number: int
    tenant: str


class TakeNumber(msgspec.Struct, frozen=True, tag=True):
    """A `Reply` with the number of earlier requests without a seed follows."""

    number: int


class Observe(msgspec.Struct, frozen=True, tag=True):
    """Call a method of `Metrics`."""

    method: str
    arguments: tuple[str | int | float, ...]


class Cancelled(msgspec.Struct, frozen=True, tag=True):
    """Answer to `Cancel`."""

    number: int
    was_running: bool


class Forward(msgspec.Struct, frozen=True, tag=True):
    """An HTTP request that the coordinator is to answer, with the fields of its ASGI scope that matter."""

    number: int
    scope: dict[str, Any]


class RequestPart(msgspec.Struct, frozen=True, tag=True):
    """The next ASGI message of a forwarded request: a part of its body, or the client's disconnect.

    The coordinator asks for each with `NextPart`.
    """

    number: int
    message: dict[str, Any]


class PartSent(msgspec.Struct, frozen=True, tag=True):
    """The client has taken the last `ResponsePart` of a forwarded request."""

    number: int


class Forget(msgspec.Struct, frozen=True, tag=True):
    """Nobody waits for the response to a forwarded request any more."""

    number: int


# From the coordinator.


class Reply(msgspec.Struct, frozen=True, tag=True):
    """The answer to a message with this number."""

    number: int
    value: Any = None
    error: ErrorFields | None = None


class Refused(msgspec.Struct, frozen=True, tag=True):
    """A reservation has ended with an error, and its streams too."""

    reservation: int
    error: ErrorFields


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The stream of a `Submit` has ended with an error."""

    request_id: str
    error: ErrorFields


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """End the requests of an owner with an id that clients use. `Cancelled` follows."""

    number: int  # chosen by the coordinator
    request_id: str
    owner: str


class NextPart(msgspec.Struct, frozen=True, tag=True):
    """The application wants the next `RequestPart` of a forwarded request."""

    number: int


class ResponsePart(msgspec.Struct, frozen=True, tag=True):
    """The next ASGI message of the response to a forwarded request. `PartSent` follows."""

    number: int
    message: dict[str, Any]


class ResponseEnd(msgspec.Struct, frozen=True, tag=True):
    """The application has answered a forwarded request, or has failed to."""

    number: int
    has_failed: bool = False


AnsweredAtOnce: TypeAlias = Reserve | Admit | Leave | ReadRates
Question: TypeAlias = AnsweredAtOnce | Refill | TakeNumber  # that a `Reply` answers
Notice: TypeAlias = Use | Answered | Release | Observe | Recording | Cancelled
OfWorkersRequests: TypeAlias = Forward | RequestPart | PartSent | Forget
FromWorker: TypeAlias = Hello | Submit | Abort | Question | Notice | OfWorkersRequests
OfForwarded: TypeAlias = NextPart | ResponsePart | ResponseEnd
FromCoordinator: TypeAlias = Ready | LoadFailed | Outputs | Adapters | Reply | Refused | Failed | Cancel | OfForwarded
