"""Run the `main` of a module as a process: `python -m engine.shared.launcher MODULE`.

Nothing is collected as garbage until `main` calls `collect_garbage`. What is loaded at start stays, and the collector
would go over it again and again: that takes an eighth of the time in which torch is imported.
"""

import gc
import sys
from importlib import import_module
from types import ModuleType

NO_MEMORY = ("failed to map segment", "Cannot allocate memory")  # errors of the dynamic linker


def main() -> None:
    gc.disable()
    del sys.argv[0]  # as if the module had been run itself
    load(sys.argv[0]).main()


def load(name: str) -> ModuleType:
    """Import a module. If there is too little memory for it, exit with one line that says so."""
    try:
        return import_module(name)
    except (ImportError, MemoryError) as error:
        if isinstance(error, ImportError) and not any(text in str(error) for text in NO_MEMORY):
            raise
        raise SystemExit(f"lightwell: error: there is not enough memory to load {name}: {error}") from None


def collect_garbage() -> None:
    """Turn the garbage collector on, for what is made from now on."""
    gc.freeze()
    gc.enable()


if __name__ == "__main__":
    main()
