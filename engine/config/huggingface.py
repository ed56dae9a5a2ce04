"""Read the configuration of a model from a folder with `config.json`, as Hugging Face's transformers writes it."""

import logging
from pathlib import Path
from typing import Any

import msgspec

from engine.config.decoder import NAMES, Family, build_decoder
from engine.config.families import FAMILIES
from engine.config.fields import Fields, read_json_object, shown
from engine.config.structs import ModelConfig, QuantizationConfig
from engine.config.tokenizer_files import num_token_ids, read_optional_object
from engine.shared.parts import engine_part

logger = logging.getLogger("lightwell.engine")

# Files beside config.json that say how the weights are quantised.
QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")
GENERATING = ("ForCausalLM", "ForConditionalGeneration")  # ends of the names of architectures that generate text
# `model_type` of a multimodal model, whose text part is in `text_config`.
MULTIMODAL = (
    *("gemma3", "gemma4", "gemma4_unified", "idefics3", "internvl", "lfm2_vl", "llava", "llava_next"),
    *("llava_onevision", "minicpmv4_6", "mistral3", "qwen3_5", "qwen3_5_moe", "smolvlm"),
)
TEXT_NAMES = (
    (r"^(model\.)?language_model\.lm_head", "lm_head"),
    (r"^(model\.)?(language|text)_model\.(model\.)?", "model."),
)


def load_folder(folder: Path) -> ModelConfig:
    """Read the configuration of a model. Raises ValueError, as `engine.config.load_model_config` says."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json in this folder")
    refuse_pickle(folder)
    fields = text_part(Fields(str(folder / "config.json"), read_json_object(folder / "config.json")))
    generation = folder / "generation_config.json"
    return _load_config_json(folder, fields, Fields(str(generation), read_optional_object(generation)))


def text_part(fields: Fields) -> Fields:
    """Return the fields of the text model, if it is a part of a multimodal one, whose own keys come first."""
    text, model_type = fields.nested("text_config"), fields.string("model_type", "")
    if text is None or model_type not in MULTIMODAL:
        return Fields(fields.source, fields.values, NAMES)
    logger.info("%s: %s loads the text part only; images are not supported", fields.source, model_type)
    outer = ("quantization_config", "tie_word_embeddings", "eos_token_id", "bos_token_id")
    values = {key: fields.values[key] for key in outer if fields.values.get(key) is not None}
    return Fields(text.source, {**text.values, **values}, NAMES)


def _load_config_json(folder: Path, fields: Fields, generation: Fields) -> ModelConfig:
    family = _family(fields)
    if fields.get("auto_map"):
        logger.info("%s: the Python code that comes with the model is not run; its type is supported", folder)
    decoder = build_decoder(family, fields)
    fields = fields.with_defaults(family.defaults)
    vocab_size = fields.integer("vocab_size")
    bos_token_ids = fields.token_ids("bos_token_id", vocab_size) or generation.token_ids("bos_token_id", vocab_size)
    end_ids = generation.token_ids("eos_token_id", vocab_size) + fields.token_ids("eos_token_id", vocab_size)
    return ModelConfig(
        **decoder,
        vocab_size=vocab_size,
        num_token_ids=min(vocab_size, num_token_ids(folder) or vocab_size),
        rms_norm_eps=fields.number("norm_eps", 1e-6, zero=False),
        tie_word_embeddings=fields.boolean("tie_word_embeddings"),
        per_layer_vocab_size=_per_layer_vocab_size(fields, vocab_size) if decoder["per_layer_input_size"] else 0,
        weight_layout=msgspec.structs.replace(family.layout, names=(*TEXT_NAMES, *family.layout.names)),
        bos_token_id=bos_token_ids[0] if bos_token_ids else None,
        eos_token_ids=tuple(dict.fromkeys(end_ids)),
        quantization=_read_quantization(fields),
        recommended_sampling=_recommended_sampling(generation),
    )


def _read_quantization(fields: Fields) -> QuantizationConfig | None:
    """Return how a checkpoint is quantised. Raises ValueError, also if it is and the part for it is missing."""
    says_so = any(fields.values.get(key) for key in ("quantization_config", "compression_config"))
    if not says_so and not any((Path(fields.source).parent / name).is_file() for name in QUANTIZATION_FILES):
        return None
    quantization: QuantizationConfig | None = engine_part("quantized", "config").read_quantization(fields)
    return quantization


def _per_layer_vocab_size(fields: Fields, vocab_size: int) -> int:
    size = fields.integer("vocab_size_per_layer_input", vocab_size)
    if size < vocab_size:
        raise fields.error("vocab_size_per_layer_input", f"{size} is less than the {vocab_size} of vocab_size")
    return size


def _family(fields: Fields) -> Family:
    model_type = fields.string("model_type", "")
    names = fields.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise fields.error("architectures", f"must be a list of names, not {shown(names)}")
    if names and not any(name.endswith(GENERATING) for name in names):
        raise fields.error("architectures", f"{shown(names)} is not supported (supported: ...{GENERATING[0]})")
    for family in FAMILIES:
        if family.model_type == model_type or (not model_type and family.architecture in names):
            return family
    supported = ", ".join(family.model_type for family in FAMILIES)
    found = shown(model_type) if model_type else shown(names or "not named")
    key = "model_type" if model_type else "architectures"
    raise fields.error(key, f"{found} is not supported (supported: {supported})")


def _recommended_sampling(generation: Fields) -> dict[str, Any]:
    """Return the sampling fields of generation_config.json.

    With `"do_sample": false`, transformers decodes greedily and ignores all other fields.
    """
    if not generation.boolean("do_sample", default=True):
        return {"temperature": 0.0}
    return {name: generation.values[name] for name in SAMPLING_FIELDS if generation.values.get(name) is not None}


def refuse_pickle(folder: Path) -> None:
    """Raise ValueError if the folder has pickle files of weights and no safetensors."""
    names = sorted(file.name for file in folder.iterdir())
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise ValueError(
            f"{folder}: the weights are pickle files ({pickles[0]}). Reading a pickle runs whatever code it contains, "
            "so only safetensors and GGUF are supported"
        )
