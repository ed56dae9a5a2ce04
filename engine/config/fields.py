"""Typed, range-checked access to model metadata, from GGUF or JSON."""

from collections.abc import Mapping
from typing import Any

from engine.config.structs import ModelConfig

MAX_INT = 2**31 - 1
MAX_FLOAT = 1e30


class Fields:
    """The values of one source of metadata. Null counts as missing; errors (ValueError) name the source and the key."""

    def __init__(self, source: str, values: Mapping[str, Any]) -> None:
        self.source = source
        self.values = values

    def error(self, key: str, problem: str) -> ValueError:
        return ValueError(f"{self.source}: {key}: {problem}")

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1, maximum: int = MAX_INT) -> int:
        value = self.optional_integer(key, minimum=minimum, maximum=maximum)
        if value is not None:
            return value
        if default is None:
            raise self.error(key, "is missing")
        return default

    def optional_integer(self, key: str, *, minimum: int = 1, maximum: int = MAX_INT) -> int | None:
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            raise self.error(key, f"must be an integer from {minimum} to {maximum}, not {shown(value)}")
        return value

    def number(self, key: str, default: float, *, zero: bool = True) -> float:
        value = self.optional_number(key, zero=zero)
        return default if value is None else value

    def optional_number(self, key: str, *, maximum: float = MAX_FLOAT, zero: bool = True) -> float | None:
        """Return a number from 0 to `maximum` as a float, None if it is missing. 0 itself is allowed only if `zero`."""
        value = self.values.get(key)
        if value is None:
            return None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= maximum or (value == 0 and not zero):
            bounds = f"{'from' if zero else 'above'} 0, at most {maximum:g}"
            raise self.error(key, f"must be a number {bounds}, not {shown(value)}")
        return float(value)

    def boolean(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, not {shown(value)}")
        return value

    def string(self, key: str, default: str) -> str:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(key, f"must be a string, not {shown(value)}")
        return value

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """Return the token ids of a field that holds one id or a list of ids, all below `vocab_size`."""
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token_id in ids:
            if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < vocab_size:
                raise self.error(key, f"must be token ids below {vocab_size}, not {shown(value)}")
        return tuple(ids)


def shown(value: object) -> str:
    """Format a value for an error message, cut to 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def checked(config: ModelConfig, source: str) -> ModelConfig:
    """Return the configuration if its fields are consistent. Raises ValueError, whose message begins with `source`."""
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"{source}: the number of attention heads ({config.num_attention_heads}) is not a multiple of the number "
            f"of key and value heads ({config.num_key_value_heads})"
        )
    if config.head_dim % 2:
        raise ValueError(f"{source}: head_dim ({config.head_dim}) must be even, for rotary embeddings")
    return config


def head_dim(fields: Fields, key: str, hidden_size: int, num_heads: int) -> int:
    """Return the head size stored under `key`, or else `hidden_size / num_heads`."""
    if (head_dim := fields.optional_integer(key)) is not None:
        return head_dim
    if hidden_size % num_heads:
        problem = (
            f"is missing, and the hidden size ({hidden_size}) is not a multiple of the {num_heads} attention heads"
        )
        raise fields.error(key, problem)
    return hidden_size // num_heads
