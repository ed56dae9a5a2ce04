"""Read the weights of a GGUF file. Their names are the same in all families, but for few that a family renames."""

import logging
import re
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path

import numpy as np
import torch

from engine.config import ModelConfig
from engine.shared.ggml import GGML_TYPES
from engine.shared.gguf import GGUFFile, TensorInfo
from engine.weights.layout import model_tensors
from engine.weights.packed import PackedTensor, Weight, cost_of_unpacking, dequantize

logger = logging.getLogger("lightwell.engine")

TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "token_embd_norm": "model.norm",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
}
LAYER_TENSOR_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_sinks": "self_attn.sinks",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_v_b": "self_attn.v_b_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_gate_up_exps": "mlp.experts.gate_up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
    "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "post_ffw_norm_2": "post_feedforward_layernorm_2",
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_ba": "linear_attn.in_proj_ba",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_dt": "linear_attn.dt",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
    "shortconv.conv": "conv.conv",
    "shortconv.in_proj": "conv.in_proj",
    "shortconv.out_proj": "conv.out_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
WHOLE_NAMES = {
    "attn_k_b.weight": "self_attn.k_b_proj.transposed",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    "layer_output_scale.weight": "layer_scalar",
    "ffn_gate_inp.scale": "mlp.gate.norm.weight",
    "ffn_down_exps.scale": "mlp.gate.expert_scales",
    "ssm_a": "linear_attn.negative_decay",
}
ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")  # read with the metadata


def load_gguf(
    path: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    progress: Callable[[int, int], None],
    vector_dtype: torch.dtype | None = None,
    keep_packed: frozenset[str] = frozenset(),
) -> Iterator[tuple[str, Weight]]:
    """Yield (name, weight) as `engine.weights.load_weights` describes. `progress` counts the bytes of the tensors."""
    # Not closed here: packed tensors are views of the mapped file, which is unmapped with the last of them.
    file = GGUFFile(path)
    if cost := cost_of_unpacking(file.tensors.values(), keep_packed, dtype):
        logger.info("%s", cost)
    num_bytes = sum(tensor.n_bytes for tensor in file.tensors.values())
    num_bytes_done = 0
    for tensor in file.tensors.values():
        try:
            yield from _load_tensor(file, tensor, config, dtype, vector_dtype or dtype, keep_packed)
        except (ValueError, NotImplementedError) as error:
            raise ValueError(f"{path}: {tensor.name}: {error}") from error
        num_bytes_done += tensor.n_bytes
        progress(num_bytes_done, num_bytes)


def least_gguf_bytes(path: Path) -> int:
    """Return the memory that the weights take at least: a byte for each number, or what they take in the file."""
    with GGUFFile(path) as file:
        return sum(min(tensor.n_bytes, prod(tensor.shape)) for tensor in file.tensors.values())


def _load_tensor(
    file: GGUFFile,
    tensor: TensorInfo,
    config: ModelConfig,
    dtype: torch.dtype,
    vector_dtype: torch.dtype,
    keep_packed: frozenset[str],
) -> Iterator[tuple[str, Weight]]:
    if tensor.name in ROPE_FACTORS or _predicts_later(tensor.name, config) or _has_halves(tensor.name, file):
        return
    name, data = huggingface_name(tensor.name), file.tensor_data(tensor)
    ggml_type = GGML_TYPES[tensor.ggml_type]
    is_vector = len(tensor.shape) == 1 or name.endswith((".bias", "conv1d.weight", "conv.conv.weight"))
    shape = tensor.shape if len(tensor.shape) < 3 else (prod(tensor.shape[:-1]), tensor.shape[-1])
    weight: Weight
    if ggml_type.name in keep_packed and len(shape) == 2 and not is_vector:
        weight = PackedTensor(ggml_type.name, (shape[0], shape[1]), np.frombuffer(data, dtype=np.uint8))
    else:
        weight = dequantize(data, ggml_type, shape, vector_dtype if is_vector else dtype)
    yield from model_tensors(name, weight, config, config.weight_layout)


def _has_halves(name: str, file: GGUFFile) -> bool:
    """Return whether a tensor is in the file a second time, as two: DeepSeek's of ik_llama.cpp have all three."""
    half = name.replace(".attn_kv_b.", ".attn_k_b.")
    return half != name and half in file.tensors


def _predicts_later(name: str, config: ModelConfig) -> bool:
    """Return whether a tensor belongs to the layers that predict later tokens."""
    match = re.match(r"blk\.(\d+)\.", name)
    return match is not None and 0 <= int(match[1]) - config.num_hidden_layers < config.num_ignored_layers


def huggingface_name(name: str) -> str:
    """Translate a GGUF tensor name: `blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`.

    Raises ValueError for a name that no supported model has.
    """
    if (match := re.fullmatch(r"blk\.(\d+)\.([\w.]+)", name)) and match[2] in WHOLE_NAMES:
        return f"model.layers.{match[1]}.{WHOLE_NAMES[match[2]]}"
    stem, _, kind = name.rpartition(".")
    if kind in ("weight", "bias"):
        if stem in TENSOR_NAMES:
            return f"{TENSOR_NAMES[stem]}.{kind}"
        match = re.fullmatch(r"blk\.(\d+)\.([\w.]+)", stem)
        if match and match[2] in LAYER_TENSOR_NAMES:
            return f"model.layers.{match[1]}.{LAYER_TENSOR_NAMES[match[2]]}.{kind}"
        if match := re.fullmatch(r"blk\.(\d+)\.ffn_(gate|up|down)\.(\d+)", stem):  # files of 2023
            return f"model.layers.{match[1]}.mlp.experts.{match[3]}.{match[2]}_proj.{kind}"
    raise ValueError("no supported model has such a tensor")
