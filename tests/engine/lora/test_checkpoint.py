"""LoRA adapters in files that are huge, are not regular files, or change while they are read: each is a ValueError."""

import json
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import Linear
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

from engine.config import load_model_config
from engine.lora.checkpoint import module_shapes
from engine.lora.reader import load_lora
from tests.engine.lora.test_gguf_reader import GGUF_A, GGUF_B, gguf_tensors, write_adapter
from tests.support.lora_files import CONFIG, FIELDS, MODULES, A, B, Tensors, refusal_of, small_adapter, write_folder
from tests.support.model_configs import llama_config

FORMS = ["safetensors", "gguf"]


def write(form: str, folder: Path, tensors: Tensors) -> tuple[Path, Path]:
    """Write an adapter. Return its path and that of the file with its tensors."""
    if form == "gguf":
        path = write_adapter(folder / "adapter.gguf", gguf_tensors(tensors))
        return path, path
    rank = next(iter(tensors.values())).shape[0]
    return write_folder(folder / "adapter", tensors, r=rank), folder / "adapter" / "adapter_model.safetensors"


# Too large.


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("max_rank", [None, 16])
def test_a_file_that_goes_on_for_long(form: str, max_rank: int | None, tmp_path: Path) -> None:
    adapter, path = write(form, tmp_path, small_adapter())
    os.truncate(path, 200 * 2**30)
    with pytest.raises(ValueError, match=rf"{path.name}: (not a valid safetensors file .*|has )214748364800\b"):
        load_lora(adapter, CONFIG, max_rank)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "adapter.gguf"])
def test_nothing_but_zeros(name: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    (folder / name).write_bytes(b"")
    os.truncate(folder / name, 2**42)
    with pytest.raises(ValueError, match=rf"{name}: (not a valid safeten|has 4398046511104 bytes, more|not a GGUF)"):
        load_lora(folder / name if name.endswith("gguf") else folder, CONFIG, 16)


def test_a_rank_of_a_billion(tmp_path: Path) -> None:
    """The file is as long as its header says, and holds only zeros."""
    rank = 10**9
    sizes = [128 * rank, 192 * rank]
    header = {
        A: {"dtype": "F32", "shape": [rank, 32], "data_offsets": [0, sizes[0]]},
        B: {"dtype": "F32", "shape": [48, rank], "data_offsets": [sizes[0], sum(sizes)]},
    }
    folder = write_folder(tmp_path, r=rank)
    text = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(folder / "adapter_model.safetensors", 8 + len(text) + sum(sizes))
    with pytest.raises(ValueError, match="rank 1000000000 is more than the 16 of --max-lora-rank"):
        load_lora(folder, CONFIG, 16)
    with pytest.raises(
        ValueError, match=r"adapter_model\.safetensors: has 320000000\d+ bytes, but adapters of this model"
    ):
        load_lora(folder, CONFIG)


@pytest.mark.parametrize("form", FORMS)
def test_the_rank_is_checked_before_the_numbers(form: str, tmp_path: Path) -> None:
    whole = small_adapter(3)
    adapter, path = write(form, tmp_path, whole | {A: whole[A] * torch.nan})
    with pytest.raises(ValueError, match=rf"{path.name}: rank 3 is more than the 2 of --max-lora-rank"):
        load_lora(adapter, CONFIG, 2)
    for max_rank in (3, None):
        with pytest.raises(ValueError, match="holds numbers that are infinite or not a number"):
            load_lora(adapter, CONFIG, max_rank)
    adapter, _ = write(form, tmp_path, whole)
    assert load_lora(adapter, CONFIG, 3).rank == load_lora(adapter, CONFIG).rank == 3


@pytest.mark.parametrize("max_rank", [200, None])
def test_the_largest_adapter_is_read(max_rank: int | None, tmp_path: Path) -> None:
    """The limit on the file's size is that of an adapter of all modules in float64, and 4 MiB for the header."""
    config = llama_config(**FIELDS | {"hidden_size": 320, "intermediate_size": 400})
    shapes = {"self_attn.q_proj": (96, 320), "self_attn.k_proj": (48, 320), "self_attn.v_proj": (48, 320)}
    shapes |= {"self_attn.o_proj": (320, 96), "mlp.gate_proj": (400, 320), "mlp.up_proj": (400, 320)}
    shapes |= {"mlp.down_proj": (320, 400)}
    tensors: Tensors = {}
    for name in MODULES:
        rows, columns = shapes[name.split(".", 3)[3]]
        rank = max_rank or min(rows, columns)
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.ones(rank, columns, dtype=torch.float64)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.ones(rows, rank, dtype=torch.float64)
    folder = write_folder(tmp_path, tensors, r=None)
    assert (folder / "adapter_model.safetensors").stat().st_size > 2**22
    assert len(load_lora(folder, config, max_rank).modules) == len(MODULES)

    largest = 2**22 + sum(tensor.nbytes for tensor in tensors.values())
    small = {GGUF_A: np.ones((2, 320), dtype=np.float32), GGUF_B: np.ones((48, 2), dtype=np.float32)}
    path = write_adapter(tmp_path / "adapter.gguf", small)
    os.truncate(path, largest)
    load_lora(path, config, max_rank)
    os.truncate(path, largest + 1)
    with pytest.raises(ValueError, match=rf"has {largest + 1} bytes, but adapters of this model at most {largest}"):
        load_lora(path, config, max_rank)


def test_long_headers(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    save_file(small_adapter(), folder / "adapter_model.safetensors", {"text": "x" * 2**22})
    assert "; at most 4194304 are allowed" in str(refusal_of(folder))
    tensors = gguf_tensors(small_adapter())
    path = write_adapter(tmp_path / "a.gguf", tensors, **{"general.description": "x" * 2**22})
    assert "string 0 is longer than the rest: the header may only reach byte 4194304" in str(refusal_of(path))


def test_long_names_make_no_long_messages(tmp_path: Path) -> None:
    name = "blk." + "x" * 10**6
    folder = write_folder(tmp_path, small_adapter() | {name: torch.ones(1)})
    path = write_adapter(tmp_path / "a.gguf", {"blk.short": np.ones(4, dtype=np.float32)})
    short_name, long_name = (struct.pack("<Q", len(text)) + text.encode() for text in ("blk.short", name))
    path.write_bytes(path.read_bytes().replace(short_name, long_name) + bytes(100))
    for adapter in (folder, path):
        refusal = refusal_of(adapter)
        assert refusal is not None
        assert "blk.xxx" in refusal
        assert len(refusal) < 600


# Not regular files.


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "adapter.gguf"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
@pytest.mark.parametrize("swapped", [False, True])
def test_paths_that_are_not_regular_files(
    name: str, kind: str, swapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If `swapped`, the path becomes a pipe, device or folder between the check and the opening."""
    folder = write_folder(tmp_path)
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    adapter = path if name.endswith("gguf") else folder
    if swapped:
        monkeypatch.setattr(Path, "is_dir", lambda self: self == folder)
        monkeypatch.setattr(Path, "is_file", lambda self: self != folder)
    with pytest.raises(ValueError, match=r"no such adapter|in this folder|is not a regular file|cannot be read"):
        load_lora(adapter, CONFIG)


# Files that change while they are read.

READER = """
import sys
from pathlib import Path
import msgspec
from engine.config import ModelConfig
from engine.lora.reader import load_lora

config = msgspec.json.decode(sys.argv[1], type=ModelConfig)
print("ready", flush=True)
outcomes = []
for _ in range(50):
    for path in sys.argv[2:]:
        try:
            load_lora(Path(path), config)
            outcomes.append("read")
        except ValueError as error:
            assert path in str(error), error
            outcomes.append("refused")
print(outcomes.count("read"), outcomes.count("refused"))
"""


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    """If the file were memory-mapped, SIGBUS would kill the process."""
    adapters = [write(form, tmp_path, small_adapter(2000)) for form in FORMS]
    contents = {path: path.read_bytes() for _, path in adapters}
    is_done = threading.Event()

    def rewrite(path: Path) -> None:
        data = contents[path]
        while not is_done.is_set():
            for length in (len(data) // 2, 100, 0):
                path.write_bytes(data)
                is_done.wait(0.0005)
                os.truncate(path, length)
            os.truncate(path, len(data))

    command = [sys.executable, "-c", READER, msgspec.json.encode(CONFIG).decode(), *(str(a) for a, _ in adapters)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
        writers = [threading.Thread(target=rewrite, args=[path]) for path in contents]
        for writer in writers:
            writer.start()
        try:
            output, errors = reader.communicate(timeout=60)
        finally:
            reader.kill()
            is_done.set()
            for writer in writers:
                writer.join()
    assert reader.returncode == 0, errors
    num_read, num_refused = map(int, output.split())
    assert num_read + num_refused == 100
    assert num_refused > 0


@pytest.mark.parametrize("q_lora_rank", [None, 24])
def test_shapes_of_latent_attention(q_lora_rank: int | None, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"kv_lora_rank": 8, "qk_nope_head_dim": 12, "qk_rope_head_dim": 4, "v_head_dim": 10}
    sizes |= {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4}
    values = DeepseekV2Config(
        **sizes, num_hidden_layers=1, first_k_dense_replace=1, q_lora_rank=q_lora_rank, vocab_size=64
    )
    values.save_pretrained(tmp_path)
    layer: Any = DeepseekV2ForCausalLM(values).model.layers[0]
    expected = {
        name: tuple(module.weight.shape) for name, module in layer.named_modules() if isinstance(module, Linear)
    }
    del expected["self_attn.kv_b_proj"]  # becomes a part of others
    assert module_shapes(load_model_config(tmp_path), 0) == expected
