"""What happens once when the engine starts: warm-up, fingerprint, and a log of the configuration."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from engine.config import EngineConfig, ModelConfig
from engine.core import WARM_UP, Engine
from engine.loading import LoadedModel, Progress
from engine.model.memory_plan import MIB
from engine.runner import ModelRunner
from engine.shared.gguf import split_paths
from engine.shared.messages import EngineInfo, ReasoningLimit, SamplingParams, Submit

logger = logging.getLogger("lightwell.engine")

WARM_UP_SAMPLING = SamplingParams(  # runs all kernels of a sampler
    max_tokens=2,
    ignore_eos=True,
    temperature=1.0,
    top_p=0.9,
    repetition_penalty=1.1,
    logit_bias={0: 1.0},
    reasoning_limit=ReasoningLimit(max_tokens=0, start_id=0, end_id=0, is_open=True),  # masks the first token
)
MAX_CAPTURE_SECONDS = 60.0  # about 1 s, unless kernels for sizes of batches have to be compiled
FINGERPRINT_BYTES = 1024 * 1024  # read at the start, the middle and the end of each weight file


def engine_info(loaded: LoadedModel, model_path: str) -> EngineInfo:
    """Return the description of the engine that API processes receive when it is ready."""
    deterministic = loaded.runner.kernels.deterministic
    num_ranks = loaded.num_ranks  # whose parts are of about the same size
    return EngineInfo(
        pid=os.getpid(),
        max_model_len=loaded.limits.max_model_len,
        max_num_seqs=loaded.limits.max_num_seqs,
        block_size=loaded.memory.block_size,
        num_blocks=loaded.memory.num_blocks,
        vocab_size=loaded.config.num_token_ids,
        device=str(loaded.device),
        dtype=str(loaded.dtype).removeprefix("torch."),
        kernels=loaded.runner.kernels.name,
        deterministic=deterministic,
        fingerprint=fingerprint(model_path, loaded),
        max_loras=loaded.adapters.max_loras,
        max_num_batched_tokens=loaded.limits.max_num_batched_tokens,
        num_ranks=num_ranks,
        weight_bytes=num_ranks * loaded.weight_bytes,
        kv_cache_bytes=num_ranks * loaded.memory.kv_cache_bytes,
        num_states=loaded.memory.num_states,
        state_bytes=num_ranks * loaded.memory.state_bytes,
        activation_bytes=num_ranks * loaded.memory.activation_bytes,
    )


def fingerprint(model_path: str, loaded: LoadedModel) -> str:
    """Return a name for all that the output depends on: weights, versions, device, formats, kernels, invariance."""
    path = Path(model_path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [f for f in split_paths(path) if f.is_file()]
    digest = hashlib.sha256()
    for file in files:  # size, header and a sample of the weights tell models apart
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as content:
            for offset in (0, size // 2, max(0, size - FINGERPRINT_BYTES)):
                content.seek(offset)
                digest.update(content.read(FINGERPRINT_BYTES))
    version = importlib.metadata.version("lightwell")
    dtype = str(loaded.dtype).removeprefix("torch.")
    kernels = loaded.runner.kernels
    digest.update(
        f"{version} {loaded.device.type} {dtype} {kernels.name} {kernels.formats} {torch.__version__}".encode()
    )
    mode = "invariant" if kernels.deterministic else "varying"
    ranks = f"tp{loaded.num_ranks}-" if loaded.num_ranks > 1 else ""
    return f"lightwell-{version}-{dtype}-{mode}-{ranks}{digest.hexdigest()[:12]}"


def describe_kinds(config: ModelConfig) -> list[str]:
    """Return how many layers there are of each kind of attention, of other mixers, and of experts, in words."""
    counts = Counter(attention.kind for attention in config.attentions.values())
    texts = [
        f"{count} with {kind.num_heads} attention heads and {kind.num_kv_heads} KV heads of {kind.head_dim}"
        + (f", window {kind.window}" if kind.window else "")
        for kind, count in counts.items()
    ]
    texts += [f"{count} with {mixer.description}" for mixer, count in Counter(config.mixers.values()).items()]
    routers = Counter(layer.experts.router for layer in config.layers if layer.experts is not None)
    return texts + [
        f"{count} with {router.num_experts} experts, of which {router.num_experts_per_tok} are active"
        for router, count in routers.items()
    ]


def log_plan(loaded: LoadedModel, config: EngineConfig) -> None:
    """Log one line each about model, device, number formats, memory and LoRA adapters."""
    memory, shape = loaded.memory, loaded.config
    logger.info(
        "model: %s, %s, %d layers (%s), context %d",
        Path(config.model_path).name,
        shape.architecture,
        shape.num_hidden_layers,
        "; ".join(describe_kinds(shape)),
        loaded.limits.max_model_len,
    )
    if config.data_parallel_size > 1:
        cpus = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        limit = "" if config.memory_limit is None else f", at most {config.memory_limit / MIB:.0f} MiB of memory"
        logger.info("engine %d of %d: CPUs %s%s", config.data_parallel_rank, config.data_parallel_size, cpus, limit)
    kernels = loaded.runner.kernels
    ranks = f"{loaded.num_ranks} ranks of " if loaded.num_ranks > 1 else ""
    logger.info("device: %s, %s%d threads, kernels: %s", loaded.device, ranks, kernels.num_threads, kernels.name)
    invariant = "the same in any batch" if kernels.deterministic else "NOT the same in any batch"
    logger.info("formats: %s; answers are %s", kernels.formats, invariant)
    states = memory.num_states * memory.state_bytes
    logger.info(
        "memory%s: weights %.0f MiB, %sKV cache %.0f MiB for %d tokens, or %.1f requests of full length%s%s",
        " of each rank" if ranks else "",
        loaded.weight_bytes / MIB,
        f"activations {memory.activation_bytes / MIB:.0f} MiB, " if memory.activation_bytes else "",
        (memory.kv_cache_bytes - states) / MIB,
        memory.num_tokens,
        memory.num_full_length_requests,
        f", and {states / MIB:.0f} MiB for {memory.num_states} states" if states else "",
        "; memory use grows up to that as requests are cached" if loaded.device.type == "cpu" else "",
    )
    adapters = loaded.adapters
    if adapters.max_loras:
        names = ", ".join(adapter.name for adapter in adapters.loaded()) or "none yet"
        size = (adapters.num_slots, adapters.max_rank, adapters.num_bytes / MIB)
        logger.info("LoRA adapters: %s; %d slots of rank %d, %.0f MiB", names, *size)


def process_age() -> float:
    """Return the seconds since this process was started."""
    with open("/proc/self/stat") as file:
        start_ticks = int(file.read().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start_ticks / os.sysconf("SC_CLK_TCK")


def warm_up(engine: Engine, max_model_len: int) -> None:
    """Run prompts and compute logits, so that one-time work such as compilation does not delay the first requests."""
    longest = max(1, max_model_len - WARM_UP_SAMPLING.max_tokens)
    rows = sorted({min(num, longest) for num in engine.runner.kernels.warm_up_rows})
    for number, params in enumerate([*[WARM_UP] * len(rows), WARM_UP_SAMPLING]):
        submit = Submit(
            request_id=f"warm-up {number}",
            prompt_token_ids=[0] * rows[min(number, len(rows) - 1)],
            params=params,
            arrival=time.monotonic(),
            cache_salt=str(number),  # all rows must be computed
        )
        engine.add(submit)
        while engine.has_work:  # two prompts together would have more rows
            engine.step()
    for num_rows in rows:
        if num_rows <= engine.scheduler.max_num_seqs:
            engine.runner.warm_up_logits(num_rows)


def capture_graphs(
    runner: ModelRunner, progress: Progress | None = None, clock: Callable[[], float] = time.monotonic
) -> None:
    """Capture CUDA graphs for at most MAX_CAPTURE_SECONDS; the engine captures what is left when it is idle.

    `progress` is called with the number of graphs that have been captured or given up, and the total; at the end, with
    the total twice.
    """
    end = clock() + MAX_CAPTURE_SECONDS
    num_graphs = num_left = len(runner.execution.uncaptured)
    while num_left and clock() < end:
        runner.capture_next()
        num_left = len(runner.execution.uncaptured)
        if progress is not None:
            progress(num_graphs - num_left, num_graphs)
    if num_left:
        if progress is not None:
            progress(num_graphs, num_graphs)
        logger.info("CUDA graphs: %d of %d are left for when the engine is idle", num_left, num_graphs)


def progress_bar(name: str, *, is_bytes: bool) -> Progress | None:
    """Return a progress callback that draws a bar of bytes or of items, or None if stderr is no terminal."""
    if not sys.stderr.isatty():
        return None
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    count = DownloadColumn() if is_bytes else MofNCompleteColumn()
    bar = Bar(TextColumn(name), BarColumn(), count, console=Console(stderr=True), transient=True)
    task = bar.add_task(name)

    def advance(num_done: int, num: int) -> None:
        bar.update(task, completed=num_done, total=num)
        bar.start()  # at the first call, because the kernels may have to be compiled before, which is logged
        if num_done == num:
            bar.stop()

    return advance
