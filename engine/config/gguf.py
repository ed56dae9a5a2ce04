"""Read the configuration of a model from the metadata of a GGUF file."""

from array import array
from dataclasses import replace
from typing import Any

from engine.config.decoder import MAX_LAYERS, Family, build_decoder, head_dim
from engine.config.families import FAMILIES, family_of
from engine.config.fields import Fields, shown
from engine.config.rope import FULL, SLIDING
from engine.config.structs import ModelConfig
from engine.shared.ggml import GGML_TYPES
from engine.shared.gguf import GGUFFile
from engine.shared.parts import engine_part

# Where families share an architecture, the name of the most general one: Mistral and Mixtral are read as Llama.
SHARED = {"llama": "llama", "olmo2": "olmo3", "granite": "granite", "gemma4": "gemma4_text", "deepseek2": "deepseek_v2"}
BY_ARCHITECTURE = {
    family.gguf: family
    for family in FAMILIES
    if family.gguf and SHARED.get(family.gguf, family.model_type) == family.model_type
}
BY_ARCHITECTURE["granitemoe"] = BY_ARCHITECTURE["granite"]  # Granite 4, with expert_count 0
GGUF_ARCHITECTURES = tuple(BY_ARCHITECTURE)
SCORING_FUNCTIONS = {1: "softmax", 2: "sigmoid"}  # of expert_gating_func
# Key of config.json -> key of the metadata after the architecture. A missing one is null: defaults do not apply.
KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "layer_norm_eps": "attention.layer_norm_epsilon",
    "rope_theta": "rope.freq_base",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "rotary_dim": "rope.dimension_count",
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "num_experts": "expert_count",
}
# The same for keys whose defaults apply.
DEFAULTED_KEYS = {
    "is_causal": "attention.causal",
    "rope_local_base_freq": "rope.freq_base_swa",
    "sliding_window_pattern": "attention.sliding_window_pattern",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
    "logit_scale": "logit_scale",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "norm_topk_prob": "expert_weights_norm",
    "routed_scaling_factor": "expert_weights_scale",
    "first_k_dense_replace": "leading_dense_block_count",
    "sliding_head_dim": "attention.key_length_swa",
    "sliding_rotary_dim": "rope.dimension_count_swa",
    "num_kv_shared_layers": "attention.shared_kv_layers",
    "hidden_size_per_layer_input": "embedding_length_per_layer_input",
    "n_shared_experts": "expert_shared_count",
    "q_lora_rank": "attention.q_lora_rank",
    "kv_lora_rank": "attention.kv_lora_rank",
    "qk_rope_head_dim": "rope.dimension_count",
    "num_nextn_predict_layers": "nextn_predict_layers",
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
    "conv_L_cache": "shortconv.l_cache",
    "linear_conv_kernel_dim": "ssm.conv_kernel",
    "linear_key_head_dim": "ssm.state_size",
    "linear_num_key_heads": "ssm.group_count",
    "linear_num_value_heads": "ssm.time_step_rank",
    "full_attention_interval": "full_attention_interval",
    "recurrent_layers": "attention.recurrent_layers",
}
V_NAMES = ("attn_v", "attn_qkv")  # tensors that hold the projection of values
YARN_KEYS = {
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
    "attention_factor": "yarn_attn_factor",
    "mscale_all_dim": "yarn_log_multiplier",
}
SAMPLING_FIELDS = {  # `general.sampling.*` -> sampling field of the API
    "sequence": "samplers",
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "xtc_probability": "xtc_probability",
    "xtc_threshold": "xtc_threshold",
    "penalty_last_n": "repeat_last_n",
    "penalty_repeat": "repetition_penalty",
    "mirostat": "mirostat",
    "mirostat_tau": "mirostat_tau",
    "mirostat_eta": "mirostat_eta",
}
# Names of tokens that end an answer. <|end|> does in Phi's format; in gpt-oss's, only a message.
END_OF_TURN_TOKENS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<turn|>",
    "<|endoftext|>",
    "<|END_OF_TURN_TOKEN|>",
    "[|endofturn|]",
    "<|user|>",
    "<|observation|>",
    "<|return|>",
    "<|call|>",
)
END_OF_MESSAGE = "<|end|>"
HARMONY_ENDS = {"<|return|>", "<|call|>"}


def load_gguf(file: GGUFFile) -> ModelConfig:
    """Read the configuration of a model. Raises ValueError, as `engine.config.load_model_config` says."""
    metadata = Fields(str(file.path), file.metadata)
    family = _family(metadata, file)
    fields = _huggingface_fields(family, metadata, file)
    decoder = build_decoder(family, fields)
    vocab_size = _vocab_size(metadata, file, fields.integer("hidden_size"))
    bos_token_ids = metadata.token_ids("tokenizer.ggml.bos_token_id", vocab_size)
    return ModelConfig(
        **decoder,
        vocab_size=vocab_size,
        num_token_ids=len(_tokens(metadata)) or vocab_size,
        rms_norm_eps=fields.number("norm_eps", 1e-5, zero=False),
        tie_word_embeddings="output.weight" not in file.tensors,
        per_layer_vocab_size=vocab_size if decoder["per_layer_input_size"] else 0,
        weight_layout=family.gguf_layout,
        bos_token_id=bos_token_ids[0] if bos_token_ids else None,
        eos_token_ids=_eos_token_ids(metadata, vocab_size),
        recommended_sampling=_recommended_sampling(metadata),
    )


def _family(metadata: Fields, file: GGUFFile) -> Family:
    """Return the family, with the biases that the file has."""
    arch = metadata.string("general.architecture", "not named")
    if arch not in BY_ARCHITECTURE:
        supported = ", ".join(GGUF_ARCHITECTURES)
        raise metadata.error("general.architecture", f"{shown(arch)} is not supported (supported: {supported})")
    has_correction_bias = any(name.endswith(".exp_probs_b.bias") for name in file.tensors)
    return replace(
        family_of("glm4_moe_lite") if arch == "deepseek2" and has_correction_bias else BY_ARCHITECTURE[arch],
        gguf=arch,
        qkv_bias=any(f"blk.0.{name}.bias" in file.tensors for name in ("attn_q", "attn_qkv")),
        output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_down.bias" in file.tensors,
    )


def _huggingface_fields(family: Family, metadata: Fields, file: GGUFFile) -> Fields:
    """Return the metadata under the keys of config.json. Errors name the keys of the file."""
    arch = str(family.gguf)
    keys = {key: f"{arch}.{name}" for key, name in (KEYS | DEFAULTED_KEYS).items()}
    values: dict[str, Any] = {key: metadata.get(keys[key]) for key in KEYS}
    values |= {key: value for key in DEFAULTED_KEYS if (value := metadata.get(keys[key])) is not None}
    values = {key: list(value) if isinstance(value, array) else value for key, value in values.items()}
    values |= {key: value for key, value in family.gguf_defaults.items() if key not in values}
    values["query_pre_attn_scalar"] = None  # the head size, but for the largest models
    if values["num_hidden_layers"] == family.gguf_wide_layers:
        num_heads = metadata.integer(keys["num_attention_heads"])
        values["query_pre_attn_scalar"] = metadata.integer(keys["hidden_size"]) / num_heads
    values["position_embedding_type"] = "rope" if metadata.boolean(f"{arch}.rope.scaling.finetuned", True) else None
    if (function := metadata.optional_integer(f"{arch}.expert_gating_func", minimum=0)) is not None:
        values["scoring_func"] = SCORING_FUNCTIONS.get(function, f"number {function}")
    if not values["num_experts"] and "shared_expert_intermediate_size" in values:
        values["intermediate_size"] = values["shared_expert_intermediate_size"]  # Granite 4
    if family.is_latent:
        values |= _latent_sizes(metadata, arch)
    if family.mixer != "none":
        values |= engine_part("hybrid", "config").gguf_values(family.mixer, metadata, arch, values)
    num_blocks, tensors = metadata.integer(keys["num_hidden_layers"], maximum=MAX_LAYERS), file.tensors
    num_ignored = metadata.integer(keys["num_nextn_predict_layers"], 0, minimum=0, maximum=num_blocks - 1)
    values["num_hidden_layers"] = num_blocks - num_ignored
    values["attention_k_eq_v"] = any(
        f"blk.{index}.attn_k.weight" in tensors
        and tensors.keys().isdisjoint(f"blk.{index}.{v}.weight" for v in V_NAMES)
        for index in range(num_blocks)
    )
    pattern = values.get("sliding_window_pattern")
    if isinstance(pattern, list):
        values["layer_types"] = [SLIDING if is_sliding else FULL for is_sliding in pattern]
    keys |= {"rope_scaling": f"{arch}.rope.scaling", "qk_nope_head_dim": keys["head_dim"]}
    keys["layer_types"] = keys["sliding_window_pattern" if isinstance(pattern, list) else "recurrent_layers"]
    keys["linear_value_head_dim"] = f"{arch}.ssm.inner_size"
    fields = Fields(metadata.source, values, labels=keys)
    fields = fields.with_values(values | {"rope_scaling": _rope_scaling(metadata, fields, file, arch)})
    size = head_dim(fields)
    value = metadata.integer(f"{arch}.attention.value_length", size)
    if value != size and not family.is_latent:
        problem = f"{value} differs from the head dimension {size}, which is not supported"
        raise metadata.error(f"{arch}.attention.value_length", problem)
    return fields


def _latent_sizes(metadata: Fields, arch: str) -> dict[str, int]:
    """Return the head sizes of latent attention. Files of before 2025 name them as those of other attention."""
    prefix, rotary_dim = f"{arch}.attention", metadata.integer(f"{arch}.rope.dimension_count")
    suffix = "" if metadata.get(f"{prefix}.key_length_mla") is None else "_mla"
    size = metadata.integer(f"{prefix}.key_length{suffix}", minimum=rotary_dim + 1)
    return {"qk_nope_head_dim": size - rotary_dim, "v_head_dim": metadata.integer(f"{prefix}.value_length{suffix}")}


def _vocab_size(metadata: Fields, file: GGUFFile, hidden_size: int) -> int:
    """Return the rows of the embedding, of which there may be more than tokens."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise metadata.error("token_embd.weight", "the tensor is missing")
    if len(embedding.shape) != 2 or embedding.shape[1] != hidden_size:
        raise metadata.error("token_embd.weight", f"shape {embedding.shape} does not fit hidden size {hidden_size}")
    num_tokens = len(_tokens(metadata))
    if num_tokens > embedding.shape[0]:
        problem = f"has {num_tokens} tokens, but the embedding has {embedding.shape[0]} rows"
        raise metadata.error("tokenizer.ggml.tokens", problem)
    return embedding.shape[0]


def _rope_scaling(metadata: Fields, fields: Fields, file: GGUFFile, arch: str) -> dict[str, Any]:
    """Return the scaling as in config.json. As in llama.cpp, a factor without a type is linear.

    Factors of each frequency (Llama 3, LongRoPE) are tensors of the file.
    """
    prefix = f"{arch}.rope.scaling"
    kind = metadata.string(f"{prefix}.type", "linear")
    if kind not in ("none", "linear", "yarn", "longrope"):
        supported = "none, linear, yarn, longrope, or a tensor rope_freqs.weight"
        raise metadata.error(f"{prefix}.type", f"{shown(kind)} is not supported (supported: {supported})")
    factor = metadata.number(f"{prefix}.factor", metadata.number(f"{arch}.rope.scale_linear", 1.0)) or 1.0
    values: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if beta := metadata.get(f"{arch}.attention.temperature_scale"):
        values["llama_4_scaling_beta"] = beta
    factors = [_factors(file, fields, name) for name in ("rope_freqs", "rope_factors_short", "rope_factors_long")]
    if factors[0] or factors[1]:
        if kind == "linear" and factor != 1.0:
            raise metadata.error("rope_freqs.weight", f"is not supported beside the linear factor {factor}")
        values["rope_type"] = "longrope"
        values["attention_factor"] = metadata.number(f"{prefix}.attn_factor", 1.0)
        values["short_factor"], values["long_factor"] = factors[1] or factors[0], factors[2] or factors[0]
    elif kind == "yarn":
        for key, name in YARN_KEYS.items():
            if (value := metadata.get(f"{prefix}.{name}")) is not None:
                values[key] = value
        if "kv_lora_rank" in fields.values:
            values["mscale_all_dim"] = values["mscale"] = 10 * values.get("mscale_all_dim", 0.0)
        else:
            values["mscale"] = 1.0  # counts only beside mscale_all_dim
        values["truncate"] = fields.boolean("truncate", default=True)
    elif kind == "none" or factor == 1.0:
        values["rope_type"] = "default"
    return values


def _factors(file: GGUFFile, fields: Fields, name: str) -> list[float]:
    """Return the numbers of a tensor of factors; none if the file does not have it."""
    tensor = file.tensors.get(f"{name}.weight")
    if tensor is None:
        return []
    expected = (fields.integer("rotary_dim", head_dim(fields), minimum=0) // 2,)
    if tensor.shape != expected or GGML_TYPES[tensor.ggml_type].name != "F32":
        raise fields.error(tensor.name, f"must be float32 of shape {expected}, not of shape {tensor.shape}")
    return list(memoryview(file.tensor_data(tensor)).cast("B").cast("f"))


def _recommended_sampling(fields: Fields) -> dict[str, Any]:
    """Return the sampling fields of the metadata. Numbers are stored in 32 bits: 0.95 reads as 0.949999988."""
    recommended: dict[str, Any] = {}
    for key, name in SAMPLING_FIELDS.items():
        value = fields.values.get(f"general.sampling.{key}")
        if value is not None:
            recommended[name] = float(f"{value:.6g}") if isinstance(value, float) else value
    if isinstance(names := recommended.get("samplers"), str):
        recommended["samplers"] = names.split(";")
    return recommended


def _tokens(fields: Fields) -> list[str]:
    tokens = fields.values.get("tokenizer.ggml.tokens", [])
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise fields.error("tokenizer.ggml.tokens", "must be an array of strings")
    return tokens


def _eos_token_ids(fields: Fields, vocab_size: int) -> tuple[int, ...]:
    """Return the ids of the end tokens: those of the metadata, and those with the usual name of an end of turn.

    Files name one end token, but chat models may end their turn with another.
    """
    stored = [
        token_id
        for name in ("eos_token_id", "eot_token_id", "eom_token_id")
        for token_id in fields.token_ids(f"tokenizer.ggml.{name}", vocab_size)
    ]
    names = {*END_OF_TURN_TOKENS, END_OF_MESSAGE}
    tokens = _tokens(fields)
    named = [token_id for token_id, token in enumerate(tokens) if token in names]
    ends = dict.fromkeys(stored + named)
    if {tokens[token_id] for token_id in named} >= HARMONY_ENDS:
        return tuple(token_id for token_id in ends if tokens[token_id] != END_OF_MESSAGE)
    return tuple(ends)
