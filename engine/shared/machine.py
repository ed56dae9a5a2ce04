"""What a machine has for the engine, as `python -m engine.doctor` reports it to `lightwell doctor`."""

import msgspec


class Gpu(msgspec.Struct, frozen=True):
    name: str
    num_bytes: int


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """A field about something that is missing is None."""

    processor: str
    has_avx2: bool
    num_cores: int  # that this process may use
    available_memory: int  # bytes
    torch: str | None  # version with its build, such as 2.9.1+cpu
    cuda: str | None  # version for which torch was built
    gpus: list[Gpu]
    triton_problem: str | None  # what Triton lacks to run, and how to get it
    compiler: str | None  # first line of its --version
    compiler_problem: str | None
    code_path: str | None  # of the compiled kernels
    kernel_problem: str | None  # why the compiled kernels cannot be used
