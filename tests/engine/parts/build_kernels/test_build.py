"""Compiling the kernels: commands and flags, caching, failures, and runs of the compiler.

Most tests replace the compiler by a stub that records how it is called.
"""

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from engine.kernels.cpu import library as library_module
from engine.kernels.cpu.library import CODE_PATHS, COMMON_FLAGS, PACKAGE, CodePath, find_library
from engine.parts.build_kernels import build as build_module
from engine.parts.build_kernels.build import SOURCES, BuildError, find_compiler, run_all
from tests.support.paths import ROOT
from tests.support.processes import wait_for_end_of
from tests.support.sanitizer import run_sanitized
from tests.support.serving import wait_until

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the kernels are for x86-64")
has_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")

UNIT = """\
#include "names.h"
int one_more_than(int x) { return x + 1; }
"""
NAMES = "int one_more_than(int x);\n"
LIBRARY = """\
#include "names.h"
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT float sum(const float* x, int n) {
    float result = 0;
    for (int i = 0; i < n; i++) result += x[i];
    return result;
}
EXPORT int one_more(int x) { return one_more_than(x); }
"""

STUB = """\
#!/bin/sh
# Writes its arguments to a file, runs the commands of the test, and makes the output file.
printf '%s\\n' "$*" >> {log}
{body}
while [ "$1" != -o ]; do shift; done
echo made > "$2"
"""


class Place:
    """A package of sources, the folder of compiled libraries, and a stub of the compiler."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, patch
        self.package, self.cache = folder / "package", folder / "cache" / "kernels"
        self.sources = self.package / "src"
        self.sources.mkdir(parents=True)
        for name, text in {"other.cpp": UNIT, "library.cpp": LIBRARY, "names.h": NAMES}.items():
            (self.sources / name).write_text(text)
        patch.setenv("LIGHTWELL_CACHE", str(folder / "cache"))
        self.compiler, self.log = folder / "stub-c++", folder / "calls"
        self.compiler_does("")
        patch.setenv("CXX", str(self.compiler))

    def compiler_does(self, body: str) -> None:
        self.compiler.write_text(STUB.format(log=self.log, body=body))
        self.compiler.chmod(0o755)

    @property
    def calls(self) -> list[list[str]]:
        """Return the arguments of each call that compiles or links."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line.split() for line in lines]

    @property
    def num_links(self) -> int:
        return sum("-shared" in call for call in self.calls)

    @property
    def cached(self) -> list[str]:
        return sorted(str(path.relative_to(self.cache)) for path in self.cache.rglob("*"))

    def build(self, code_path: str = "avx2", /, **options: bool) -> Path:
        return build_module.build(code_path, package=self.package, **options)

    def failure(self, **options: bool) -> str:
        with pytest.raises(BuildError) as raised:
            self.build(**options)
        return str(raised.value)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, monkeypatch)


# Commands.


def test_each_source_is_compiled_for_the_code_path(place: Place) -> None:
    for name, code_path in CODE_PATHS.items():
        place.log.unlink(missing_ok=True)
        assert place.build(name).name.startswith(f"{name}-")
        flags = [*COMMON_FLAGS, *code_path.compiler_flags]
        *compiled, linked = place.calls
        assert [call[: len(flags)] for call in place.calls] == [flags] * 3
        objects = {call[-1]: call[len(flags) : -1] for call in compiled}
        assert {Path(path).name: rest for path, rest in objects.items()} == {
            f"{source}.o": ["-c", f"{source}.cpp", "-o"] for source in ("library", "other")
        }
        assert {"-shared", *objects} <= set(linked)


@has_compiler
def test_a_compiled_library_can_be_called(place: Place) -> None:
    place.patch.setenv("CXX", "g++")
    library = ctypes.CDLL(str(place.build()))
    assert library.one_more(41) == 42
    with pytest.raises(AttributeError):  # only exported functions are visible
        library._Z13one_more_thani  # noqa: B018


def test_all_sources_are_installed_and_have_an_order() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["engine.kernels.cpu"]
    sources = set((PACKAGE / "src").iterdir())
    assert sources <= {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    assert {path.suffix for path in sources} == {".cpp", ".h"}
    assert "prebuilt/*.so" in patterns
    assert set(SOURCES) == {path.stem for path in sources if path.suffix == ".cpp"}


# The cache.


def test_it_is_compiled_once(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """The log says so, and how far it is."""
    place.patch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    caplog.set_level("INFO")
    library = place.build()
    first, after_one, last = caplog.messages
    assert first == "compiling the CPU kernels for processors with avx2 (once; 2 files, 2 at a time) with stub-c++"
    assert after_one == "compiled 1 of 2 files"
    assert re.fullmatch(r"compiled in \d+\.\d s", last)
    num_calls = len(place.calls)
    assert place.build() == library
    assert (len(place.calls), len(caplog.messages)) == (num_calls, 3)
    assert library.read_bytes() == b"made\n" + hashlib.sha256(b"made\n").digest()
    assert place.cached == [library.name]


@pytest.mark.parametrize(
    ("damage", "in_package"), [(b"", False), (b"made\n", False), (b"mad", True), (b"made\n" + bytes(32), True)]
)
def test_a_damaged_library_is_compiled_again(
    damage: bytes, in_package: bool, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    library = place.build(in_package=in_package)
    whole = library.read_bytes()
    library.write_bytes(damage)
    assert find_library("avx2", package=place.package) is None
    assert place.build(in_package=in_package) == library
    assert library.read_bytes() == whole
    assert place.num_links == 2
    assert caplog.messages == [f"{library} is damaged: it is not used"] * 2


def test_a_library_is_on_the_disk_before_it_has_its_name(place: Place) -> None:
    synced: list[tuple[int, list[str]]] = []

    def fsync(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_size, sorted(path.name for path in place.cache.glob("*.so"))))

    place.patch.setattr(os, "fsync", fsync)
    library = place.build()
    assert synced[0] == (library.stat().st_size, [])
    assert [names for _, names in synced[1:]] == [[library.name]]


def test_what_changes_is_compiled_anew(place: Place) -> None:
    seen = [place.build()]
    sources, patch = place.sources, place.patch
    for change in (
        lambda: (sources / "names.h").write_text(f"{NAMES}// more\n"),
        lambda: (sources / "names.h").rename(sources / "other.h"),
        lambda: (sources / "new.cpp").write_text(""),
        lambda: patch.setattr(library_module, "COMMON_FLAGS", [*COMMON_FLAGS, "-DX"]),
        lambda: patch.setitem(CODE_PATHS, "avx2", CodePath(frozenset(), ("-mavx2",))),
    ):
        change()
        library = place.build()
        assert library not in seen
        seen.append(library)
        assert place.build() == library
        assert place.num_links == len(seen)
    (sources / "notes.txt").write_text("is not compiled")
    patch.setenv("CXX", "/nonexistent/c++")  # compilers make the same kernels
    assert place.build() == seen[-1]


def test_the_sanitized_library_is_another_one(place: Place) -> None:
    assert place.build() != place.build(sanitize=True)
    sanitized = [call for call in place.calls if "-fsanitize=address,undefined" in call]
    assert len(sanitized) == len(place.calls) / 2
    assert all(call.index("-O1") > call.index("-O3") for call in sanitized)


def test_a_cache_folder_with_a_relative_path(place: Place) -> None:
    place.patch.chdir(place.folder)
    place.patch.setenv("LIGHTWELL_CACHE", "here")
    assert place.build().parent == place.folder / "here" / "kernels"


def test_a_cache_that_cannot_be_written(place: Place) -> None:
    (place.folder / "cache").write_text("a file where the folder should be")
    place.patch.setattr(tempfile, "tempdir", str(place.folder))
    library = place.build()
    assert library.parent == place.folder / f"lightwell-kernels-{os.getuid()}"
    assert library.parent.stat().st_mode & 0o777 == 0o700
    assert place.build() == library
    assert place.num_links == 1
    library.parent.chmod(0o777)  # others could have stored a library there
    assert re.fullmatch("no folder for the compiled kernels: .* is open to other users", place.failure())


def test_what_cannot_be_stored(place: Place) -> None:
    (place.package / "prebuilt").write_text("a file where the folder should be")
    problem = place.failure(in_package=True)
    assert problem == f"cannot store the compiled kernels in {place.package}/prebuilt: File exists"

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    place.patch.setattr(Path, "replace", fail)
    assert place.failure() == f"cannot store the compiled kernels in {place.cache}: No space left on device"


def test_a_prebuilt_library_needs_no_compiler(place: Place) -> None:
    library = place.build(in_package=True)
    assert library.parent == place.package / "prebuilt"
    assert not place.cache.exists()
    place.patch.setenv("CXX", "/nonexistent/c++")
    assert place.build() == place.build(in_package=True) == library
    place.failure(sanitize=True)
    (place.sources / "library.cpp").write_text("// changed")
    place.failure()


# Several processes, and processes that are terminated. Threads replace processes: each opens its own lock.


@pytest.mark.parametrize("has_locks", [True, False])
def test_two_at_once_end_well(has_locks: bool, place: Place) -> None:
    """With locks, only one compiles, and not before the other waits for the lock."""
    both_are_there, flock, go = threading.Barrier(2), fcntl.flock, place.folder / "go"
    calls: list[Any] = []

    def lock(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            go.touch()
        if has_locks:
            flock(*args)
        else:
            both_are_there.wait(60)
            raise OSError(95, "Operation not supported")

    place.patch.setattr(fcntl, "flock", lock)
    place.compiler_does(f"n=0; while [ ! -e {go} ] && [ $n -lt 6000 ]; do n=$((n + 1)); sleep 0.01; done")
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: place.build(), range(2))
    assert first == second
    assert place.num_links == (1 if has_locks else 2)
    assert place.cached == [first.name]


def test_leftovers_of_killed_processes_go(place: Place) -> None:
    (place.cache / ".build-killed").mkdir(parents=True)
    (place.cache / ".build-killed" / "library.o").touch()
    library = place.build()
    assert place.cached == [library.name]


def test_sigterm_ends_the_compiler_too(place: Place) -> None:
    pids = place.folder / "pids"
    place.compiler_does(f"sleep 60 & echo $! >> {pids}; wait")

    def send_signal() -> None:
        wait_until(lambda: pids.exists() and len(pids.read_text().splitlines()) == 2)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send_signal)
    sender.start()
    with pytest.raises(SystemExit) as ended:
        place.build()
    sender.join()
    assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    wait_for_end_of(*map(int, pids.read_text().split()), seconds=60)
    assert place.cached == []


def test_the_module_is_a_command_that_compiles(place: Place) -> None:
    place.compiler_does("echo 'a.cpp: error: no' >&2; exit 1")
    command = [sys.executable, "-m", "engine.parts.build_kernels.build"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, "lightwell: error: stub-c++ failed" in ran.stderr) == (1, True), ran.stderr


# Failures.


def test_the_compiler_is_found(place: Place) -> None:
    """In the order of preference; ziglang is used where there is no other."""
    place.patch.setenv("CXX", f"{place.compiler} -m64")
    assert find_compiler() == [str(place.compiler), "-m64"]
    place.patch.delenv("CXX")
    folder = place.folder / "bin"
    folder.mkdir()
    place.patch.setenv("PATH", str(folder))
    place.patch.setattr(importlib.util, "find_spec", lambda name: name == "ziglang")
    assert find_compiler()[:5] == [sys.executable, "-P", "-m", "ziglang", "c++"]
    for name in ("clang++", "c++", "g++"):  # each is preferred to those before it
        (folder / name).symlink_to(place.compiler)
        assert find_compiler() == [str(folder / name)]


@pytest.mark.long
@pytest.mark.skipif(not importlib.util.find_spec("ziglang"), reason="needs ziglang")
def test_a_library_compiled_by_ziglang(place: Place) -> None:
    place.patch.delenv("CXX")
    place.patch.setenv("PATH", "/nonexistent")
    path = place.build()
    assert ctypes.CDLL(str(path)).one_more(41) == 42
    assert set(re.findall(rb"lib\w+\.so[.\d]*", path.read_bytes())) <= {b"libc.so.6", b"libpthread.so.0"}
    assert place.cached == [path.name]


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("echo 'In file x.h:'; echo 'x.h:3:4: error: no y'; echo 'x.h:9: error: z'; exit 1", "x.h:3:4: error: no y"),
        ("echo 'ld: undefined reference to y' >&2; echo 'collect2: error: 1'; exit 1", "ld: undefined reference to y"),
        ("echo; echo ' Segmentation fault'; exit 1", "Segmentation fault"),
        ("exit 3", "exit status 3"),
    ],
)
def test_a_compiler_that_fails(body: str, error: str, place: Place) -> None:
    place.compiler_does(body)
    assert place.failure() == f"stub-c++ failed: {error}"
    assert place.cached == []


def test_where_nothing_can_be_compiled(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """The command fails in one line."""
    place.compiler.write_bytes(b"\x7fELF")
    assert place.failure() == f"the C++ compiler cannot run: {place.compiler}: Exec format error"
    place.patch.setenv("CXX", "/nonexistent/c++")
    assert place.failure() == "the C++ compiler named by CXX does not exist: /nonexistent/c++"
    assert build_module.main([]) == 1
    assert capsys.readouterr() == ("", f"lightwell: error: {place.failure()}\n")
    place.patch.delenv("CXX")
    place.patch.setenv("PATH", str(place.folder))
    place.patch.setattr(importlib.util, "find_spec", lambda name: None)
    advice = "(set CXX to use another, or run: pip install ziglang)"
    assert place.failure() == f"no C++ compiler found: g++, c++, clang++ {advice}"
    place.patch.setattr(platform, "machine", lambda: "aarch64")
    assert place.failure() == "the CPU kernels are for x86_64, and this machine is aarch64"


def test_the_first_failure_ends_the_others(place: Place) -> None:
    pid = place.folder / "pid"
    place.compiler_does(f'case "$*" in *library.cpp*) sleep 60 & echo $! > {pid}; wait;; esac; '
                        f"while [ ! -s {pid} ]; do sleep 0.01; done; exit 1")  # fmt: skip
    place.failure()
    wait_for_end_of(int(pid.read_text()), seconds=60)
    assert len(place.calls) == 2


# The command.


def test_the_command_prints_path_and_seconds(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.patch.setattr(build_module, "PACKAGE", place.package)
    place.patch.setattr(build_module, "best_code_path", lambda: "avx2")
    assert build_module.main([]) == 0
    assert re.fullmatch(rf"{place.build()} \(\d+\.\d s\)\n", capsys.readouterr().out)
    assert build_module.main(["--in-package", "--all"]) == 0
    printed = re.findall(rf"{place.package}/prebuilt/(\w+)-\w+\.so ", capsys.readouterr().out)
    assert printed == list(CODE_PATHS)


def test_nothing_but_the_standard_library_is_needed() -> None:
    code = f"sys.path += [{str(ROOT)!r}]; import engine.parts.build_kernels.build; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-I", "-S", "-c", f"import sys; {code}"], check=False).returncode == 0


# The order.


def test_the_longest_is_compiled_first(place: Place) -> None:
    place.patch.setattr(os, "sched_getaffinity", lambda pid: {0})
    for name in ("attention", "linear", "rows"):
        (place.sources / f"{name}.cpp").touch()
    place.build()
    assert [Path(call[-1]).stem for call in place.calls[:-1]] == ["linear", "attention", "rows", "library", "other"]


@pytest.mark.parametrize(("num_cores", "num_processes"), [(1, 1), (3, 3), (96, 4)])
def test_one_process_for_each_core_up_to_four(
    num_cores: int, num_processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    command = ["sh", "-c", f"echo + >> {log}; sleep 0.2; echo - >> {log}"]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(num_cores)))
    run_all([command] * 9, tmp_path, tmp_path)
    signs = log.read_text().split()
    nums_running = [signs[:end].count("+") - signs[:end].count("-") for end in range(len(signs) + 1)]
    assert (len(signs), max(nums_running), nums_running[-1]) == (18, num_processes, 0)


# The sanitizers.


@pytest.mark.long
@has_compiler
def test_sanitizers_find_errors(place: Place) -> None:
    place.patch.setenv("CXX", "g++")
    library = place.build(sanitize=True)
    code = "x = (ctypes.c_float * 9)(*range(9)); library.sum.restype = ctypes.c_float; print(library.sum(x, {n}))"
    fine = run_sanitized(code.format(n=9), library)
    assert (fine.returncode, fine.stdout, fine.stderr) == (0, "36.0\n", "")
    beyond = run_sanitized(code.format(n=10), library)
    assert beyond.returncode != 0
    assert "heap-buffer-overflow" in beyond.stderr
    assert "library.cpp:5" in beyond.stderr
