"""Compiling the kernels: commands and flags, caching, and failures.

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

from engine.kernels.cpu import build as build_module
from engine.kernels.cpu import compiler_runs
from engine.kernels.cpu.build import COMMON_FLAGS, COSTS, PACKAGE, NotCompiledError, find_compiler
from engine.kernels.cpu.compiler_runs import BuildError
from engine.kernels.cpu.processor import CODE_PATHS, CodePath
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
[ "$1" = --version ] && echo "stub {version}" && exit
{body}
while [ "$1" != -o ]; do shift; done
echo made > "$2"
"""


class StubCompiler:
    def __init__(self, folder: Path) -> None:
        self.path = folder / "stub-c++"
        self.log = folder / "calls"
        self.does("")

    def does(self, body: str, version: str = "1.0") -> None:
        self.path.write_text(STUB.format(log=self.log, body=body, version=version))
        self.path.chmod(0o755)

    @property
    def calls(self) -> list[list[str]]:
        """Return the arguments of each call that compiles or links."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line.split() for line in lines if line != "--version"]

    @property
    def num_links(self) -> int:
        return sum("-shared" in call for call in self.calls)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    (tmp_path / "package" / "src").mkdir(parents=True)
    for name, text in {"other.cpp": UNIT, "library.cpp": LIBRARY, "names.h": NAMES}.items():
        (tmp_path / "package" / "src" / name).write_text(text)
    return tmp_path / "package"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of compiled libraries."""
    monkeypatch.setenv("LIGHTWELL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiler_runs, "POLL_SECONDS", 0.001)
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StubCompiler:
    stub = StubCompiler(tmp_path)
    monkeypatch.setenv("CXX", str(stub.path))
    return stub


def build_package(package: Path, **options: bool) -> Path:
    return build_module.build_package(package, "avx2", **options)


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# Commands.


def test_each_source_is_compiled_for_the_code_path(package: Path, compiler: StubCompiler) -> None:
    for name, code_path in CODE_PATHS.items():
        compiler.log.unlink(missing_ok=True)
        library = build_module.build_package(package, name)
        assert library.name.startswith(f"{name}-")
        flags = [*COMMON_FLAGS, *code_path.compiler_flags]
        *compiled, linked = compiler.calls
        assert [call[: len(flags)] for call in compiler.calls] == [flags] * 3
        objects = {call[-1]: call[len(flags) : -1] for call in compiled}
        assert {Path(path).name: rest for path, rest in objects.items()} == {
            "library.o": ["-c", "library.cpp", "-o"],
            "other.o": ["-c", "other.cpp", "-o"],
        }
        assert "-shared" in linked
        assert set(objects) <= set(linked)


@has_compiler
def test_a_compiled_library_can_be_called(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++")
    library = ctypes.CDLL(str(build_package(package)))
    assert library.one_more(41) == 42
    with pytest.raises(AttributeError):  # only exported functions are visible
        library._Z13one_more_thani  # noqa: B018


def test_all_sources_are_installed_and_in_the_key() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["engine.kernels.cpu"]
    installed = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    assert set((PACKAGE / "src").iterdir()) <= installed
    assert PACKAGE / "src" / "library.cpp" in installed
    assert {path.suffix for path in (PACKAGE / "src").iterdir()} <= {".cpp", ".h"}
    assert "prebuilt/*.so" in patterns


# The cache.


def test_it_is_compiled_once(package: Path, compiler: StubCompiler, cache: Path) -> None:
    library = build_package(package)
    num_calls = len(compiler.calls)
    assert build_package(package) == library
    assert len(compiler.calls) == num_calls
    assert library.parent == cache
    assert library.read_bytes() == b"made\n" + hashlib.sha256(b"made\n").digest()
    assert files_in(cache) == [library.name]


@pytest.mark.parametrize(
    ("damage", "in_package"), [(b"", False), (b"made\n", False), (b"mad", True), (b"made\n" + bytes(32), True)]
)
def test_a_damaged_library_is_compiled_again(
    damage: bytes, in_package: bool, package: Path, compiler: StubCompiler, caplog: pytest.LogCaptureFixture
) -> None:
    library = build_package(package, in_package=in_package)
    whole = library.read_bytes()
    library.write_bytes(damage)
    with pytest.raises(NotCompiledError):
        build_package(package, may_compile=False)
    assert build_package(package, in_package=in_package) == library
    assert library.read_bytes() == whole
    assert compiler.num_links == 2
    assert caplog.messages == [f"{library} is damaged: compiling the kernels again"] * 2


def test_a_library_is_on_the_disk_before_it_has_its_name(
    package: Path, compiler: StubCompiler, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[int, list[str]]] = []

    def fsync(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_size, sorted(path.name for path in cache.glob("*.so"))))

    monkeypatch.setattr(os, "fsync", fsync)
    library = build_package(package)
    assert synced[0] == (library.stat().st_size, [])
    assert [names for _, names in synced[1:]] == [[library.name]]


def test_what_changes_is_compiled_anew(
    package: Path, compiler: StubCompiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = [build_package(package)]

    def is_another() -> bool:
        library = build_package(package)
        is_new = library not in seen
        seen.append(library)
        return is_new and build_package(package) == library and compiler.num_links == len(seen)

    with (package / "src" / "names.h").open("a") as file:
        file.write("// more\n")
    assert is_another()
    (package / "src" / "names.h").rename(package / "src" / "other.h")
    assert is_another()
    (package / "src" / "new.cpp").write_text("")
    assert is_another()
    monkeypatch.setattr(build_module, "COMMON_FLAGS", [*COMMON_FLAGS, "-DX"])
    assert is_another()
    monkeypatch.setitem(CODE_PATHS, "avx2", CodePath(frozenset(), ("-mavx2",)))
    assert is_another()
    compiler.does("", version="1.1")
    assert is_another()
    monkeypatch.setenv("CXX", f"{compiler.path} -DY")
    assert is_another()
    moved = compiler.path.rename(tmp_path / "moved-c++")
    monkeypatch.setenv("CXX", f"{moved} -DY")
    assert is_another()
    (package / "src" / "notes.txt").write_text("is not compiled")
    assert build_package(package) == seen[-1]


def test_the_sanitized_library_is_another_one(package: Path, compiler: StubCompiler) -> None:
    library = build_package(package)
    assert build_package(package, sanitize=True) != library
    sanitized = [call for call in compiler.calls if "-fsanitize=address,undefined" in call]
    assert len(sanitized) == len(compiler.calls) / 2
    assert all(call.index("-O1") > call.index("-O3") for call in sanitized)


def test_a_cache_folder_with_a_relative_path(
    package: Path, compiler: StubCompiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTWELL_CACHE", "here")
    assert build_package(package).parent == tmp_path / "here" / "kernels"


def test_a_cache_that_cannot_be_written(
    package: Path, compiler: StubCompiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    library = build_package(package)
    assert library.parent == tmp_path / f"lightwell-kernels-{os.getuid()}"
    assert library.parent.stat().st_mode & 0o777 == 0o700
    assert build_package(package) == library
    assert compiler.num_links == 1
    library.parent.chmod(0o777)  # others could have stored a library there
    with pytest.raises(BuildError, match=r"no folder for the compiled kernels: .* is open to other users"):
        build_package(package)


def test_a_disk_that_is_full(package: Path, compiler: StubCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(BuildError, match=r"cannot store the compiled kernels in .*: No space left on device"):
        build_package(package)


# A library beside the sources.


def test_a_prebuilt_library_needs_no_compiler(
    package: Path, compiler: StubCompiler, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = build_package(package, in_package=True)
    assert library.parent == package / "prebuilt"
    assert not cache.exists()
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert build_package(package) == build_package(package, in_package=True) == library
    with pytest.raises(BuildError):
        build_package(package, sanitize=True)
    (package / "src" / "library.cpp").write_text("// changed")
    with pytest.raises(BuildError):
        build_package(package)


def test_a_package_that_cannot_be_written(package: Path, compiler: StubCompiler) -> None:
    (package / "prebuilt").write_text("a file where the folder should be")
    with pytest.raises(BuildError, match=r"cannot store the compiled kernels in .*/prebuilt: File exists"):
        build_package(package, in_package=True)


# Several processes, and processes that are terminated. Threads replace processes: each opens its own lock.


@pytest.mark.parametrize("has_locks", [True, False])
def test_two_at_once_end_well(
    has_locks: bool,
    package: Path,
    compiler: StubCompiler,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With locks, only one compiles, and not before the other waits for the lock."""
    both_are_there, flock = threading.Barrier(2), fcntl.flock
    calls: list[Any] = []

    def lock(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            (tmp_path / "go").touch()
        if has_locks:
            flock(*args)
        else:
            both_are_there.wait(60)
            raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", lock)
    compiler.does(f"n=0; while [ ! -e {tmp_path}/go ] && [ $n -lt 6000 ]; do n=$((n + 1)); sleep 0.01; done")
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(build_package, [package, package])
    assert first == second
    assert compiler.num_links == (1 if has_locks else 2)
    assert files_in(cache) == [first.name]


def test_leftovers_of_killed_processes_go(package: Path, compiler: StubCompiler, cache: Path) -> None:
    (cache / ".build-killed").mkdir(parents=True)
    (cache / ".build-killed" / "library.o").touch()
    library = build_package(package)
    assert files_in(cache) == [library.name]


def test_sigterm_ends_the_compiler_too(package: Path, compiler: StubCompiler, cache: Path, tmp_path: Path) -> None:
    compiler.does(f"sleep 60 & echo $! >> {tmp_path}/pids; wait")
    pids = tmp_path / "pids"

    def send_signal() -> None:
        wait_until(lambda: pids.exists() and len(pids.read_text().splitlines()) == 2)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send_signal)
    sender.start()
    with pytest.raises(SystemExit) as ended:
        build_package(package)
    sender.join()
    assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    wait_for_end_of(*map(int, pids.read_text().split()), seconds=60)
    assert files_in(cache) == []


# Failures.


def test_the_compiler_is_found(tmp_path: Path, compiler: StubCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_compiler() == [str(compiler.path)]
    monkeypatch.setenv("CXX", f"{compiler.path} -m64")
    assert find_compiler() == [str(compiler.path), "-m64"]
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    for name in ("clang++", "c++", "g++"):  # each is preferred to those before it
        (tmp_path / "bin" / name).symlink_to(compiler.path)
        assert find_compiler() == [str(tmp_path / "bin" / name)]


def test_ziglang_is_used_where_there_is_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "ziglang")
    assert find_compiler()[:5] == [sys.executable, "-P", "-m", "ziglang", "c++"]
    (tmp_path / "g++").touch(0o755)
    assert find_compiler() == [str(tmp_path / "g++")]


@pytest.mark.long
@pytest.mark.skipif(not importlib.util.find_spec("ziglang"), reason="needs ziglang")
def test_a_library_compiled_by_ziglang(package: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    path = build_package(package)
    assert ctypes.CDLL(str(path)).one_more(41) == 42
    assert set(re.findall(rb"lib\w+\.so[.\d]*", path.read_bytes())) <= {b"libc.so.6", b"libpthread.so.0"}
    assert files_in(cache) == [path.name]


def test_without_a_compiler(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        BuildError,
        match=r"^no C\+\+ compiler found: g\+\+, c\+\+, clang\+\+ "
        r"\(set CXX to use another, or run: pip install ziglang\)$",
    ):
        build_package(package)
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    with pytest.raises(BuildError, match=r"^the C\+\+ compiler named by CXX does not exist: /nonexistent/c\+\+$"):
        build_package(package)


def test_a_compiler_that_cannot_run(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c++").write_bytes(b"\x7fELF")
    (tmp_path / "c++").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    with pytest.raises(BuildError, match=r"^the C\+\+ compiler cannot run: .*/c\+\+: Exec format error$"):
        build_package(package)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("echo 'In file x.h:'; echo 'x.h:3:4: error: no y'; echo 'x.h:9: error: z'; exit 1", "x.h:3:4: error: no y"),
        ("echo 'ld: undefined reference to y' >&2; echo 'collect2: error: 1'; exit 1", "ld: undefined reference to y"),
        ("echo; echo ' Segmentation fault'; exit 1", "Segmentation fault"),
        ("exit 3", "exit status 3"),
    ],
)
def test_a_compiler_that_fails(package: Path, compiler: StubCompiler, cache: Path, body: str, error: str) -> None:
    compiler.does(body)
    with pytest.raises(BuildError) as raised:
        build_package(package)
    assert str(raised.value) == f"stub-c++ failed: {error}"
    assert files_in(cache) == []


def test_the_first_failure_ends_the_others(package: Path, compiler: StubCompiler, tmp_path: Path) -> None:
    compiler.does(f'case "$*" in *library.cpp*) sleep 60 & echo $! > {tmp_path}/pid; wait;; esac; '
                  f"while [ ! -s {tmp_path}/pid ]; do sleep 0.01; done; exit 1")  # fmt: skip
    with pytest.raises(BuildError):
        build_package(package)
    wait_for_end_of(int((tmp_path / "pid").read_text()), seconds=60)
    assert len(compiler.calls) == 2


def test_other_machines_have_no_kernels(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(BuildError, match=r"^the CPU kernels are for x86_64, and this machine is aarch64$"):
        build_package(package)


# The command.


def test_the_command_prints_path_and_seconds(
    package: Path, compiler: StubCompiler, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build_module, "PACKAGE", package)
    monkeypatch.setattr(build_module, "best_code_path", lambda: "avx2")
    assert build_module.main([]) == 0
    assert re.fullmatch(rf"{build_package(package)} \(\d+\.\d s\)\n", capsys.readouterr().out)
    assert build_module.main(["--in-package", "--all"]) == 0
    printed = re.findall(rf"{package}/prebuilt/(\w+)-\w+\.so ", capsys.readouterr().out)
    assert printed == list(CODE_PATHS)


def test_the_log_says_what_is_compiled_and_that_it_is_once(
    package: Path, compiler: StubCompiler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    caplog.set_level("INFO")
    build_package(package)
    first, after_one, last = caplog.messages
    assert first == ("compiling the CPU kernels for processors with avx2 (once; 2 files, 2 at a time) with stub-c++")
    assert re.fullmatch(r"compiled 1 of 2 files; about \d+ s left", after_one)
    assert re.fullmatch(r"compiled in \d+\.\d s", last)
    build_package(package)
    assert len(caplog.messages) == 3


def test_the_longest_is_compiled_first_after_the_shortest(
    package: Path, compiler: StubCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shortest shows how fast this machine is."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    for name in ("attention", "linear", "rows"):
        (package / "src" / f"{name}.cpp").touch()
    build_package(package)
    compiled = [Path(call[-1]).stem for call in compiler.calls[:-1]]
    assert compiled == ["library", "linear", "attention", "rows", "other"]


def test_each_source_has_a_cost() -> None:
    assert set(COSTS) == {path.stem for path in (PACKAGE / "src").glob("*.cpp")}


def test_the_command_fails_in_one_line(
    package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build_module, "PACKAGE", package)
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert build_module.main([]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == "lightwell: error: the C++ compiler named by CXX does not exist: /nonexistent/c++\n"


def test_nothing_but_the_standard_library_is_needed() -> None:
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}]; import engine.kernels.cpu.build; sys.exit('torch' in sys.modules)"
    )
    path = [sys.executable, "-I", "-S", "-c", code]
    assert subprocess.run(path, check=False).returncode == 0


# The sanitizers.


@pytest.mark.long
@has_compiler
def test_sanitizers_find_errors(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++")
    library = build_package(package, sanitize=True)
    code = "x = (ctypes.c_float * 9)(*range(9)); library.sum.restype = ctypes.c_float; print(library.sum(x, {n}))"
    fine = run_sanitized(code.format(n=9), library)
    assert (fine.returncode, fine.stdout, fine.stderr) == (0, "36.0\n", "")
    beyond = run_sanitized(code.format(n=10), library)
    assert beyond.returncode != 0
    assert "heap-buffer-overflow" in beyond.stderr
    assert "library.cpp:5" in beyond.stderr
    overflow = run_sanitized("print(library.one_more(2**31 - 1))", library)
    assert overflow.returncode != 0
    assert "signed integer overflow" in overflow.stderr
    assert overflow.stdout == ""
