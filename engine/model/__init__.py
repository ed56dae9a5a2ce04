"""The transformer: one decoder for all families."""

from engine.model.decoder import CausalLM
from engine.model.parameters import Parameters

__all__ = ["CausalLM", "Parameters"]
