"""Which code paths a processor has, by the flags that the system reports."""

import ctypes
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.kernels.cpu import library
from engine.kernels.cpu.library import CODE_PATHS, available_code_paths, best_code_path, cpu_flags

# Flags of /proc/cpuinfo, without most of those that no code path needs.
HASWELL = "fpu sse2 ssse3 fma sse4_2 avx f16c rdrand bmi1 avx2 smep bmi2 erms"
ICE_LAKE = f"{HASWELL} avx512f avx512dq avx512cd avx512bw avx512vl avx512_vbmi2 avx512_vnni"
ZEN_4 = f"{ICE_LAKE} avx512_bf16"
SAPPHIRE_RAPIDS = f"{ZEN_4} amx_bf16 avx512_fp16 amx_tile amx_int8"
PROCESSORS = [
    ("fpu sse2 ssse3 sse4_2 avx", []),
    (HASWELL, ["avx2"]),
    (HASWELL.replace("f16c", ""), []),
    (f"{HASWELL} avx512f avx512dq avx512cd avx512bw avx512vl", ["avx2"]),  # Skylake has no VNNI
    (ICE_LAKE, ["avx512", "avx2"]),
    (ZEN_4, ["avx512_bf16", "avx512", "avx2"]),
    (SAPPHIRE_RAPIDS, ["amx", "avx512_bf16", "avx512", "avx2"]),
]


def has(flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = f"processor\t: 0\nmodel name\t: X\nflags\t\t: {flags}\nbugs\t\t:\n\nprocessor\t: 1\nflags\t\t: other\n"
    (tmp_path / "cpuinfo").write_text(info)
    monkeypatch.setattr(library, "CPU_INFO", tmp_path / "cpuinfo")


@pytest.mark.parametrize(("flags", "names"), PROCESSORS)
def test_code_paths(flags: str, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    has(flags, tmp_path, monkeypatch)
    monkeypatch.setattr(library, "_may_use_tiles", lambda: True)
    assert available_code_paths() == names == [name for name in CODE_PATHS if name in names]
    if names:
        assert best_code_path() == names[0]
    else:
        with pytest.raises(ValueError, match="this processor has no AVX2"):
            best_code_path()


@pytest.mark.parametrize(("answer", "best"), [(0, "amx"), (-1, "avx512_bf16")])
def test_the_system_may_refuse_tiles(answer: int, best: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []

    def system_call(*numbers: ctypes.c_long) -> int:
        asked.append([number.value for number in numbers])
        return answer

    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(syscall=system_call))
    has(SAPPHIRE_RAPIDS, tmp_path, monkeypatch)
    assert best_code_path() == best
    assert asked == [[158, 0x1023, 18]]  # arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    has(ZEN_4, tmp_path, monkeypatch)
    assert best_code_path() == "avx512_bf16"
    assert len(asked) == 1


def test_without_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "CPU_INFO", tmp_path / "missing")
    assert cpu_flags() == set()
    (tmp_path / "missing").write_text("Processor: ARMv8\nFeatures: fp asimd\n")
    assert available_code_paths() == []


def test_the_compiler_may_use_what_the_processor_must_have() -> None:
    for code_path in CODE_PATHS.values():
        named = {flag.removeprefix("-m") for flag in code_path.compiler_flags if flag.startswith("-m")}
        required = {re.sub(r"^bmi1$", "bmi", flag.replace("_", "")) for flag in code_path.cpu_flags}
        assert named == {flag for flag in required if not flag.startswith("amx")}
