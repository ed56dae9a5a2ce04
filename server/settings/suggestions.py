"""Suggests the name that a user may have meant."""

import difflib
from collections.abc import Iterable

MIN_SIMILARITY = 0.7


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a question about the known name that is most like `name`, or "" if none is."""
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=MIN_SIMILARITY)
    return f" (did you mean {nearest[0]}?)" if nearest else ""
