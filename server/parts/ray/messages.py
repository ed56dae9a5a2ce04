"""What the ingress and the replicas exchange. Ray pickles it."""

import dataclasses

Headers = list[tuple[bytes, bytes]]


@dataclasses.dataclass(frozen=True, slots=True)
class ForwardedRequest:
    """An HTTP request, and what decides which replica gets it."""

    method: str
    target: bytes  # path and query
    headers: Headers
    body: bytes
    opening: bytes | None  # see `server.parts.ray.placement.opening`
    replica: str | None  # the one that the client asks for


@dataclasses.dataclass(frozen=True, slots=True)
class ResponseHead:
    """The beginning of a response. The chunks of its body follow as bytes."""

    status: int
    headers: Headers
    replica: str  # its id
