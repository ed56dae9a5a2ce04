"""Pieces of answers in the formats of other APIs."""

from collections.abc import Sequence
from typing import Any

import msgspec

from server.generation.choice import ToolCallDelta
from server.generation.endpoint import escape_line_ends
from server.http.errors import APIError, valid_utf8
from server.http.strict_json import MAX_DEPTH, is_deeper


def named_message(error: APIError) -> str:
    """Return the message with the name of the field, for envelopes that have no `param`."""
    is_named = error.param is None or error.param in error.message
    return valid_utf8(error.message if is_named else f"{error.param}: {error.message}")


def arguments_of(call: ToolCallDelta) -> dict[str, Any]:
    """Return the arguments of a whole call as an object.

    Other text, as of a call that was cut off, is wrapped in one, and so is what is nested too deep for a request.
    """
    try:
        value = msgspec.json.decode(call.arguments)
    except (msgspec.DecodeError, RecursionError):
        value = None
    is_usable = isinstance(value, dict) and not is_deeper(value, MAX_DEPTH)
    return value if is_usable else {"arguments": call.arguments}


def encode_events(events: Sequence[msgspec.Struct]) -> bytes:
    """Encode named events. The name of an event is the `type` tag of its struct."""
    return escape_line_ends(
        b"".join(
            [
                b"event: %s\ndata: %s\n\n" % (str(event.__struct_config__.tag).encode(), msgspec.json.encode(event))
                for event in events
            ]
        )
    )


def encode_lines(objects: Sequence[msgspec.Struct]) -> bytes:
    """Encode objects as lines of JSON."""
    return escape_line_ends(b"".join([msgspec.json.encode(each) + b"\n" for each in objects]))
