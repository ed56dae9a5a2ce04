"""What adapter_config.json says of a LoRA adapter, as PEFT writes it: how its matrices are scaled.

What would make them something else than W + scale B A for the plain weights W of the model is refused. The rest of the
file, as how the adapter was initialised or trained, does not matter.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from engine.config import Fields, read_json, shown

# Methods that a boolean switches on.
REFUSED_SWITCHES = {
    "use_dora": "DoRA adapters are not supported",
    "use_qalora": "QA-LoRA adapters are not supported",
    "lora_bias": "biases of LoRA matrices are not supported",
    "fan_in_fan_out": "adapters of transposed weights are not supported",
}
# ... and that lists or objects bring along.
REFUSED_LISTS = {
    "modules_to_save": "modules that were trained as a whole are not supported",
    "trainable_token_indices": "trained embeddings are not supported",
    "layer_replication": "adapters that repeat layers are not supported",
    "target_parameters": "only adapters of modules are supported, not of parameters",
    "alora_invocation_tokens": "activated LoRA (aLoRA) is not supported",
}
# ... and that PEFT switches on for an empty object, too.
REFUSED_CONFIGS = {
    "arrow_config": "Arrow, which routes between adapters, is not supported",
    "kasa_config": "KaSA, which changes the model's own weights, is not supported",
    "monteclora_config": "MonteCLoRA, which samples its matrices, is not supported",
    "use_bdlora": "BD-LoRA, whose matrices are block-diagonal, is not supported",
}
# PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ replace the model's weights by others, on which the adapter depends. PEFT can
# convert all but the last to plain LoRA when it saves them, and says "true" then.
HARMLESS_INITS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")

# Of regular expressions, what names of modules need, and what takes Python's backtracking matcher no long time.
MAX_PATTERN_LENGTH = 500
MAX_BRANCHINGS = 4  # groups, and characters that may be repeated
MAX_ALTERNATIVES = 100
_CHARACTER = r"(?:[\w-]|\\[.dw_-]|\.|\[[\w-]+\])"
_BRANCH = rf"\^?(?:{_CHARACTER}[*+?]?|\((?:\?:)?(?:{_CHARACTER}|\|)+\))*\$?"
PATTERN = re.compile(rf"{_BRANCH}(?:\|{_BRANCH})*")
BRANCHINGS = re.compile(r"[*+?]|\((?!\?)")

Patterns = list[tuple[re.Pattern[str], float]]


@dataclass(frozen=True)
class LoraScales:
    """What the products of an adapter's matrices are multiplied by."""

    path: Path
    rank: int | None
    alpha: float
    rank_pattern: Patterns
    alpha_pattern: Patterns
    use_rslora: bool

    def scale(self, module: str, rank: int) -> float:
        """For the matrices of that rank of a module."""
        expected = _first_match(self.rank_pattern, module) or self.rank
        if expected not in (None, rank):
            raise ValueError(f"{self.path}: r: is {expected:g} for {module}, whose matrices have rank {rank}")
        alpha = _first_match(self.alpha_pattern, module) or self.alpha
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_lora_scales(path: Path) -> LoraScales:
    """Read adapter_config.json; ValueError for any kind of adapter that is not plain LoRA."""
    fields = read_json(path)
    if (peft_type := fields.string("peft_type", "not named")) != "LORA":
        raise fields.error("peft_type", f"{shown(peft_type)} is not supported, only 'LORA'")
    _refuse_other_methods(fields)
    alpha = fields.optional_number("lora_alpha", zero=False)
    if alpha is None:
        raise fields.error("lora_alpha", "is missing")
    return LoraScales(
        path=path,
        rank=fields.optional_integer("r"),
        alpha=alpha,
        rank_pattern=_patterns(fields, "rank_pattern"),
        alpha_pattern=_patterns(fields, "alpha_pattern"),
        use_rslora=fields.boolean("use_rslora"),
    )


def _refuse_other_methods(fields: Fields) -> None:
    for key, problem in REFUSED_SWITCHES.items():
        if fields.boolean(key):
            raise fields.error(key, problem)
    for key, problem in REFUSED_LISTS.items():
        if fields.values.get(key):
            raise fields.error(key, problem)
    for key, problem in REFUSED_CONFIGS.items():
        if fields.values.get(key) not in (None, False):
            raise fields.error(key, problem)
    if (bias := fields.string("bias", "none")) != "none":
        raise fields.error("bias", f"{shown(bias)} is not supported: the model's biases must be left as they are")
    init = fields.values.get("init_lora_weights")
    if init is not None and str(init).lower() not in HARMLESS_INITS:
        raise fields.error(
            "init_lora_weights",
            f"{shown(init)} changes the model's own weights, which is not supported; save the adapter as plain LoRA, "
            "with path_initial_model_for_weight_conversion of PEFT's save_pretrained",
        )


def _patterns(fields: Fields, key: str) -> Patterns:
    """Numbers for modules whose name, or its last parts, match a regular expression."""
    values = fields.values.get(key)
    if values is None:
        return []
    if not isinstance(values, dict):
        raise fields.error(key, f"must be an object, not {shown(values)}")
    numbers = Fields(f"{fields.source}: {key}", values)
    patterns: Patterns = []
    for pattern in values:
        number = numbers.optional_number(pattern, zero=False)
        if number is None:
            raise numbers.error(pattern, "must be a number above 0, not None")
        patterns.append((_compile(numbers, pattern), number))
    return patterns


def _compile(numbers: Fields, pattern: str) -> re.Pattern[str]:
    is_simple = (
        len(pattern) <= MAX_PATTERN_LENGTH
        and pattern.count("|") < MAX_ALTERNATIVES
        and len(BRANCHINGS.findall(pattern)) <= MAX_BRANCHINGS
        and PATTERN.fullmatch(pattern)
    )
    if not is_simple:
        raise numbers.error(shown(pattern), "is neither a module's name nor a simple regular expression for some")
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except re.error as error:
        raise numbers.error(shown(pattern), f"is not a regular expression ({error})") from error


def _first_match(patterns: Patterns, module: str) -> float | None:
    return next((number for pattern, number in patterns if pattern.match(module)), None)
