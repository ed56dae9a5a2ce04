"""Compile the C++ kernels into a shared library for each code path, when it is first needed or by a command.

`python -m engine.parts.build_kernels.build` compiles ahead of time; `lightwell build-kernels` runs it. Libraries go
into the cache folder, or into a temporary folder if that cannot be written, and with --in-package into `prebuilt/`
beside the sources: for wheels, and images without a compiler. A library ends with the hash of its contents.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib.util
import logging
import os
import platform
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from engine.kernels.cpu.library import (
    CODE_PATHS,
    LINK_FLAGS,
    PACKAGE,
    best_code_path,
    compiler_flags,
    find_library,
    kernels_folder,
    library_name,
)
from engine.shared.files import is_sealed, replace_durably, seal
from engine.shared.launcher import handling, leave

logger = logging.getLogger(__name__)

ZIG = "ziglang"
MAX_PROCESSES = 4

Command = list[str]

MACHINE = "x86_64"
COMPILERS = ["g++", "c++", "clang++"]
# clang++ in a Python package, which needs no root. With a target, it compiles for any processor and libc from 2018 on.
ZIG_ARGUMENTS = ["-P", "-m", ZIG, "c++", "-target", "x86_64-linux-gnu.2.28"]
ZIG_LINK_FLAGS = ["-s", "-nostdlib++"]  # ziglang has the C++ runtime as sources, and the library does not need it
# The sources from the one that takes longest, which comes first, so that all cores are busy to the end.
SOURCES = ("linear", "linear_k", "linear_blocks", "attention", "rows", "library")
SANITIZER_FLAGS = [  # -g1 is line numbers; with all of -g it takes three times as long
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    *("-fno-omit-frame-pointer", "-O1", "-g1"),
]


class BuildError(ValueError):
    """No library can be compiled. The message is one line for the user."""


def build(code_path: str, *, sanitize: bool = False, in_package: bool = False, package: Path = PACKAGE) -> Path:
    """Return the path of the shared library for a code path, after compiling it if there is none.

    With `sanitize`, the library aborts the process on accesses out of bounds and on undefined behavior. With
    `in_package`, it is compiled into `prebuilt/`. The sources are those in `package`/src. Raises BuildError.
    """
    if platform.machine() != MACHINE:
        raise BuildError(f"the CPU kernels are for {MACHINE}, and this machine is {platform.machine()}")
    extra_flags = SANITIZER_FLAGS if sanitize else []
    prebuilt = package / "prebuilt"
    found = find_library(code_path, extra_flags, package)
    if found is not None and (found.parent == prebuilt or not in_package):
        return found
    command = [*find_compiler(), *compiler_flags(code_path, extra_flags)]
    library = (prebuilt if in_package else _writable_folder()) / library_name(code_path, extra_flags, package)
    try:
        _compile(package / "src", library, command, code_path)
    except OSError as error:
        problem = error.strerror or error
        raise BuildError(f"cannot store the compiled kernels in {library.parent}: {problem}") from None
    return library


# Folders.


def _writable_folder() -> Path:
    folder = kernels_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # some file systems deny writing despite the permissions
            return folder
    except OSError as error:
        own = _own_temporary_folder()
        logger.warning("%s cannot be written (%s): storing the compiled kernels in %s", folder, error.strerror, own)
        return own


def _own_temporary_folder() -> Path:
    """Return a temporary folder that only this user can access.

    Others can guess its name, so a folder of another user, or one open to others, is refused.
    """
    folder = Path(tempfile.gettempdir()) / f"lightwell-kernels-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise BuildError(f"no folder for the compiled kernels: {folder}: {error.strerror}") from None
    is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
    if not is_own:
        raise BuildError(f"no folder for the compiled kernels: {folder} is open to other users")
    return folder


# The compiler.


def find_compiler() -> Command:
    """Return the compiler's full path, followed by its leading arguments from CXX.

    Raises:
        BuildError: there is no compiler.
    """
    if chosen := os.environ.get("CXX", "").split():
        if path := shutil.which(chosen[0]):
            return [os.path.abspath(path), *chosen[1:]]
        raise BuildError(f"the C++ compiler named by CXX does not exist: {chosen[0]}")
    for name in COMPILERS:
        if path := shutil.which(name):
            return [os.path.abspath(path)]
    if importlib.util.find_spec(ZIG):
        return [sys.executable, *ZIG_ARGUMENTS]
    raise BuildError(
        f"no C++ compiler found: {', '.join(COMPILERS)} (set CXX to use another, or run: pip install {ZIG})"
    )


def _compile(sources: Path, library: Path, compiler: Command, code_path: str) -> None:
    """Compile the library. `compiler` includes the flags.

    Raises:
        BuildError: the compiler fails.
        OSError: the library cannot be stored.
    """
    library.parent.mkdir(parents=True, exist_ok=True)
    with _lock(library.parent) as is_alone:
        if is_sealed(library):  # compiled by another process while this one waited
            return
        for leftover in library.parent.glob(".build-*") if is_alone else ():  # of processes that were killed
            shutil.rmtree(leftover, ignore_errors=True)
        began = time.monotonic()
        with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-", ignore_cleanup_errors=True) as temporary:
            folder = Path(temporary)
            names = sorted((path.stem for path in sources.glob("*.cpp")), key=_order)
            objects = [str(folder / f"{name}.o") for name in names]
            logger.info(
                "compiling the CPU kernels for processors with %s (once; %d files, %d at a time) with %s",
                *(code_path, len(objects), num_processes(), name_of(compiler)),
            )
            run_all([[*compiler, "-c", f"{Path(path).stem}.cpp", "-o", path] for path in objects], sources, folder)
            linked, is_zig = folder / library.name, ZIG in compiler
            link_flags = [*LINK_FLAGS, *(ZIG_LINK_FLAGS if is_zig else [])]
            run_all([[*compiler, *link_flags, *objects, "-o", str(linked)]], sources, folder)
            seal(linked)
            replace_durably(linked, library)
        logger.info("compiled in %.1f s", time.monotonic() - began)


def _order(name: str) -> int:
    return SOURCES.index(name) if name in SOURCES else len(SOURCES)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Lock a folder, and yield True. If the file system has no locks, yield False: the last process to finish wins."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            is_alone = True
        except OSError:
            is_alone = False
        yield is_alone
    finally:
        os.close(descriptor)


# Runs of the compiler.


def name_of(compiler: Command) -> str:
    return ZIG if ZIG in compiler else Path(compiler[0]).name


def num_processes() -> int:
    return min(MAX_PROCESSES, len(os.sched_getaffinity(0)))


def run_all(commands: Sequence[Command], folder: Path, temporary: Path) -> None:
    """Run commands in this order, one per core at a time. If one fails or this process ends, kill those that run.

    Raises BuildError.
    """
    # _first_error searches for an English word.
    environ = {"ZIG_GLOBAL_CACHE_DIR": str(temporary / "zig"), **os.environ, "LC_ALL": "C"}
    processes: list[subprocess.Popen[str]] = []

    def run(command: Command) -> None:
        try:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            raise BuildError(f"the C++ compiler cannot run: {command[0]}: {error.strerror}") from None
        processes.append(process)
        lines = process.communicate()[0].splitlines()
        if process.returncode != 0:
            raise BuildError(f"{name_of(command)} failed: {_first_error(lines, process.returncode)}")
        for line in lines:
            logger.debug("%s", line)

    is_main = threading.current_thread() is threading.main_thread()
    # So that the compiler is not left running, unless the signal is handled already.
    signums = [signal.SIGTERM] if is_main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL else []
    with handling(signums, leave), ThreadPoolExecutor(num_processes()) as pool:
        try:
            for number, run_ended in enumerate(as_completed([pool.submit(run, each) for each in commands]), 1):
                run_ended.result()
                if number < len(commands):
                    logger.info("compiled %d of %d files", number, len(commands))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                if process.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)


def _first_error(lines: list[str], status: int) -> str:
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line for line in lines if re.search(r"\b(error:|undefined reference)", line)]
    return [*errors, *lines, f"exit status {status}"][0]


# The command.


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="build-kernels", description="Compile the kernels for the CPU.")
    parser.add_argument("--all", action="store_true", help="Compile for all processors, not only for this one")
    parser.add_argument("--in-package", action="store_true", help="Store the libraries beside the sources")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.DEBUG, format="%(message)s")
    try:
        for code_path in CODE_PATHS if arguments.all else [best_code_path()]:
            began = time.monotonic()
            library = build(code_path, in_package=arguments.in_package, package=PACKAGE)
            print(f"{library} ({time.monotonic() - began:.1f} s)", flush=True)
    except ValueError as error:
        print(f"lightwell: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
