"""The model: one decoder-only transformer for all families, its KV cache and the memory plan."""

from engine.model.decoder import CausalLM
from engine.model.linear import Parameters

__all__ = ["CausalLM", "Parameters"]
