"""Sizes, paths and errors of the system as people read them."""

import os


def format_bytes(num_bytes: int) -> str:
    """Return a size with its unit, as download pages give it: 98 MB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}" if num_bytes < 10 * size else f"{num_bytes / size:.0f} {unit}"
    return f"{num_bytes / 1000:.0f} kB"


def home_relative(path: str) -> str:
    """Return the path with ~ for the home folder."""
    home = os.path.expanduser("~")
    return f"~{path[len(home) :]}" if path.startswith(f"{home}/") else path


def format_os_error(error: OSError) -> str:
    """Return why the system refused, after the path that it is about if there is one."""
    reason = error.strerror or str(error) or type(error).__name__
    return reason if error.filename is None else f"{os.fsdecode(error.filename)}: {reason}"
