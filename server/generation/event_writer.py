"""Encodes the events of streams: OpenAI's chunks, which have no event names, named events, and lines of JSON."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec
from msgspec import UNSET, UnsetType

from server.generation.choice import ChoiceDelta
from server.http.errors import APIError
from server.http.sse import error_event
from server.schemas.answers import RequestTimings, Usage
from server.schemas.request_fields import StreamOptions

DONE = b"data: [DONE]\n\n"

# Some clients split lines at U+0085, U+2028 and U+2029, which JSON allows unescaped.
LINE_ENDS = tuple((char.encode(), f"\\u{ord(char):04x}".encode()) for char in "\x85\u2028\u2029")


class Chunk(Protocol):
    """The fields that a ChunkWriter sets in OpenAI's chunks."""

    usage: Usage | UnsetType | None
    lightwell: RequestTimings | UnsetType


class ChunkWriter(ABC):
    """Writes a stream of OpenAI's form: chunks, a last chunk with the usage if requested, and [DONE]."""

    repeats_output = False

    def __init__(self, options: StreamOptions | None = None) -> None:
        self._include_usage = options is not None and bool(options.include_usage)
        self._continuous = self._include_usage and options is not None and bool(options.continuous_usage_stats)

    @abstractmethod
    def chunks(self, delta: ChoiceDelta) -> Sequence[Chunk]:
        """Return the chunks for new output of a choice. Called in the order of the output."""

    @abstractmethod
    def usage_chunk(self) -> Chunk:
        """Return a chunk without choices, for the usage and the timings."""

    def events(self, deltas: Sequence[ChoiceDelta], usage: Callable[[], Usage]) -> bytes:
        if not deltas:
            return b""
        chunks = [chunk for delta in deltas for chunk in self.chunks(delta)]
        if self._include_usage:
            _set_usage(chunks, usage() if self._continuous else None)
        return encode_chunks(chunks)

    def end(self, usage: Usage, timings: RequestTimings | UnsetType = UNSET) -> bytes:
        if not self._include_usage and timings is UNSET:
            return DONE
        last = self.usage_chunk()
        last.usage = usage if self._include_usage else UNSET
        last.lightwell = timings
        return encode_chunks([last]) + DONE

    def failure(self, error: APIError) -> bytes:
        return error_event(error)


def _set_usage(chunks: Sequence[Chunk], usage: Usage | None) -> None:
    for chunk in chunks:
        chunk.usage = usage


def encode_chunks(chunks: Sequence[Chunk]) -> bytes:
    """Encode chunks as server-sent events without event names."""
    events = b"".join([b"data: " + msgspec.json.encode(chunk) + b"\n\n" for chunk in chunks])
    return events if events.isascii() else _escape_line_ends(events)


def encode_events(events: Sequence[msgspec.Struct]) -> bytes:
    """Encode named events. The name of an event is the `type` tag of its struct."""
    return _escape_line_ends(
        b"".join(
            [
                b"event: %s\ndata: %s\n\n" % (str(event.__struct_config__.tag).encode(), msgspec.json.encode(event))
                for event in events
            ]
        )
    )


def encode_lines(objects: Sequence[msgspec.Struct]) -> bytes:
    """Encode objects as lines of JSON."""
    return _escape_line_ends(b"".join([msgspec.json.encode(each) + b"\n" for each in objects]))


def _escape_line_ends(events: bytes) -> bytes:
    for char, escape in LINE_ENDS:
        events = events.replace(char, escape)
    return events
