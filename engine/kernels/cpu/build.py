"""Compile the C++ kernels into a shared library for each code path when it is first needed, and cache it.

`python -m engine.kernels.cpu.build` compiles ahead of time; `lightwell build-kernels` runs it.

A library is looked for in this order:

1. `prebuilt/` beside the sources, under the code path and the hash of sources and flags: made with --in-package, for
   wheels, and images without a compiler. A library of other sources or flags is ignored.
2. The cache folder, under the code path and the hash of sources, flags and compiler.

Otherwise it is compiled into the cache folder, or into a temporary folder if the cache folder cannot be written.
A library ends with the hash of its contents. One that is damaged is compiled again: loading it could end the process.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import json
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
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from engine.kernels.cpu.library import CODE_PATHS, best_code_path
from engine.shared.durable_files import is_sealed, replace_durably, seal
from engine.shared.paths import cache_folder

logger = logging.getLogger(__name__)

ZIG = "ziglang"
MAX_PROCESSES = 4
POLL_SECONDS = 0.01

Command = list[str]

PACKAGE = Path(__file__).parent
MACHINE = "x86_64"
COMPILERS = ["g++", "c++", "clang++"]
# clang++ in a Python package, which needs no root. With a target, it compiles for any processor and libc from 2018 on.
ZIG_ARGUMENTS = ["-P", "-m", ZIG, "c++", "-target", "x86_64-linux-gnu.2.28"]
ZIG_LINK_FLAGS = ["-s", "-nostdlib++"]  # ziglang has the C++ runtime as sources, and the library does not need it
# How long a source takes, relative to others. The longest come first, so that all cores are busy to the end.
COSTS = {"linear": 6.5, "linear_k": 6.0, "linear_blocks": 5.5, "attention": 5.5, "rows": 3.5, "library": 0.4}

# Products and sums are fused only where the source says so, because all code paths and compilers must round alike,
# except in bfloat16 products, for which code paths have different instructions.
COMMON_FLAGS = [
    *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-exceptions", "-fno-rtti"),
    *("-Wall", "-Wextra", "-Werror=return-type"),
]
LINK_FLAGS = ["-shared", "-pthread", "-Wl,--no-undefined", "-Wl,--as-needed"]
SANITIZER_FLAGS = [  # -g1 is line numbers; with all of -g it takes three times as long
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    *("-fno-omit-frame-pointer", "-O1", "-g1"),
]


class BuildError(RuntimeError):
    """There is no library and none can be compiled. The message is one line for the user."""


class NotCompiledError(BuildError):
    """There is no library yet, and it was not to be compiled."""


def build(code_path: str, *, sanitize: bool = False, in_package: bool = False, may_compile: bool = True) -> Path:
    """Return the path of the shared library for a code path, after compiling it if necessary.

    With `sanitize`, the library aborts the process on accesses out of bounds and on undefined behavior. With
    `in_package`, it is compiled into `prebuilt/`.

    Raises:
        NotCompiledError: there is no library, and `may_compile` is False.
        BuildError: there is no library and none can be compiled.
    """
    return build_package(PACKAGE, code_path, sanitize=sanitize, in_package=in_package, may_compile=may_compile)


def build_package(
    package: Path, code_path: str, *, sanitize: bool = False, in_package: bool = False, may_compile: bool = True
) -> Path:
    """Do what `build` does, for the sources in `package`/src."""
    if platform.machine() != MACHINE:
        raise BuildError(f"the CPU kernels are for {MACHINE}, and this machine is {platform.machine()}")
    flags = _flags(code_path, sanitize)
    source_key = key_of_sources(package / "src", flags)
    prebuilt = package / "prebuilt" / f"{code_path}-{source_key}.so"
    if _is_usable(prebuilt):
        return prebuilt
    compiler = find_compiler()
    if in_package:
        library = prebuilt
    else:
        name = f"{code_path}-{_key_of_library(source_key, compiler)}.so"
        cached = _kernels_folder() / name
        if _is_usable(cached):  # its folder need not be writable
            return cached
        if not may_compile:
            raise NotCompiledError("the CPU kernels are not compiled yet")
        library = _writable_folder() / name
    try:
        _compile(package / "src", library, [*compiler, *flags], code_path)
    except OSError as error:
        problem = error.strerror or error
        raise BuildError(f"cannot store the compiled kernels in {library.parent}: {problem}") from None
    return library


def _is_usable(library: Path) -> bool:
    """Return whether a library is there, can be read and is whole."""
    if is_sealed(library):
        return True
    if os.path.isfile(library):  # False if the folder may not be read
        logger.warning("%s is damaged: compiling the kernels again", library)
    return False


# Folders and names.


def key_of_sources(sources: Path, flags: list[str]) -> str:
    """Return the hash of all sources and flags."""
    files = sorted(path for path in sources.glob("*") if path.suffix in (".cpp", ".h"))
    contents = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return hashlib.sha256(json.dumps([contents, flags, LINK_FLAGS]).encode()).hexdigest()


def _key_of_library(source_key: str, compiler: Command) -> str:
    parts = [source_key, os.path.realpath(compiler[0]), *compiler, version_of(compiler)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _kernels_folder() -> Path:
    return cache_folder().absolute() / "kernels"  # the compiler runs in the folder of the sources


def _writable_folder() -> Path:
    folder = _kernels_folder()
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


def version_of(compiler: Command) -> str:
    """Return what the compiler prints about itself. Raises BuildError if it cannot run."""
    try:
        done = subprocess.run([*compiler, "--version"], capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise BuildError(f"the C++ compiler cannot run: {compiler[0]}: {error.strerror}") from None
    return done.stdout


def _flags(code_path: str, sanitize: bool) -> list[str]:
    return [*COMMON_FLAGS, *(SANITIZER_FLAGS if sanitize else []), *CODE_PATHS[code_path].compiler_flags]


def _link_flags(compiler: Command) -> list[str]:
    return [*LINK_FLAGS, *(ZIG_LINK_FLAGS if ZIG in compiler else [])]


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
        if is_alone:
            _remove_leftovers(library.parent)
        began = time.monotonic()
        with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-", ignore_cleanup_errors=True) as temporary:
            linked = Path(temporary) / library.name
            objects = _object_runs(sources, linked.parent, compiler)
            logger.info(
                "compiling the CPU kernels for processors with %s (once; %d files, %d at a time) with %s",
                *(code_path, len(objects), num_processes(), name_of(compiler)),
            )
            run_all(list(objects.values()), sources, linked.parent)
            link = [*compiler, *_link_flags(compiler), *map(str, objects), "-o", str(linked)]
            run_all([CompilerRun(link)], sources, linked.parent)
            seal(linked)
            replace_durably(linked, library)
        logger.info("compiled in %.1f s", time.monotonic() - began)


def _object_runs(sources: Path, folder: Path, compiler: Command) -> dict[Path, CompilerRun]:
    """Return object file -> run. The longest come first, after the shortest, which shows how fast this machine is."""
    *longest, shortest = sorted((path.stem for path in sources.glob("*.cpp")), key=lambda name: (-_cost(name), name))
    objects = {name: folder / f"{name}.o" for name in (shortest, *longest)}
    return {
        path: CompilerRun([*compiler, "-c", f"{name}.cpp", "-o", str(path)], _cost(name))
        for name, path in objects.items()
    }


def _cost(name: str) -> float:
    return COSTS.get(name, 1.0)


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


def _remove_leftovers(folder: Path) -> None:
    """Remove the folders of processes that were killed while they compiled."""
    for leftover in folder.glob(".build-*"):
        shutil.rmtree(leftover, ignore_errors=True)


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
            library = build(code_path, in_package=arguments.in_package)
            print(f"{library} ({time.monotonic() - began:.1f} s)", flush=True)
    except (BuildError, ValueError) as error:
        print(f"lightwell: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


# Runs of the compiler: one for each core at a time.


class CompilerRun(NamedTuple):
    """A command, and how long it takes relative to others."""

    command: Command
    cost: float = 1.0


def name_of(compiler: Command) -> str:
    return ZIG if ZIG in compiler else Path(compiler[0]).name


def num_processes() -> int:
    return min(MAX_PROCESSES, len(os.sched_getaffinity(0)))


def run_all(runs: Sequence[CompilerRun], folder: Path, temporary: Path) -> None:
    """Run commands in this order, one per core at a time, and say how long the others take after each that has ended.

    If one fails or this process ends, kill those that run. Raises BuildError.
    """
    waiting = deque(runs)
    running: list[_Process] = []
    ended: list[tuple[float, float]] = []  # cost and seconds
    with _exit_on_sigterm():
        try:
            while waiting or running:
                while waiting and len(running) < num_processes():
                    running.append(_Process(waiting.popleft(), folder, temporary / f"{len(waiting)}.log"))
                time.sleep(POLL_SECONDS)
                for process in [process for process in running if process.has_ended]:
                    running.remove(process)
                    ended.append((process.run.cost, process.seconds))
                    process.check()
                    if waiting or running:
                        so_far = [(process.run.cost, process.seconds) for process in running]
                        seconds = seconds_left(ended, so_far, [run.cost for run in waiting])
                        logger.info("compiled %d of %d files; about %.0f s left", len(ended), len(runs), seconds)
        finally:
            for process in running:
                process.kill()


def seconds_left(
    ended: Sequence[tuple[float, float]], running: Sequence[tuple[float, float]], waiting: Sequence[float]
) -> float:
    """Return how long runs will take, by the costs and seconds of those that have ended on this machine."""
    seconds_of_cost = sum(seconds for _, seconds in ended) / sum(cost for cost, _ in ended)
    left = [max(0.0, cost * seconds_of_cost - seconds) for cost, seconds in running]
    left += [cost * seconds_of_cost for cost in waiting]
    return max(*left, sum(left) / num_processes())


@contextlib.contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, unless it is handled already, so that the compiler is not left running."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _exit(signum: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


class _Process:
    """A run of the compiler, in a process group of its own."""

    def __init__(self, run: CompilerRun, folder: Path, log: Path) -> None:
        self.run = run
        self.log = log
        self._began = time.monotonic()
        # _first_error searches for an English word.
        environ = {"ZIG_GLOBAL_CACHE_DIR": str(log.parent / "zig"), **os.environ, "LC_ALL": "C"}
        with log.open("wb") as output:
            try:
                self.process = subprocess.Popen(
                    run.command,
                    cwd=folder,
                    env=environ,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise BuildError(f"the C++ compiler cannot run: {run.command[0]}: {error.strerror}") from None

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def seconds(self) -> float:
        """Time since it began; read when it has just ended, how long it took."""
        return time.monotonic() - self._began

    def check(self) -> None:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        if self.process.returncode != 0:
            raise BuildError(f"{name_of(self.run.command)} failed: {_first_error(lines, self.process.returncode)}")
        for line in lines:
            logger.debug("%s", line)

    def kill(self) -> None:
        """End the process group.

        A signal may have interrupted `Popen.poll`, and left a lock for which `Popen.wait` would wait for ever.
        """
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.process.pid, 0)
        self.process.returncode = -signal.SIGKILL


def _first_error(lines: list[str], status: int) -> str:
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line for line in lines if re.search(r"\b(error:|undefined reference)", line)]
    return [*errors, *lines, f"exit status {status}"][0]


if __name__ == "__main__":
    sys.exit(main())
