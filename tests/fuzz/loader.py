"""A process that loads models for tests, each in a child of its own: `python -m tests.fuzz.loader`.

It reads a path per line and writes a JSON object per line: {"loaded": true}, {"refused": message} or {"failed": how}.
A child gets `MAX_SECONDS` of a processor, and `MAX_BYTES` of memory beyond those of this process with its libraries.
"""

import json
import os
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from engine.config import EngineConfig, load_model_config
from engine.core import BrokenDeviceError, Engine
from engine.loading import LoadedModel, load_model
from engine.startup import warm_up
from server.constrained import grammars  # noqa: F401  (the API process has it too)
from server.models.served_model import make_chat_template
from server.text.tokenizer import Tokenizer

MAX_SECONDS = 10
MAX_WAIT = 120  # seconds; ends hangs, since other jobs on the machine can make loading slow
MAX_BYTES = 256 << 20
KV_CACHE_BYTES = 16 << 20
WEIGHT_BYTES = 16 << 20  # no model of the tests has more
MAX_REPORT = 4000  # characters of what a child that ends by itself writes to standard error

Use = Callable[[EngineConfig, LoadedModel], None]


def load(path: Path, use: Use) -> None:
    """Load a model as the API process and the engine do, and use it. Raises ValueError if it is refused."""
    tokenizer = Tokenizer.from_model(path)
    tokenizer.decode(tokenizer.encode("Hello <|im_end|> 123 Ö"))
    template = make_chat_template(tokenizer, None)
    if template is not None:
        template.render([{"role": "user", "content": "Hello"}])
    load_model_config(path)
    adapters = {"adapter": str(path / "adapter")} if (path / "adapter").is_dir() else {}
    config = EngineConfig(
        model_path=str(path),
        kv_cache_memory=KV_CACHE_BYTES,
        max_num_seqs=4,
        device="cpu",
        lora_modules=adapters,
        max_loras=len(adapters),
    )
    use(config, load_model(config))


def generate_a_token(config: EngineConfig, loaded: LoadedModel) -> None:
    warm_up(Engine(config, loaded), loaded.limits.max_model_len)


def run_child(path: Path, use: Use, result: int) -> None:
    """Load a model in this process and use it, and write the result to a file descriptor."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + KV_CACHE_BYTES + WEIGHT_BYTES + MAX_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_SECONDS, MAX_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answer: dict[str, object]
    try:
        load(path, use)
        answer = {"loaded": True}
    except (ValueError, OSError) as error:  # as engine.process does
        answer = {"refused": str(error)}
    except BrokenDeviceError as error:  # weights and numbers may be such that logits are not finite, and nothing else
        answer = {"refused" if "are not finite" in str(error) else "failed": str(error)}
    except BaseException:
        answer = {"failed": traceback.format_exc()}
    os.write(result, json.dumps(answer).encode())


def load_in_child(path: Path, use: Use) -> dict[str, object]:
    """Load a model in a child process, use it and return the result."""
    reader, writer = os.pipe()
    with tempfile.TemporaryFile() as errors:
        pid = os.fork()
        if pid == 0:
            try:
                signal.alarm(MAX_WAIT)
                os.dup2(errors.fileno(), 2)
                run_child(path, use, writer)
            finally:
                os._exit(0)
        os.close(writer)
        data = b"".join(iter(lambda: os.read(reader, 1 << 16), b""))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.close(reader)
        result: dict[str, object] = json.loads(
            data or json.dumps({"failed": f"the process ended with status {status}"})
        )
        if "failed" in result:
            errors.seek(0)
            report = errors.read().decode(errors="replace")
            start = max(0, report.find("ERROR: AddressSanitizer"), report.find("runtime error:") - 200)
            result["failed"] = f"{result['failed']}\n{report[start : start + MAX_REPORT]}"
    return result


def main(use: Use = generate_a_token) -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(load_in_child(Path(line.rstrip("\n")), use)), flush=True)


if __name__ == "__main__":
    main()
