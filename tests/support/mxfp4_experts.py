"""Give a saved gpt-oss model experts in MXFP4, as the hub's checkpoints have them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

BLOCK = 32  # values that share a scale


def store_experts_in_mxfp4(folder: Path, generator: np.random.Generator) -> None:
    """Replace the experts of a saved model by random MXFP4 blocks (pairs of values in a byte) and their scales.

    Blocks are [E, out, in / 32, 16] and scales, exponents of two plus 127, [E, out, in / 32].
    """
    path = folder / "model.safetensors"
    tensors: dict[str, Any] = {}
    for name, value in load_file(path).items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = value
            continue
        num_experts, size, num_outputs = value.shape
        shape = (num_experts, num_outputs, size // BLOCK)
        tensors[f"{name}_blocks"] = generator.integers(256, size=(*shape, BLOCK // 2), dtype=np.uint8)
        tensors[f"{name}_scales"] = generator.integers(122, 125, size=shape, dtype=np.uint8)
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    modules = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": modules}
    (folder / "config.json").write_text(json.dumps(config))
