"""Small random models of every family, made with transformers: the folder that it saves, and the model that it loads.

The values of the weights depend on the seed and on the tensors' names in the checkpoint, not on torch's generator:
the GGUF files in tests/parity/fixtures hold the same weights.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _pytest.mark import ParameterSet
from safetensors.numpy import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.utils import logging

VOCAB_SIZE = 288
Sizes = dict[str, Any]


class OneOf:
    """A value that is drawn, once for each model."""

    def __init__(self, *options: Any) -> None:
        self.options = options


def rope(rope_type: str = "default", **values: Any) -> Sizes:
    return {"rope_type": rope_type, **values} | {"rope_theta": values.get("rope_theta", OneOf(1e3, 1e4, 5e5))}


def yarn(**values: Any) -> Sizes:
    return rope("yarn", **values, factor=OneOf(4.0, 8.0), original_max_position_embeddings=OneOf(16, 32))


def longrope(num_factors: int, **values: Any) -> Sizes:
    short, long = ([OneOf(*options) for _ in range(num_factors)] for options in ((1.0, 1.25, 1.5), (2.0, 4.0, 7.5)))
    original = {"original_max_position_embeddings": 32}
    return original | {"rope_parameters": rope("longrope", **original, short_factor=short, long_factor=long, **values)}


def ropes(theta: Any = 1000.0, /, **full: Any) -> Sizes:
    """Return different rotations of layers with full attention and of those with windows."""
    sliding = {"rope_type": "default", "rope_theta": theta}
    return {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}


# Windows and original contexts are shorter than the prompts of the tests, and there are enough layers for all kinds.
HEAD_DIM, NUM_HEADS, WINDOW = OneOf(16, 32), OneOf(2, 3), OneOf(8, 20)
HEADS: Sizes = {"head_dim": HEAD_DIM}
FULL: Sizes = {"sliding_window": None}
LLAMA3: Sizes = {
    "rope_parameters": rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
    )
}
SCALED = {"beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3}
MINISTRAL3: Sizes = {"rope_parameters": yarn(beta_fast=OneOf(32.0, 4.0), **SCALED)}
QWEN3_MOE: Sizes = {"num_experts": OneOf(5, 8), "num_experts_per_tok": 2, "moe_intermediate_size": OneOf(24, 32)}
# Dense layers between; the router does not renormalise.
MIXED: Sizes = {"norm_topk_prob": False, "mlp_only_layers": [0], "decoder_sparse_step": 2}
MIXTRAL: Sizes = {"num_local_experts": OneOf(4, 6), "num_experts_per_tok": 2}
OLMOE: Sizes = {"num_experts": OneOf(6, 8), "num_experts_per_tok": OneOf(2, 3), "intermediate_size": 24}
GEMMA: Sizes = {"hidden_size": 48, "num_attention_heads": 4, "tie_word_embeddings": True}
GEMMA |= {"head_dim": HEAD_DIM, "query_pre_attn_scalar": HEAD_DIM}
GEMMA2: Sizes = GEMMA | {"num_key_value_heads": 2, "sliding_window": WINDOW, "attn_logit_softcapping": 3.0}
GEMMA2 |= {"final_logit_softcapping": 5.0, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
GEMMA3: Sizes = GEMMA | {"num_key_value_heads": OneOf(1, 2), "num_hidden_layers": 7, "sliding_window": WINDOW}
GEMMA3 |= {"final_logit_softcapping": OneOf(None, 5.0)} | ropes(rope_type="linear", rope_theta=1e5, factor=8.0)
GEMMA4: Sizes = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
GEMMA4 |= {"num_hidden_layers": 6, "head_dim": 16, "global_head_dim": 32, "sliding_window": WINDOW}
GEMMA4 |= {"layer_types": 2 * ["sliding_attention", "sliding_attention", "full_attention"]}
GEMMA4 |= {"final_logit_softcapping": 5.0, "tie_word_embeddings": True}
GEMMA4 |= {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": VOCAB_SIZE}
GEMMA4 |= ropes(rope_type="proportional", rope_theta=1e5, partial_rotary_factor=0.25)
GEMMA4_E2B: Sizes = {"hidden_size_per_layer_input": 16, "num_kv_shared_layers": OneOf(2, 3)}
GEMMA4_E2B |= {"use_double_wide_mlp": True, "num_key_value_heads": 1}
GEMMA4_31B: Sizes = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
GEMMA4_EXPERTS: Sizes = {"num_experts": OneOf(4, 6), "top_k_experts": 2, "moe_intermediate_size": 24}
GEMMA4_EXPERTS |= {"enable_moe_block": True}
GPT_OSS: Sizes = {"intermediate_size": 24, "num_local_experts": OneOf(4, 6), "num_experts_per_tok": 2}
GPT_OSS |= {"sliding_window": WINDOW, "tie_word_embeddings": False}
GPT_OSS |= {"rope_parameters": yarn(beta_fast=32.0, beta_slow=1.0, truncate=False)}
PHI3: Sizes = {"rope_parameters": rope(original_max_position_embeddings=256, partial_rotary_factor=1.0)}
PHI3 |= {"original_max_position_embeddings": 256}
THETA = OneOf(1e3, 5e5)
OLMO3 = ropes(THETA, **yarn(beta_fast=32.0, beta_slow=1.0, rope_theta=THETA))
GRANITE: Sizes = {"embedding_multiplier": 3.0, "attention_multiplier": 0.4, "residual_multiplier": 0.6}
GRANITE |= {"logits_scaling": 2.5}
GRANITE4: Sizes = {"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 56}
GRANITE4 |= {"layer_types": 4 * ["attention"], "position_embedding_type": "rope"}
GRANITE4 |= {"mamba_n_heads": 4, "mamba_d_state": 16}
GLM4: Sizes = {"rope_parameters": rope(partial_rotary_factor=0.5)}
COHERE2: Sizes = {"num_hidden_layers": 5, "layer_norm_eps": OneOf(1e-5, 1e-3), "sliding_window": WINDOW}
COHERE2 |= {"logit_scale": 0.3, "rotary_pct": 1.0, "tie_word_embeddings": True, "rms_norm_eps": ...}
EXAONE4: Sizes = {"num_hidden_layers": 5, "sliding_window": WINDOW, "sliding_window_pattern": 4}
LATENT: Sizes = {"hidden_size": 48, "num_attention_heads": NUM_HEADS, "num_key_value_heads": NUM_HEADS}
LATENT |= {"q_lora_rank": OneOf(16, 24), "kv_lora_rank": OneOf(16, 32), "qk_nope_head_dim": OneOf(16, 32)}
LATENT |= {"qk_rope_head_dim": OneOf(16, 32), "v_head_dim": OneOf(16, 32), "n_shared_experts": OneOf(1, 2)}
LATENT |= {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT |= {"routed_scaling_factor": 1.7, "first_k_dense_replace": 1}
LATENT_YARN: Sizes = {"rope_parameters": yarn(beta_fast=32.0, beta_slow=1.0, mscale=0.707, mscale_all_dim=0.707)}
GREEDY: Sizes = {"topk_method": "greedy"}
GLM4_ROUTER: Sizes = {"norm_topk_prob": True, "n_group": 1, "topk_group": 1, "scoring_func": "sigmoid"}
DELTA: Sizes = {"linear_num_key_heads": OneOf(1, 2), "linear_num_value_heads": OneOf(2, 4)}
DELTA |= {"linear_key_head_dim": OneOf(16, 32), "linear_value_head_dim": OneOf(16, 64)}
DELTA |= {"linear_conv_kernel_dim": OneOf(2, 4), "head_dim": OneOf(32, 64)}
QWEN35: Sizes = {"rope_parameters": rope(partial_rotary_factor=0.25, mrope_section=[2, 1, 1], mrope_interleaved=True)}
QWEN35 |= {
    "hidden_size": OneOf(32, 48),
    "layer_types": ["linear_attention"] * 2 + ["full_attention", "linear_attention"],
}
SHARED_EXPERT: Sizes = {"num_experts": OneOf(4, 6), "num_experts_per_tok": 2, "moe_intermediate_size": OneOf(24, 32)}
SHARED_EXPERT |= {"shared_expert_intermediate_size": OneOf(24, 40)}
QWEN3_NEXT: Sizes = {"rope_parameters": rope(partial_rotary_factor=0.25)}
LFM2: Sizes = {"layer_types": ["conv", "full_attention", "conv", "conv"], "conv_L_cache": OneOf(2, 3, 4)}
LFM2 |= {"block_multiple_of": 16, "conv_bias": False, "norm_eps": OneOf(1e-5, 1e-3), "rms_norm_eps": ...}
LFM2_MOE: Sizes = {"num_experts": OneOf(4, 6), "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LFM2_MOE |= {"num_dense_layers": 1, "routed_scaling_factor": 1.0}


@dataclass(frozen=True)
class Family:
    """One row of the table: how a small model of a family, or of a variant of it, is made."""

    model_type: str  # of config.json
    gguf_architecture: str | None  # general.architecture of the converted file; None: there is no such file
    parts: Sequence[Sizes] = ()  # of the configuration, beside what all have; a later one replaces what is in others
    first: Any = ()  # what of them is drawn before what all have
    wrapper: str = ""  # model_type of the multimodal model around it
    lengths: tuple[int, ...] = (1, 23, 70)  # of prompts
    not_in_gguf: tuple[str, ...] = ()  # fields of config.json that the GGUF file cannot express: None there


FAMILIES = {
    "llama2": Family("llama", "llama", [HEADS]),
    "llama3": Family("llama", "llama", [HEADS, LLAMA3]),
    "llama_biases": Family("llama", "llama", [HEADS, {"attention_bias": True, "mlp_bias": True}]),
    "llama_odd": Family("llama", "llama", [{"head_dim": OneOf(8, 24), "hidden_size": 36, "intermediate_size": 44}]),
    "mistral": Family("mistral", "llama", [HEADS, {"sliding_window": WINDOW}], not_in_gguf=("sliding_window",)),
    "mistral_full": Family("mistral", "llama", [HEADS, FULL]),
    "ministral3": Family("ministral3", "mistral3", [HEADS, FULL, MINISTRAL3], MINISTRAL3),
    "mistral3": Family("ministral3", "mistral3", [HEADS, FULL, MINISTRAL3], MINISTRAL3, wrapper="mistral3"),
    "mistral3_small": Family("mistral", "mistral3", [HEADS, FULL], wrapper="mistral3"),
    "qwen2": Family("qwen2", "qwen2"),
    "qwen3": Family("qwen3", "qwen3", [HEADS]),
    "qwen3_odd": Family("qwen3", "qwen3", [HEADS, {"head_dim": OneOf(8, 24), "attention_bias": True}]),
    "qwen3_yarn": Family("qwen3", "qwen3", [HEADS, {"rope_parameters": yarn()}]),
    "qwen3_moe": Family("qwen3_moe", "qwen3moe", [HEADS, QWEN3_MOE, {"norm_topk_prob": True}], QWEN3_MOE),
    "qwen3_moe_mixed": Family("qwen3_moe", None, [HEADS, QWEN3_MOE, MIXED], QWEN3_MOE),
    "qwen3_5": Family("qwen3_5_text", "qwen35", [DELTA, QWEN35], DELTA),
    "qwen3_5_vision": Family("qwen3_5_text", None, [DELTA, QWEN35], DELTA, wrapper="qwen3_5"),
    "qwen3_5_moe": Family("qwen3_5_moe_text", "qwen35moe", [DELTA, QWEN35, SHARED_EXPERT], DELTA),
    "qwen3_next": Family("qwen3_next", "qwen3next", [DELTA, QWEN3_NEXT, SHARED_EXPERT], DELTA),
    "lfm2": Family("lfm2", "lfm2", [LFM2], LFM2),
    "lfm2_moe": Family("lfm2_moe", "lfm2moe", [LFM2, LFM2_MOE], LFM2_MOE),
    "mixtral": Family("mixtral", "llama", [HEADS, MIXTRAL, FULL, {"intermediate_size": 24}], MIXTRAL),
    "olmoe": Family("olmoe", "olmoe", [OLMOE, {"norm_topk_prob": False, "rms_norm_eps": 1e-5}], OLMOE),
    "gemma2": Family("gemma2", "gemma2", [GEMMA2], HEAD_DIM),
    "gemma3_text": Family("gemma3_text", "gemma3", [GEMMA3], HEAD_DIM),
    # The attention's scale is not that of the head size. GGUF tells it by the number of layers, 62.
    "gemma3_27b": Family("gemma3_text", None, [GEMMA3, {"query_pre_attn_scalar": 24}], HEAD_DIM),
    "gemma3": Family("gemma3_text", "gemma3", [GEMMA3], HEAD_DIM, wrapper="gemma3"),
    "gemma4_e2b": Family("gemma4_text", "gemma4", [GEMMA4, GEMMA4_E2B]),
    "gemma4_31b": Family("gemma4_text", "gemma4", [GEMMA4, GEMMA4_31B]),
    "gemma4_26b_a4b": Family("gemma4_text", "gemma4", [GEMMA4, GEMMA4_31B, GEMMA4_EXPERTS], GEMMA4_EXPERTS),
    "gemma4": Family("gemma4_text", "gemma4", [GEMMA4, GEMMA4_E2B], wrapper="gemma4"),
    "gpt_oss": Family("gpt_oss", "gpt-oss", [HEADS, GPT_OSS]),
    "gpt_oss_mxfp4": Family(  # multiples of a block of MXFP4
        "gpt_oss", "gpt-oss", [HEADS, GPT_OSS, {"hidden_size": 64, "intermediate_size": 32}]
    ),
    "phi3": Family("phi3", "phi3", [PHI3], PHI3),
    "phi3_window": Family("phi3", "phi3", [PHI3, {"sliding_window": WINDOW}], PHI3),
    "phi3_longrope": Family("phi3", "phi3", [longrope(8)], lengths=(40, 70)),
    "phi4_mini": Family("phi3", "phi3", [longrope(6, partial_rotary_factor=0.75)], lengths=(40, 70)),
    "olmo2": Family("olmo2", "olmo2"),
    "olmo3": Family("olmo3", "olmo2", [{"sliding_window": WINDOW}, OLMO3], THETA),
    "granite": Family("granite", "granite", [GRANITE]),
    "granite4": Family("granitemoehybrid", "granite", [GRANITE, GRANITE4]),
    "smollm3": Family("smollm3", "smollm3", [{"num_hidden_layers": 5, "use_sliding_window": False}]),
    "glm4": Family("glm4", "glm4", [HEADS, GLM4, {"attention_bias": True}], GLM4),
    "cohere2": Family("cohere2", "cohere2", [COHERE2]),
    "exaone4": Family("exaone4", "exaone4", [HEADS, EXAONE4]),
    "exaone4_full": Family("exaone4", "exaone4", [HEADS, LLAMA3, FULL, {"layer_types": 4 * ["full_attention"]}]),
    "ernie4_5": Family("ernie4_5", "ernie4_5", [HEADS, {"use_bias": OneOf(True, False)}]),
    "deepseek_v2_lite": Family(
        "deepseek_v2", "deepseek2", [LATENT, LATENT_YARN, GREEDY, {"q_lora_rank": None}], [LATENT_YARN, NUM_HEADS]
    ),
    "deepseek_v2": Family("deepseek_v2", "deepseek2", [LATENT, GREEDY], NUM_HEADS),
    "glm4_moe_lite": Family("glm4_moe_lite", "deepseek2", [LATENT, GLM4_ROUTER], NUM_HEADS),
}


# Together they have every kind of layer: windows, sinks, experts in all their forms, latent attention, inputs for each
# layer, shared keys and values, parallel blocks, fused matrices, norms of heads and after blocks, and factors.
EIGHT = ("qwen3_moe", "gemma4_e2b", "gemma4_26b_a4b", "gpt_oss", "phi4_mini", "granite", "cohere2", "glm4_moe_lite")


def some_families(*more: str, names: Iterable[str] = FAMILIES) -> list[ParameterSet]:
    """Return rows of the table as parameters of a test: EIGHT and `more`, the others in long runs."""
    return [pytest.param(name, marks=[] if name in EIGHT + more else pytest.mark.long) for name in names]


def sizes_of(family: Family, key: str) -> Sizes:
    """Return the drawn fields of config.json; a key always gives the same draws."""
    generator = generator_of(key)

    def draw(*options: Any) -> Any:
        return options[int(generator.integers(len(options)))]

    @cache
    def draw_once(value: OneOf) -> Any:
        return draw(*value.options)

    def fill_in(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: fill_in(each) for name, each in value.items() if each is not ...}
        if isinstance(value, list | tuple):
            return [fill_in(each) for each in value]
        return draw_once(value) if isinstance(value, OneOf) else value

    fill_in(family.first)
    num_kv_heads = draw(1, 2, 3)
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "hidden_size": 48 if num_kv_heads == 3 else draw(32, 48),
        "intermediate_size": draw(40, 56, 64),
        "num_hidden_layers": 4,
        "num_attention_heads": num_kv_heads * (draw(2, 4) if num_kv_heads == 1 else draw(1, 2)),
        "num_key_value_heads": num_kv_heads,
        "max_position_embeddings": 256,
        "tie_word_embeddings": draw(True, False),
        "rms_norm_eps": draw(1e-6, 1e-5, 1e-3),
        "rope_parameters": {"rope_type": "default", "rope_theta": draw(1e3, 1e4, 5e5)},
    }
    given = {name for part in family.parts for name in part}
    if not given & {"head_dim", "hidden_size"}:  # of families without head_dim, the heads are as wide as the model
        sizes["hidden_size"] = 16 * sizes["num_attention_heads"]
    for part in family.parts:
        sizes = {name: each for name, each in sizes.items() if part.get(name) is not ...} | fill_in(part)
    return sizes


def family_config(name: str, seed: int = 0) -> tuple[Any, Any]:
    """Return the class of transformers that makes a row's model, and the configuration of it."""
    family = FAMILIES[name]
    values = sizes_of(family, f"{name} {seed}")
    if not family.wrapper:
        return AutoModelForCausalLM, CONFIG_MAPPING[family.model_type](**values)
    return AutoModelForImageTextToText, wrapped(family.wrapper, values | {"model_type": family.model_type})


def save_family_model(name: str, folder: Path, seed: int = 0) -> PreTrainedModel:
    """Save a small model with random weights as checkpoints of the family are; return what transformers loads."""
    return save_model(*family_config(name, seed), folder, seed, in_mxfp4=name == "gpt_oss_mxfp4")


def save_variant(values: dict[str, Any], folder: Path, seed: int = 0) -> PreTrainedModel:
    """Save a small model with random weights, as a config.json with just these values describes it."""
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return save_model(
        AutoModelForCausalLM, AutoConfig.from_pretrained(folder), folder, seed, written=json.dumps(values)
    )


def save_model(
    auto: Any, config: Any, folder: Path, seed: int, *, written: str = "", in_mxfp4: bool = False
) -> PreTrainedModel:
    """Save a model with random weights, with `written` in place of what transformers makes of its config.json."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    auto.from_config(config).save_pretrained(folder)
    if written:
        (folder / "config.json").write_text(written)
    path = folder / "model.safetensors"
    tensors = {key: fill(f"{seed} {key}", value.shape) for key, value in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    if in_mxfp4:
        store_experts_in_mxfp4(folder, generator_of(f"{seed} experts"))
    model: PreTrainedModel = auto.from_pretrained(folder, dtype=torch.float32).eval()
    return model


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
        shape = (num_experts, num_outputs, size // 32)
        tensors[f"{name}_blocks"] = generator.integers(256, size=(*shape, 16), dtype=np.uint8)
        tensors[f"{name}_scales"] = generator.integers(122, 125, size=shape, dtype=np.uint8)
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    modules = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": modules}
    (folder / "config.json").write_text(json.dumps(config))


def generator_of(key: str) -> np.random.Generator:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=seed))


def fill(key: str, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return random values large enough to affect outputs, and away from the neutral values of norms and biases.

    They are multiples of a power of two, so that they are exact in bfloat16 and that the fixtures compress well.
    """
    noise = generator_of(key).standard_normal(shape)
    mean, deviation = 0.0, 0.5
    if key.endswith(("norm.weight", "norm_1.weight", "norm_2.weight", "scale", "layer_scalar")):
        mean, deviation = 1.0, 0.25
    elif len(shape) > 1 and "embed_tokens" not in key:
        deviation = 1.5 / shape[-1] ** 0.5
    step = 2.0 ** (np.floor(np.log2(deviation)) - 4)
    values = step * np.round((mean + deviation * np.clip(noise, -3, 3)) / step)
    return np.asarray(values, dtype=np.float32)


def wrapped(model_type: str, text_config: dict[str, Any]) -> Any:
    """Return the configuration of a multimodal model with a very small vision part."""
    vision = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1)
    vision |= dict.fromkeys(("hidden_size", "intermediate_size", "head_dim"), 16) | {"image_size": 28, "patch_size": 14}
    tied = text_config["tie_word_embeddings"]
    config_class: Any = CONFIG_MAPPING[model_type]
    return config_class(text_config=text_config, vision_config=vision, tie_word_embeddings=tied)


def read_config(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return values
