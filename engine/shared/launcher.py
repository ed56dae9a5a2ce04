"""Run the `main` of a module as a process: `python -m engine.shared.launcher MODULE`.

Nothing is collected as garbage until `main` calls `collect_garbage`. What is loaded at start stays, and the collector
would go over it again and again: that takes an eighth of the time in which torch is imported.
"""

import gc
import sys
from importlib import import_module


def main() -> None:
    gc.disable()
    del sys.argv[0]  # as if the module had been run itself
    import_module(sys.argv[0]).main()


def collect_garbage() -> None:
    """Turn the garbage collector on, for what is made from now on."""
    gc.freeze()
    gc.enable()


if __name__ == "__main__":
    main()
