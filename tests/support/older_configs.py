"""Spell config.json as older versions of transformers saved it, which most checkpoints on the hub have."""

from typing import Any

RENAMED = {"dtype": "torch_dtype"}
RENAMED_IN = {"qwen3_moe": {"num_local_experts": "num_experts"}}
# Fields that older versions did not have: they follow from others.
ABSENT_IN = {
    "cohere2": ("layer_types", "head_dim"),
    "deepseek_v2": ("head_dim", "qk_head_dim"),
    "gemma2": ("layer_types",),
    "gemma3_text": ("layer_types", "_sliding_window_pattern"),
    "glm4_moe_lite": ("mlp_layer_types", "qk_head_dim"),
    "gpt_oss": ("layer_types",),
    "olmo3": ("layer_types",),
    "smollm3": ("layer_types",),
}
ADDED_IN = {"cohere2": {"sliding_window_pattern": 4}, "gemma3_text": {"sliding_window_pattern": 6}}


def older_config(values: dict[str, Any]) -> dict[str, Any]:
    """Return the same configuration in the older spelling."""
    if "text_config" in values:
        return values | {"text_config": older_config(values["text_config"])}
    model_type = values["model_type"]
    names = RENAMED | RENAMED_IN.get(model_type, {})
    older = {names.get(key, key): value for key, value in values.items() if key not in ABSENT_IN.get(model_type, ())}
    older |= ADDED_IN.get(model_type, {})
    if model_type == "gemma4_text":
        return with_global_head_dim(older)
    return with_rope_scaling(older)


def with_global_head_dim(values: dict[str, Any]) -> dict[str, Any]:
    """Replace `per_layer_config`, which differs on the layers of full attention only."""
    of_full_attention = next(iter(values.pop("per_layer_config").values()))
    values["global_head_dim"] = of_full_attention["head_dim"]
    values["num_global_key_value_heads"] = of_full_attention.get("num_key_value_heads")
    return values


def with_rope_scaling(values: dict[str, Any]) -> dict[str, Any]:
    """Replace `rope_parameters` by `rope_theta` and `rope_scaling`."""
    parameters = values.pop("rope_parameters")
    if "sliding_attention" in parameters:
        if values["model_type"] == "gemma3_text":
            values["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        parameters = parameters["full_attention"]
    scaling = dict(parameters)
    values["rope_theta"] = scaling.pop("rope_theta")
    if "partial_rotary_factor" in scaling:
        values["partial_rotary_factor"] = scaling.pop("partial_rotary_factor")
    if values["model_type"] == "phi3":
        scaling.pop("original_max_position_embeddings")
    if scaling["rope_type"] == "default":
        values["rope_scaling"] = None
    else:
        key = "type" if values["model_type"] in ("phi3", "deepseek_v2") else "rope_type"
        values["rope_scaling"] = {key: scaling.pop("rope_type"), **scaling}
    return values
