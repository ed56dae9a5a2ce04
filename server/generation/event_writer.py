"""The server-sent events of a stream: OpenAI's chunks, which bear no name, and the events of other APIs, which do."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import msgspec
from msgspec import UNSET, UnsetType

from server.generation.choice_state import Delta
from server.http.errors import APIError, error_event
from server.schemas.common import Account, StreamOptions, Usage

DONE = b"data: [DONE]\n\n"

# Some clients take these for line ends, which they are not in JSON: U+0085, U+2028, U+2029.
LINE_ENDS = tuple((char.encode(), f"\\u{ord(char):04x}".encode()) for char in "\x85\u2028\u2029")


class Chunk(Protocol):
    usage: Usage | UnsetType | None
    lightwell: Account | UnsetType


class ChunkWriter(ABC):
    """The stream of an endpoint whose events are all of one kind: chunks, at the end one with the usage, and [DONE]."""

    def __init__(self, options: StreamOptions | None = None) -> None:
        self._include_usage = options is not None and bool(options.include_usage)
        self._continuous = self._include_usage and options is not None and bool(options.continuous_usage_stats)

    @abstractmethod
    def chunks(self, delta: Delta) -> Sequence[Chunk]:
        """What a stream says about an addition to a choice. Called in order."""

    @abstractmethod
    def usage_chunk(self) -> Chunk:
        """A chunk without choices."""

    def events(self, deltas: Sequence[Delta], usage: Usage) -> bytes:
        chunks = [chunk for delta in deltas for chunk in self.chunks(delta)]
        if self._include_usage:
            _set_usage(chunks, usage if self._continuous else None)
        return frame_chunks(chunks)

    def end(self, usage: Usage, account: Account | UnsetType = UNSET) -> bytes:
        if not self._include_usage and account is UNSET:
            return DONE
        last = self.usage_chunk()
        last.usage = usage if self._include_usage else UNSET
        last.lightwell = account
        return frame_chunks([last]) + DONE

    def failure(self, error: APIError) -> bytes:
        return error_event(error)


def _set_usage(chunks: Sequence[Chunk], usage: Usage | None) -> None:
    for chunk in chunks:
        chunk.usage = usage


def frame_chunks(chunks: Sequence[Chunk]) -> bytes:
    return _escape_line_ends(b"".join([b"data: " + msgspec.json.encode(chunk) + b"\n\n" for chunk in chunks]))


def frame_events(events: Sequence[msgspec.Struct]) -> bytes:
    """Structs whose tag `type` is also the name of the event."""
    return _escape_line_ends(
        b"".join(
            [
                b"event: %s\ndata: %s\n\n" % (str(event.__struct_config__.tag).encode(), msgspec.json.encode(event))
                for event in events
            ]
        )
    )


def _escape_line_ends(events: bytes) -> bytes:
    for char, escape in LINE_ENDS:
        events = events.replace(char, escape)
    return events
