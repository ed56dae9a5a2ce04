"""Configurations of small models, one function for each family or variant; what may differ is drawn.

Windows and original contexts are shorter than the prompts of the tests, and there are enough layers for all kinds.
"""

from typing import Any, Protocol

Sizes = dict[str, Any]


class Draw(Protocol):
    """Draws one of its arguments."""

    def __call__(self, *options: Any) -> Any: ...


def base(draw: Draw) -> Sizes:
    """Return the sizes that all families have. Heads times head size need not be the hidden size."""
    num_kv_heads = draw(1, 2, 3)
    return {
        "hidden_size": 48 if num_kv_heads == 3 else draw(32, 48),
        "intermediate_size": draw(40, 56, 64),
        "num_hidden_layers": 4,
        "num_attention_heads": num_kv_heads * (draw(2, 4) if num_kv_heads == 1 else draw(1, 2)),
        "num_key_value_heads": num_kv_heads,
        "max_position_embeddings": 256,
        "tie_word_embeddings": draw(True, False),
        "rms_norm_eps": draw(1e-6, 1e-5, 1e-3),
        "rope_parameters": rope(draw),
    }


def rope(draw: Draw, rope_type: str = "default", **values: Any) -> Sizes:
    return {"rope_type": rope_type, "rope_theta": draw(1e3, 1e4, 5e5), **values}


def with_head_dim(draw: Draw) -> Sizes:
    return base(draw) | {"head_dim": draw(16, 32)}


def whole_heads(draw: Draw, head_dim: int = 16) -> Sizes:
    """Return sizes whose heads together are as wide as the hidden size, for families without head_dim."""
    sizes = base(draw)
    return sizes | {"hidden_size": head_dim * sizes["num_attention_heads"]}


def yarn(draw: Draw, **values: Any) -> Sizes:
    return rope(draw, "yarn", factor=draw(4.0, 8.0), original_max_position_embeddings=draw(16, 32), **values)


def llama3(draw: Draw) -> Sizes:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    return with_head_dim(draw) | {"rope_parameters": rope(draw, "llama3", **scaling)}


def llama_biases(draw: Draw) -> Sizes:
    return with_head_dim(draw) | {"attention_bias": True, "mlp_bias": True}


def llama_odd(draw: Draw) -> Sizes:
    return base(draw) | {"head_dim": draw(8, 24), "hidden_size": 36, "intermediate_size": 44}


def mistral(draw: Draw) -> Sizes:
    return with_head_dim(draw) | {"sliding_window": draw(8, 20)}


def mistral_full(draw: Draw) -> Sizes:
    return with_head_dim(draw) | {"sliding_window": None}


def ministral3(draw: Draw) -> Sizes:
    scaling = yarn(
        draw, beta_fast=draw(32.0, 4.0), beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.3
    )
    return with_head_dim(draw) | {"sliding_window": None, "rope_parameters": scaling}


def qwen3_odd(draw: Draw) -> Sizes:
    return with_head_dim(draw) | {"head_dim": draw(8, 24), "attention_bias": True}


def qwen3_yarn(draw: Draw) -> Sizes:
    return with_head_dim(draw) | {"rope_parameters": yarn(draw)}


def qwen3_moe(draw: Draw) -> Sizes:
    experts = {"num_experts": draw(5, 8), "num_experts_per_tok": 2, "moe_intermediate_size": draw(24, 32)}
    return with_head_dim(draw) | experts | {"norm_topk_prob": True}


def qwen3_moe_mixed(draw: Draw) -> Sizes:
    """Return the sizes of a model with dense layers between, whose router does not renormalise."""
    return qwen3_moe(draw) | {"norm_topk_prob": False, "mlp_only_layers": [0], "decoder_sparse_step": 2}


def mixtral(draw: Draw) -> Sizes:
    experts = {"num_local_experts": draw(4, 6), "num_experts_per_tok": 2}
    return with_head_dim(draw) | experts | {"sliding_window": None, "intermediate_size": 24}


def olmoe(draw: Draw) -> Sizes:
    experts = {"num_experts": draw(6, 8), "num_experts_per_tok": draw(2, 3), "intermediate_size": 24}
    return whole_heads(draw) | experts | {"norm_topk_prob": False, "rms_norm_eps": 1e-5}


def gemma2(draw: Draw) -> Sizes:
    head_dim = draw(16, 32)
    return base(draw) | {
        "hidden_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "query_pre_attn_scalar": head_dim,
        "sliding_window": draw(8, 20),
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }


def gemma3(draw: Draw) -> Sizes:
    head_dim = draw(16, 32)
    return base(draw) | {
        "hidden_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": draw(1, 2),
        "num_hidden_layers": 7,
        "head_dim": head_dim,
        "query_pre_attn_scalar": head_dim,
        "sliding_window": draw(8, 20),
        "final_logit_softcapping": draw(None, 5.0),
        "tie_word_embeddings": True,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 100000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
        },
    }


def gemma3_27b(draw: Draw) -> Sizes:
    """Return sizes whose attention scale is not that of the head size; GGUF tells it by the number of layers, 62."""
    return gemma3(draw) | {"query_pre_attn_scalar": 24}


def gemma4(draw: Draw) -> Sizes:
    return base(draw) | {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 6,
        "head_dim": 16,
        "global_head_dim": 32,
        "sliding_window": draw(8, 20),
        "layer_types": 2 * ["sliding_attention", "sliding_attention", "full_attention"],
        "final_logit_softcapping": 5.0,
        "tie_word_embeddings": True,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 288,
        "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "rope_theta": 100000.0, "partial_rotary_factor": 0.25},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
        },
    }


def gemma4_e2b(draw: Draw) -> Sizes:
    return gemma4(draw) | {
        "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": draw(2, 3),
        "use_double_wide_mlp": True,
        "num_key_value_heads": 1,
    }


def gemma4_31b(draw: Draw) -> Sizes:
    return gemma4(draw) | {"attention_k_eq_v": True, "num_global_key_value_heads": 1}


def gemma4_26b_a4b(draw: Draw) -> Sizes:
    experts = {"num_experts": draw(4, 6), "top_k_experts": 2, "moe_intermediate_size": 24}
    return gemma4_31b(draw) | experts | {"enable_moe_block": True}


def gpt_oss(draw: Draw) -> Sizes:
    return with_head_dim(draw) | {
        "intermediate_size": 24,
        "num_local_experts": draw(4, 6),
        "num_experts_per_tok": 2,
        "sliding_window": draw(8, 20),
        "tie_word_embeddings": False,
        "rope_parameters": yarn(draw, beta_fast=32.0, beta_slow=1.0, truncate=False),
    }


def gpt_oss_mxfp4(draw: Draw) -> Sizes:
    """Return sizes that are multiples of a block of MXFP4."""
    return gpt_oss(draw) | {"hidden_size": 64, "intermediate_size": 32}


def phi3(draw: Draw) -> Sizes:
    parameters = rope(draw, original_max_position_embeddings=256, partial_rotary_factor=1.0)
    return whole_heads(draw) | {"original_max_position_embeddings": 256, "rope_parameters": parameters}


def phi3_window(draw: Draw) -> Sizes:
    return phi3(draw) | {"sliding_window": draw(8, 20)}


def phi3_longrope(draw: Draw) -> Sizes:
    return whole_heads(draw) | longrope(draw, 8)


def phi4_mini(draw: Draw) -> Sizes:
    return whole_heads(draw) | longrope(draw, 6, partial_rotary_factor=0.75)


def longrope(draw: Draw, num_factors: int, **values: Any) -> Sizes:
    factors = {
        "short_factor": [draw(1.0, 1.25, 1.5) for _ in range(num_factors)],
        "long_factor": [draw(2.0, 4.0, 7.5) for _ in range(num_factors)],
    }
    original = {"original_max_position_embeddings": 32}
    return original | {"rope_parameters": rope(draw, "longrope", **original, **factors, **values)}


def olmo3(draw: Draw) -> Sizes:
    theta = draw(1e3, 5e5)
    return whole_heads(draw) | {
        "sliding_window": draw(8, 20),
        "rope_parameters": {
            "full_attention": yarn(draw, beta_fast=32.0, beta_slow=1.0) | {"rope_theta": theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": theta},
        },
    }


def granite(draw: Draw) -> Sizes:
    return whole_heads(draw) | {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.6,
        "logits_scaling": 2.5,
    }


def granite4(draw: Draw) -> Sizes:
    return granite(draw) | {
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 56,
        "layer_types": 4 * ["attention"],
        "position_embedding_type": "rope",
        "mamba_n_heads": 4,
        "mamba_d_state": 16,
    }


def smollm3(draw: Draw) -> Sizes:
    return whole_heads(draw) | {"num_hidden_layers": 5, "use_sliding_window": False}


def glm4(draw: Draw) -> Sizes:
    parameters = rope(draw, partial_rotary_factor=0.5)
    return with_head_dim(draw) | {"attention_bias": True, "rope_parameters": parameters}


def cohere2(draw: Draw) -> Sizes:
    sizes = whole_heads(draw) | {
        "num_hidden_layers": 5,
        "layer_norm_eps": draw(1e-5, 1e-3),
        "sliding_window": draw(8, 20),
        "logit_scale": 0.3,
        "rotary_pct": 1.0,
        "tie_word_embeddings": True,
    }
    del sizes["rms_norm_eps"]
    return sizes


def exaone4(draw: Draw) -> Sizes:
    return with_head_dim(draw) | {"num_hidden_layers": 5, "sliding_window": draw(8, 20), "sliding_window_pattern": 4}


def exaone4_full(draw: Draw) -> Sizes:
    sizes = llama3(draw)
    return sizes | {"sliding_window": None, "layer_types": 4 * ["full_attention"]}


def ernie4_5(draw: Draw) -> Sizes:
    return with_head_dim(draw) | {"use_bias": draw(True, False)}


def latent_attention(draw: Draw) -> Sizes:
    num_heads = draw(2, 3)
    return base(draw) | {
        "hidden_size": 48,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads,
        "q_lora_rank": draw(16, 24),
        "kv_lora_rank": draw(16, 32),
        "qk_nope_head_dim": draw(16, 32),
        "qk_rope_head_dim": draw(16, 32),
        "v_head_dim": draw(16, 32),
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "n_shared_experts": draw(1, 2),
        "moe_intermediate_size": 24,
        "routed_scaling_factor": 1.7,
        "first_k_dense_replace": 1,
    }


def deepseek_v2_lite(draw: Draw) -> Sizes:
    scaling = yarn(draw, beta_fast=32.0, beta_slow=1.0, mscale=0.707, mscale_all_dim=0.707)
    return latent_attention(draw) | {"q_lora_rank": None, "topk_method": "greedy", "rope_parameters": scaling}


def deepseek_v2(draw: Draw) -> Sizes:
    return latent_attention(draw) | {"topk_method": "greedy"}


def glm4_moe_lite(draw: Draw) -> Sizes:
    router = {"norm_topk_prob": True, "n_group": 1, "topk_group": 1, "scoring_func": "sigmoid"}
    return latent_attention(draw) | router
