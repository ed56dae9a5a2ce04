"""Folders that both processes use."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder of fetched models and compiled kernels.

    It is $LIGHTWELL_CACHE, or else the folder `lightwell` in the user's cache ($XDG_CACHE_HOME or ~/.cache).
    """
    if chosen := os.environ.get("LIGHTWELL_CACHE"):
        return Path(os.path.expanduser(chosen))
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "lightwell"
