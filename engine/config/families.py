"""The families of models: one entry each, which says where a family differs from Llama."""

from __future__ import annotations

from dataclasses import replace

from engine.config.decoder import LLAMA_LAYOUT, LLAMA_NAMES, NORMS, PLAIN_LAYOUT, Family
from engine.config.structs import WeightLayout

SANDWICH = NORMS  # before and after attention and MLP
POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
GLM_NAMES = (*LLAMA_NAMES, ("post_self_attn_layernorm", "post_attention_layernorm"), ("post_mlp_", "post_feedforward_"))
MIXTRAL_NAMES = (
    *LLAMA_NAMES,
    (r"\.block_sparse_moe\.", ".mlp."),
    (r"\.w1\.weight", ".gate_proj.weight"),
    (r"\.w2\.weight", ".down_proj.weight"),
    (r"\.w3\.weight", ".up_proj.weight"),
)
GRANITE4_NAMES = (
    *LLAMA_NAMES,
    (r"\.shared_mlp\.input_linear\.", ".mlp.gate_up_proj."),
    (r"\.shared_mlp\.output_linear\.", ".mlp.down_proj."),
)
DELTA_NAMES = (
    *LLAMA_NAMES,
    (r"\.linear_attn\.dt_bias$", ".linear_attn.dt.bias"),
    (r"\.mlp\.shared_expert\.", ".mlp.shared_experts."),
    (r"\.self_attn\.qkv_proj\.", ".linear_attn.in_proj_qkv."),  # of GGUF files, in which attention has three matrices
)
LFM2_NAMES = (
    (r"\.operator_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".pre_feedforward_layernorm."),
    (r"\.self_attn\.out_proj\.", ".self_attn.o_proj."),
    (r"\.self_attn\.([qk])_layernorm\.", r".self_attn.\1_norm."),
    (r"\.feed_forward\.expert_bias$", ".mlp.gate.e_score_correction_bias"),
    (r"\.feed_forward\.", ".mlp."),
    (r"\.w1\.", ".gate_proj."),
    (r"\.w2\.", ".down_proj."),
    (r"\.w3\.", ".up_proj."),
    (r"^model\.embedding_norm\.", "model.norm."),
)
INTERLEAVED = WeightLayout(is_interleaved=True)
FUSED_UP = (("mlp.up_proj", "mlp.gate_up_proj"),)  # gate and up are one tensor in GGUF files
GEMMA4_NAMES = (
    (r"\.router\.proj\.", ".mlp.gate."),
    (r"\.router\.scale$", ".mlp.gate.norm.weight"),
    (r"\.router\.per_expert_scale$", ".mlp.gate.expert_scales"),
    (r"\.experts\.(gate_up|down)_proj$", r".mlp.experts.\1_proj"),
)
GEMMA4_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}
GPT_OSS_ROPE = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
MINISTRAL3_ROPE = {
    "rope_type": "yarn",
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "rope_theta": 1e6,
} | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
GEMMA_DEFAULTS = {"head_dim": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True}

GEMMA4 = Family(
    "gemma4_text",
    "Gemma4ForCausalLM",
    "gemma4",
    GEMMA_DEFAULTS
    | {"max_position_embeddings": 131072, "sliding_window": 512, "sliding_window_pattern": 6}
    | {"rope_parameters": GEMMA4_ROPES, "global_head_dim": 512, "hidden_size_per_layer_input": 256}
    | {"vocab_size_per_layer_input": 262144}
    | {"hidden_act": "gelu_pytorch_tanh", "norm_topk_prob": True, "enable_moe_block": False},
    qk_norm="head",
    v_norm=True,
    scale=1.0,
    windows="pattern",
    ends_with_full=True,
    local_theta="rope_local_base_freq",
    norms=SANDWICH,
    scales_embeddings=True,
    has_parallel_experts=True,
    has_layer_scalars=True,
    layout=WeightLayout(names=GEMMA4_NAMES),
    gguf_defaults={"norm_topk_prob": True, "enable_moe_block": True, "global_head_dim": None}
    | {"hidden_size_per_layer_input": 0, "rope_parameters": {}},
    refused={"attention_bias": False, "use_bidirectional_attention": "vision"},
)

SHARED_EXPERT = {"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "norm_topk_prob": True}
SHARED_EXPERT |= {"num_key_value_heads": 2, "intermediate_size": 5632}
QWEN35 = Family(
    "qwen3_5_text",
    "Qwen3_5ForCausalLM",
    "qwen35",
    {"max_position_embeddings": 32768, "num_key_value_heads": 4, "head_dim": 256, "partial_rotary_factor": 0.25},
    qkv_bias="attention_bias",
    qk_norm="head",
    has_gate=True,
    mixer="gated_delta_net",
    layout=WeightLayout(names=DELTA_NAMES, norm_offset=1.0),
    gguf_layout=WeightLayout(names=DELTA_NAMES),
    gguf_defaults={"linear_heads_tiled": True},
)
LFM2 = Family(
    "lfm2",
    "Lfm2ForCausalLM",
    "lfm2",
    {"max_position_embeddings": 128000, "num_key_value_heads": 8, "rope_theta": 1e6, "norm_eps": 1e-5}
    | {"tie_word_embeddings": True, "block_auto_adjust_ff_dim": True},
    qk_norm="head",
    mixer="short_conv",
    layout=WeightLayout(names=LFM2_NAMES),
    gguf_defaults={"block_auto_adjust_ff_dim": False},
)

FAMILIES = (
    Family(
        "llama",
        "LlamaForCausalLM",
        "llama",
        {"max_position_embeddings": 2048},
        qkv_bias="attention_bias",
        mlp_bias="mlp_bias",
        gguf_layout=INTERLEAVED,
        gguf_defaults={"norm_topk_prob": True},  # Mixtral
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        "llama",
        {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        windows="all",
        gguf_layout=INTERLEAVED,
    ),
    Family(
        "ministral3",
        "Ministral3ForCausalLM",
        "mistral3",
        {"max_position_embeddings": 262144, "num_key_value_heads": 8, "head_dim": 128, "norm_eps": 1e-5}
        | {"rope_parameters": MINISTRAL3_ROPE},
        windows="all",
        gguf_layout=INTERLEAVED,
    ),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        "llama",
        {"max_position_embeddings": 131072, "num_key_value_heads": 8, "rope_theta": 1e6, "norm_topk_prob": True}
        | {"num_local_experts": 8, "num_experts_per_tok": 2, "norm_eps": 1e-5},
        windows="all",
        layout=WeightLayout(names=MIXTRAL_NAMES),
        gguf_layout=INTERLEAVED,
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        "qwen2",
        {
            "max_position_embeddings": 32768,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        qkv_bias=True,
        output_bias=False,
        windows="last",
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        "qwen3",
        {"max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
        | {"head_dim": 128},
        qkv_bias="attention_bias",
        qk_norm="head",
        windows="last",
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        "qwen3moe",
        {"max_position_embeddings": 32768, "use_sliding_window": False, "num_key_value_heads": 4}
        | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
        qkv_bias="attention_bias",
        qk_norm="head",
        gguf_defaults={"norm_topk_prob": True},
        refused={"use_sliding_window": False},
    ),
    QWEN35,
    replace(
        QWEN35,
        model_type="qwen3_5_moe_text",
        architecture="Qwen3_5MoeForCausalLM",
        gguf="qwen35moe",
        defaults={**QWEN35.defaults, **SHARED_EXPERT, "num_experts": 256, "num_experts_per_tok": 8},
        has_shared_gate=True,
        gguf_defaults={**QWEN35.gguf_defaults, "norm_topk_prob": True},
    ),
    replace(
        QWEN35,
        model_type="qwen3_next",
        architecture="Qwen3NextForCausalLM",
        gguf="qwen3next",
        defaults={**QWEN35.defaults, **SHARED_EXPERT, "num_experts": 512, "num_experts_per_tok": 10},
        has_shared_gate=True,
        gguf_defaults={"norm_topk_prob": True},
    ),
    LFM2,
    replace(
        LFM2,
        model_type="lfm2_moe",
        architecture="Lfm2MoeForCausalLM",
        gguf="lfm2moe",
        defaults={**LFM2.defaults, "block_auto_adjust_ff_dim": False, "num_experts": 32, "num_experts_per_tok": 4}
        | {"num_dense_layers": 2, "moe_intermediate_size": 1792, "norm_topk_prob": True, "scoring_func": "sigmoid"},
        correction_bias=True,
        gguf_defaults={"norm_topk_prob": True},
        refused={"use_expert_bias": True},
    ),
    Family(
        "olmoe",
        "OlmoeForCausalLM",
        "olmoe",
        {"max_position_embeddings": 4096, "norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8},
        qkv_bias="attention_bias",
        qk_norm="all",
        refused={"clip_qkv": None},
    ),
    Family(
        "gemma2",
        "Gemma2ForCausalLM",
        "gemma2",
        GEMMA_DEFAULTS
        | {"max_position_embeddings": 8192, "sliding_window": 4096, "sliding_window_pattern": 2}
        | {"query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
        | {"hidden_act": "gelu_pytorch_tanh"},
        qkv_bias="attention_bias",
        scale="query_pre_attn_scalar",
        windows="pattern",
        norms=SANDWICH,
        scales_embeddings=True,
        layout=WeightLayout(norm_offset=1.0),
        gguf_wide_layers=46,
    ),
    Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        "gemma3",
        GEMMA_DEFAULTS
        | {"max_position_embeddings": 131072, "sliding_window": 4096, "sliding_window_pattern": 6, "rope_theta": 1e6}
        | {"query_pre_attn_scalar": 256, "hidden_act": "gelu_pytorch_tanh", "vocab_size": 262208},
        qkv_bias="attention_bias",
        qk_norm="head",
        scale="query_pre_attn_scalar",
        windows="pattern",
        local_theta="rope_local_base_freq",
        norms=SANDWICH,
        scales_embeddings=True,
        layout=WeightLayout(norm_offset=1.0),
        gguf_wide_layers=62,
    ),
    GEMMA4,
    # The same layers; only the other parts of the model differ.
    replace(
        GEMMA4,
        model_type="gemma4_unified_text",
        architecture="Gemma4UnifiedForCausalLM",
        defaults={**GEMMA4.defaults, "max_position_embeddings": 262144, "sliding_window": 1024}
        | {"hidden_size_per_layer_input": 0},
    ),
    Family(
        "gpt_oss",
        "GptOssForCausalLM",
        "gpt-oss",
        {"max_position_embeddings": 131072, "head_dim": 64, "num_key_value_heads": 8, "num_attention_heads": 64}
        | {"sliding_window": 128, "sliding_window_pattern": 2, "attention_bias": True, "norm_topk_prob": True}
        | {"num_local_experts": 128, "num_experts_per_tok": 4, "rope_theta": 150000.0, "norm_eps": 1e-5}
        | {"rope_parameters": GPT_OSS_ROPE},
        qkv_bias="attention_bias",
        has_sinks=True,
        windows="pattern",
        activation="swigluoai",
        expert_bias=True,
        layout=WeightLayout(
            names=(*LLAMA_NAMES, (r"\.mlp\.router\.", ".mlp.gate."), (r"\.sinks$", ".sinks.weight")),
            has_interleaved_experts=True,
        ),
        gguf_layout=LLAMA_LAYOUT,
        gguf_defaults={"truncate": False},
        refused={"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
    ),
    Family(
        "phi3",
        "Phi3ForCausalLM",
        "phi3",
        {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "norm_eps": 1e-5},
        windows="all",
        rope_names={"su": "longrope", "yarn": "longrope"},
        gguf_layout=WeightLayout(names=FUSED_UP),
    ),
    Family(
        "olmo2",
        "Olmo2ForCausalLM",
        "olmo2",
        {"max_position_embeddings": 2048, "norm_eps": 1e-5},
        qkv_bias="attention_bias",
        qk_norm="all",
        norms=POST_NORMS,
        layout=PLAIN_LAYOUT,
    ),
    Family(
        "olmo3",
        "Olmo3ForCausalLM",
        "olmo2",
        {"max_position_embeddings": 2048, "norm_eps": 1e-5, "sliding_window": 4096, "sliding_window_pattern": 4}
        | {"rope_theta": 500000.0},
        qkv_bias="attention_bias",
        qk_norm="all",
        windows="pattern",
        local_theta="rope_theta",
        norms=POST_NORMS,
        layout=PLAIN_LAYOUT,
    ),
    Family(
        "granite",
        "GraniteForCausalLM",
        "granite",
        {"max_position_embeddings": 2048, "position_embedding_type": "rope"},
        qkv_bias="attention_bias",
        mlp_bias="mlp_bias",
        scale="attention_multiplier",
        no_rope="flagged",
        logits="divided",
        gguf_layout=INTERLEAVED,
        refused={"num_experts": 0},
    ),
    Family(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        "granite",
        {"max_position_embeddings": 2048},
        qkv_bias="attention_bias",
        scale="attention_multiplier",
        no_rope="flagged",
        logits="divided",
        mlp_size="shared_expert_intermediate_size",
        layout=WeightLayout(names=GRANITE4_NAMES),
        gguf_layout=INTERLEAVED,
        refused={"num_experts": 0},
    ),
    Family(
        "smollm3",
        "SmolLM3ForCausalLM",
        "smollm3",
        {"max_position_embeddings": 32768, "num_key_value_heads": 4, "rope_theta": 2e6, "use_sliding_window": False}
        | {"tie_word_embeddings": True, "num_attention_heads": 16},
        qkv_bias="attention_bias",
        mlp_bias="mlp_bias",
        no_rope="listed",
        gguf_layout=INTERLEAVED,
        refused={"use_sliding_window": False},
    ),
    Family(
        "glm4",
        "Glm4ForCausalLM",
        "glm4",
        {"max_position_embeddings": 131072, "head_dim": 128, "num_key_value_heads": 2, "norm_eps": 1.5625e-7}
        | {"attention_bias": True, "partial_rotary_factor": 0.5},
        qkv_bias="attention_bias",
        output_bias=False,
        norms=SANDWICH,
        layout=WeightLayout(names=GLM_NAMES, is_interleaved=True),
        gguf_layout=WeightLayout(names=FUSED_UP, is_interleaved=True),
    ),
    Family(
        "cohere2",
        "Cohere2ForCausalLM",
        "cohere2",
        {"max_position_embeddings": 8192, "norm_eps": 1e-5, "logit_scale": 0.0625, "tie_word_embeddings": True}
        | {"sliding_window": 4096, "sliding_window_pattern": 4},
        qkv_bias="attention_bias",
        windows="pattern",
        no_rope="full",
        norm="layer",
        norms=("input_layernorm",),
        is_parallel=True,
        logits="multiplied",
        layout=WeightLayout(is_interleaved=True),
        gguf_layout=INTERLEAVED,
    ),
    Family(
        "exaone4",
        "Exaone4ForCausalLM",
        "exaone4",
        {"max_position_embeddings": 2048, "norm_eps": 1e-5, "sliding_window": 4096, "sliding_window_pattern": 4},
        qk_norm="head",
        windows="pattern",
        no_rope="mixed",
        norms=POST_NORMS,
        layout=PLAIN_LAYOUT,
    ),
    Family(
        "ernie4_5",
        "Ernie4_5ForCausalLM",
        "ernie4_5",
        {"max_position_embeddings": 131072, "num_key_value_heads": 2, "head_dim": 128, "norm_eps": 1e-5}
        | {"rope_theta": 500000.0, "tie_word_embeddings": True},
        qkv_bias="use_bias",
        mlp_bias="use_bias",
        layout=WeightLayout(names=LLAMA_NAMES, is_interleaved=True),
        gguf_layout=INTERLEAVED,
    ),
    Family(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        "deepseek2",
        {"max_position_embeddings": 2048, "topk_method": "greedy", "moe_intermediate_size": 1407, "n_shared_experts": 2}
        | {"kv_lora_rank": 512, "q_lora_rank": 1536, "n_routed_experts": 64}
        | {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
        is_latent=True,
        layout=WeightLayout(names=LLAMA_NAMES, is_interleaved=True),
        gguf_layout=INTERLEAVED,
        gguf_defaults={"q_lora_rank": None, "topk_method": None},
        refused={"attention_bias": False, "norm_topk_prob": False},
    ),
    Family(
        "glm4_moe_lite",
        "Glm4MoeLiteForCausalLM",
        "deepseek2",
        {"max_position_embeddings": 202752, "norm_eps": 1e-5, "scoring_func": "sigmoid", "norm_topk_prob": True}
        | {"n_routed_experts": 64, "num_experts_per_tok": 4, "moe_intermediate_size": 1536, "n_shared_experts": 1}
        | {"routed_scaling_factor": 1.8, "first_k_dense_replace": 1}
        | {"kv_lora_rank": 512, "q_lora_rank": 768}
        | {"qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256},
        is_latent=True,
        correction_bias=True,
        group_score="top2",
        layout=WeightLayout(names=LLAMA_NAMES, is_interleaved=True),
        gguf_layout=INTERLEAVED,
        gguf_defaults={"q_lora_rank": None},
        refused={"attention_bias": False, "rope_interleave": True},
    ),
)


def family_of(model_type: str) -> Family:
    """Return the family of a supported model."""
    return next(family for family in FAMILIES if family.model_type == model_type)
