"""What a part of the server adds to the core."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from engine.shared.parts import has_part
from server.api_server import APIServer
from server.context import ServerContext
from server.dialect import Dialect
from server.part_table import FOLDER, PARTS, is_installed, load_module


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a part adds to the core: the object `PART` of its module `part`, if it is not loaded by names alone."""

    dialects: Sequence[Dialect] = ()
    server: type[APIServer] | None = None  # in place of the core's
    attach: Callable[[ServerContext], None] = lambda context: None  # called once, before the application is made


def server_type() -> type[APIServer]:
    """Return the class of the HTTP server: that of a part, or the core's."""
    return next((part.server for part in load_parts() if part.server is not None), APIServer)


@cache
def load_parts() -> Sequence[Part]:
    """Return the parts that are there, in the order of the table."""
    return [
        load_module(name, "part").PART for name in PARTS if is_installed(name) and has_part(f"{FOLDER}.{name}", "part")
    ]
