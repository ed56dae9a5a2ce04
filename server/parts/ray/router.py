"""Which replica gets a request: rendezvous hashing of how its prompt begins, with a bound on the load of a replica.

All turns of a conversation begin alike, so they meet the same replica, which has their prefix in its cache. It is
computed from the request alone: ingresses agree without talking to each other, and if a replica comes or goes, only
its own share of the conversations moves. A replica that is busier than the others is passed over.
"""

import dataclasses
import math
from collections.abc import Mapping
from hashlib import blake2b

import msgspec
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

Headers = list[tuple[bytes, bytes]]

OPENING_BYTES = 2048  # of the first message of the user; prompts that share more, such as a document, stay together
LOAD_FACTOR = 1.25  # times the mean number of requests that a replica may have before it is passed over ...
FREE_LOAD = 8  # ... unless it has no more than these, which run in one batch


@dataclasses.dataclass(frozen=True, slots=True)
class ForwardedRequest:
    """An HTTP request, and what decides which replica gets it."""

    method: str
    target: bytes  # path and query
    headers: Headers
    body: bytes
    opening: bytes | None  # see `server.parts.ray.router.opening`
    replica: str | None  # the one that the client asks for


@dataclasses.dataclass(frozen=True, slots=True)
class ResponseHead:
    """The beginning of a response. The chunks of its body follow as bytes."""

    status: int
    headers: Headers
    replica: str  # its id


class Message(msgspec.Struct):
    role: str = ""
    content: msgspec.Raw = msgspec.Raw()


class Prompt(msgspec.Struct):
    """The fields of a body that begin its prompt, in all APIs, as they stand in its JSON."""

    model: msgspec.Raw = msgspec.Raw()
    tools: msgspec.Raw = msgspec.Raw()
    system: msgspec.Raw = msgspec.Raw()  # Anthropic's and Ollama's
    instructions: msgspec.Raw = msgspec.Raw()  # of a response
    messages: list[Message] = []
    input: msgspec.Raw = msgspec.Raw()  # of a response (text or messages) or an embedding
    prompt: msgspec.Raw = msgspec.Raw()  # of a completion


_DECODER = msgspec.json.Decoder(Prompt)
_MESSAGES_DECODER = msgspec.json.Decoder(list[Message])


def opening(body: bytes) -> bytes | None:
    """Return how the prompt of a request begins, up to the first `OPENING_BYTES` of what the user says.

    None if it has no prompt, or if the body is invalid, which the replica reports.
    """
    try:
        prompt = _DECODER.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    parts = [bytes(prompt.tools), bytes(prompt.system), bytes(prompt.instructions)]
    text = bytes(prompt.prompt) or bytes(prompt.input)
    for message in prompt.messages or _messages(prompt.input):
        if message.role == "user":
            text = bytes(message.content)
            break
        parts.append(bytes(message.content))
    parts.append(text[:OPENING_BYTES])
    return b"\0".join([bytes(prompt.model), *parts]) if any(parts) else None


def _messages(value: msgspec.Raw) -> list[Message]:
    """Return the messages, or none if the value is something else."""
    try:
        return _MESSAGES_DECODER.decode(value)
    except msgspec.DecodeError:
        return []


def ranked(opening: bytes | None, loads: Mapping[str, int]) -> list[str]:
    """Return the replicas in the order in which they are to be tried. `loads` are their numbers of requests.

    Without an opening, the least busy one comes first.
    """
    if opening is None:
        return sorted(loads, key=lambda replica: loads[replica])
    bound = max(FREE_LOAD, math.ceil(LOAD_FACTOR * (sum(loads.values()) + 1) / len(loads)))
    key = blake2b(opening).digest()
    replicas = sorted(loads, key=lambda replica: blake2b(replica.encode(), key=key).digest())
    return sorted(replicas, key=lambda replica: max(0, loads[replica] + 1 - bound))


class PrefixRouter(RequestRouter):
    """Routes a `ForwardedRequest` to the replica that it names, or by its opening and the load of the replicas."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the replicas one by one, the preferred first. Serve takes the first that accepts the request."""
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # if none of them accepts it
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        cache = self.replica_queue_len_cache
        loads = {name: cache.get(replica.replica_id) or 0 for name, replica in replicas.items()}
        request: ForwardedRequest = pending_request.args[0]
        if request.replica in replicas:
            return [[replicas[request.replica]]]
        return [[replicas[name]] for name in ranked(request.opening, loads)]
