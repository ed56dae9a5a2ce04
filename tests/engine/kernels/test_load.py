"""Which kernels are loaded, and the message if the C++ kernels cannot be used."""

import re
from pathlib import Path

import pytest
import torch

from engine.kernels.cpu import build as build_module
from engine.kernels.cpu import processor
from engine.kernels.cpu.compiler_runs import BuildError
from engine.kernels.interface import KernelOptions
from engine.kernels.load import load_kernels
from tests.support.kernel_choice import choose_kernels, code_paths

CPU = torch.device("cpu")

has_library = pytest.mark.skipif(not code_paths(), reason="no kernels in C++ for this processor")


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(code_path: str) -> None:
        raise BuildError("there is no compiler")

    monkeypatch.setattr(build_module, "build", build)


@has_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_best_code_path(dtype: torch.dtype, num_threads: int, caplog: pytest.LogCaptureFixture) -> None:
    with choose_kernels("default", num_threads):
        kernels = load_kernels(CPU, KernelOptions(dtype, max_num_rows=512))
    assert kernels.name == f"cpu {code_paths()[0]}"
    assert kernels.deterministic
    assert kernels.num_threads == num_threads
    assert not caplog.messages


@has_library
@pytest.mark.parametrize("name", code_paths())
def test_code_path(name: str) -> None:
    with choose_kernels(name):
        assert load_kernels(CPU, KernelOptions(torch.float32)).name == f"cpu {name}"


UNSUPPORTED = [
    (KernelOptions(torch.float16), "do not compute in float16"),
    (KernelOptions(torch.float32, head_dims=frozenset({40, 64})), "multiple of 16 up to 576, not 40"),
    (KernelOptions(torch.float32, head_dims=frozenset({592})), "multiple of 16 up to 576, not 592"),
    (KernelOptions(torch.float32, block_size=8), "--block-size of .*, not 8"),
    (KernelOptions(torch.float32, block_size=48), "--block-size of .*, not 48"),
    (KernelOptions(torch.float32, block_size=512), "--block-size of .*, not 512"),
]


@pytest.mark.parametrize(("options", "reason"), UNSUPPORTED)
def test_what_they_lack_is_said_and_done_by_torch(
    options: KernelOptions, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    kernels = load_kernels(CPU, options)
    assert kernels.name == "torch"
    assert kernels.keep_packed == frozenset()
    (message,) = caplog.messages
    assert re.match(f"using the slower plain torch kernels: .*{reason}", message)


def test_without_a_compiler(no_compiler: None, caplog: pytest.LogCaptureFixture) -> None:
    assert load_kernels(CPU, KernelOptions(torch.bfloat16)).name == "torch"
    (message,) = caplog.messages
    assert message.endswith("kernels: there is no compiler")


@has_library
def test_a_library_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(build_module, "build", lambda code_path: Path("/nonexistent/kernels.so"))
    assert load_kernels(CPU, KernelOptions(torch.bfloat16)).name == "torch"
    (message,) = caplog.messages
    assert "kernels: /nonexistent/kernels.so: cannot open shared object file" in message


def test_an_old_processor(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(processor, "cpu_flags", lambda: {"sse4_2", "avx"})
    assert load_kernels(CPU, KernelOptions(torch.bfloat16)).name == "torch"
    (message,) = caplog.messages
    assert message.endswith("kernels: this processor has no AVX2")


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        (KernelOptions(torch.bfloat16, quantization="int8"), "--quantization int8"),
        (KernelOptions(torch.bfloat16, kv_cache_dtype="int8"), "--kv-cache-dtype int8"),
    ],
)
def test_int8_is_not_left_out_in_silence(options: KernelOptions, flag: str, no_compiler: None) -> None:
    with pytest.raises(ValueError, match=f"{flag} needs the CPU or GPU kernels, but there is no compiler"):
        load_kernels(CPU, options)


def test_float8_needs_a_gpu() -> None:
    options = KernelOptions(torch.bfloat16, kv_cache_dtype="fp8")
    with pytest.raises(ValueError, match="--kv-cache-dtype fp8 needs the GPU kernels, but the device is a CPU, where"):
        load_kernels(CPU, options)


def test_what_stays_packed() -> None:
    """No weights, if the settings ask for number formats other than the checkpoint's own."""
    for quantization in ("none", "int8"):
        if quantization == "none" or code_paths():
            options = KernelOptions(torch.float32, quantization=quantization)
            assert load_kernels(CPU, options).keep_packed == frozenset()
    if code_paths():
        assert {"Q4_1", "Q6_K"} <= load_kernels(CPU, KernelOptions(torch.float32)).keep_packed


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_slots_for_adapters(name: str) -> None:
    with choose_kernels(name):
        assert load_kernels(CPU, KernelOptions(torch.float32)).new_lora_weights((5,), 7) is None
        kernels = load_kernels(CPU, KernelOptions(torch.float32, num_lora_slots=2, max_lora_rank=3))
    weights = kernels.new_lora_weights((5,), 7)
    assert weights is not None
    assert weights.a.shape == (2, 1, 3, 7)
