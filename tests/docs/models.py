"""The tables of docs/models.md: families and number formats, by what the engine and the tests have."""

from collections.abc import Iterator

from engine.config import FAMILIES, Family
from engine.kernels.cpu.weights import PACKED_TYPES as CPU_TYPES
from engine.parts.triton.packed_matrix import PACKED_TYPES as GPU_TYPES
from engine.shared.ggml import GGML_TYPES
from tests.support.family_models import FAMILIES as TESTED

MODELS = {  # model_type -> the models that people know
    "llama": "Llama 2 to 3.3, SmolLM 2, TinyLlama, R1-Distill-Llama",
    "mistral": "Mistral 7B, Nemo, Small 3; Devstral Small 1",
    "ministral3": "Ministral 3, Devstral Small 2",
    "mixtral": "Mixtral 8x7B and 8x22B",
    "qwen2": "Qwen 2, Qwen 2.5 and its Coder, R1-Distill-Qwen",
    "qwen3": "Qwen 3, 0.6B to 32B",
    "qwen3_moe": "Qwen 3 30B-A3B and 235B-A22B, Qwen 3 Coder 30B-A3B",
    "qwen3_5_text": "Qwen 3.5 and 3.6, dense",
    "qwen3_5_moe_text": "Qwen 3.5 and 3.6 with experts",
    "qwen3_next": "Qwen3-Next 80B-A3B",
    "lfm2": "LFM 2 and 2.5",
    "lfm2_moe": "LFM 2 8B-A1B and 24B-A2B",
    "olmoe": "OLMoE 1B-7B",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3, 270M to 27B",
    "gemma4_text": "Gemma 4 E2B, E4B, 26B-A4B, 31B",
    "gemma4_unified_text": "Gemma 4 12B; as GGUF, see `gemma4_text`",
    "gpt_oss": "gpt-oss 20B and 120B",
    "phi3": "Phi 3 mini and medium, Phi 3.5 mini, Phi 4, Phi 4 mini",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "granite": "Granite 3; Granite 4 as GGUF",
    "granitemoehybrid": "Granite 4 without Mamba layers and experts, such as micro",
    "smollm3": "SmolLM 3",
    "glm4": "GLM 4 9B and 32B (0414)",
    "cohere2": "Command R7B, Command A",
    "exaone4": "EXAONE 4",
    "ernie4_5": "ERNIE 4.5 0.3B",
    "deepseek_v2": "DeepSeek V2, V2-Lite, Coder V2",
    "glm4_moe_lite": "GLM 4.7 Flash",
}
ALWAYS_TRUE = {  # field of a family that is on -> what it means
    "v_norm": "norms of values",
    "has_sinks": "attention sinks",
    "local_theta": "rotary tables for each kind of layer",
    "is_latent": "latent attention (MLA)",
    "is_parallel": "attention and MLP in parallel",
    "has_gate": "gates of attention",
    "scales_embeddings": "scaled embeddings",
    "correction_bias": "bias of the choice of experts",
    "has_parallel_experts": "experts beside the MLP",
    "has_layer_scalars": "a factor for each layer",
}
BY_VALUE = {  # field -> value -> what it means
    "qkv_bias": {True: "biases on q, k and v"},
    "qk_norm": {"head": "norms of each head of q and k", "all": "norms of q and k over all heads"},
    "windows": {
        "all": "sliding window",
        "pattern": "sliding and global layers",
        "last": "sliding window in the last layers, if the file says so",
    },
    "no_rope": {
        "full": "no rotation in global layers",
        "mixed": "no rotation in global layers",
        "listed": "layers without rotation",
        "flagged": "rotation if the file says so",
    },
    "mixer": {"gated_delta_net": "gated delta nets in most layers", "short_conv": "short convolutions in most layers"},
    "norm": {"layer": "LayerNorm"},
    "logits": {"divided": "multipliers of embeddings, scores, residuals and logits", "multiplied": "scaled logits"},
    "activation": {"swigluoai": "clamped SwiGLU with biases"},
}
NOT_OF_WEIGHTS = ("Q8_1", "Q8_K")  # activations
NOT_READ = ("NVFP4", "Q1_0")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def families_table() -> str:
    """Return a table of the families: models, differences to Llama, GGUF architecture, tested models."""
    head = "| `model_type` | Models | Beyond Llama, or otherwise | GGUF | Tested models |"
    rows = [
        f"| `{family.model_type}` | {MODELS[family.model_type]} | {', '.join(differences(family)) or '-'} "
        f"| {f'`{family.gguf}`' if family.gguf else '-'} | {', '.join(tested_models(family)) or '-'} |"
        for family in FAMILIES
    ]
    return "\n".join([head, "|---|---|---|---|---|", *rows]) + "\n"


def differences(family: Family) -> Iterator[str]:
    """Yield what the entry of a family asks of the decoder."""
    for field, meanings in BY_VALUE.items():
        if meaning := meanings.get(getattr(family, field)):  # type: ignore[attr-defined]
            yield meaning
    yield from (meaning for field, meaning in ALWAYS_TRUE.items() if getattr(family, field))
    norms = family.norms
    if "post_attention_layernorm" in norms:
        yield "norms before and after attention and MLP" if "input_layernorm" in norms else "norms after, not before"
    if "attn_logit_softcapping" in family.defaults:
        yield "soft caps of scores and logits"
    if family.defaults.get("hidden_act") == "gelu_pytorch_tanh":
        yield "GELU"
    if "global_head_dim" in family.defaults:
        yield "head sizes by kind of layer"
    if family.defaults.get("hidden_size_per_layer_input"):
        yield "embeddings for each layer, shared keys and values"
    if share := family.defaults.get("partial_rotary_factor"):
        yield f"{'half' if share == 0.5 else 'a quarter'} of each head rotated"
    if family.layout.is_interleaved:
        yield "adjacent dimensions rotated"
    if family.defaults.keys() & EXPERTS:
        has_shared = family.has_shared_gate or "n_shared_experts" in family.defaults
        shared = " and shared experts" if has_shared else ""
        yield f"mixture of experts ({family.defaults.get('scoring_func', 'softmax')}){shared}"


def tested_models(family: Family) -> Iterator[str]:
    """Yield the small models of a family in the tests; those without a GGUF file are marked."""
    for name, model in TESTED.items():
        if model.model_type == family.model_type:
            yield f"`{name}`" if model.gguf_architecture else f"`{name}` (no GGUF)"


def formats_table() -> str:
    """Return a table of the types of GGUF files that hold weights in blocks."""
    lines = ["| Type | Bits a weight | CPU | GPU |", "|---|---|---|---|"]
    for ggml_type in GGML_TYPES.values():
        if ggml_type.block_size > 1 and ggml_type.name not in NOT_OF_WEIGHTS + NOT_READ:
            places = ["packed" if ggml_type.name in types else "unpacked" for types in (CPU_TYPES, GPU_TYPES)]
            bits = 8 * ggml_type.type_size / ggml_type.block_size
            lines.append(f"| {ggml_type.name} | {bits:.4g} | {' | '.join(places)} |")
    return "\n".join(lines) + "\n"
