"""Load the adapters of the settings together with their model."""

from __future__ import annotations

from collections.abc import Mapping

from engine.adapters import AdapterLoader, Adapters
from engine.config import EngineConfig, ModelConfig
from engine.model import CausalLM
from engine.model.memory_plan import MIB
from engine.parts.lora.checkpoint import LoraCheckpoint, module_shapes
from engine.parts.lora.layers import add_slots
from engine.parts.lora.slots import LoraAdapters, num_lora_slots, read_adapter
from engine.whole_model import WholeModel

DEFAULT_MAX_RANK = 16


class LoraLoader(AdapterLoader):
    """Loads the adapters of the settings, which have been read."""

    def __init__(self, config: EngineConfig, model_config: ModelConfig) -> None:
        """Raises AdapterError."""
        self._config = config
        self._checkpoints = {
            name: read_adapter(name, path, model_config, config.max_lora_rank)
            for name, path in config.lora_modules.items()
        }
        self.max_rank = choose_lora_rank(config, self._checkpoints)

    def check_memory(self, config: ModelConfig, itemsize: int, free: int) -> None:
        check_lora_memory(config, self._config.max_loras, self.max_rank, itemsize, free)

    def load(self, part: WholeModel, model: CausalLM) -> Adapters:
        add_slots(model.linears, num_lora_slots(self._config.max_loras), self.max_rank)
        new_adapters = part.new_adapters or LoraAdapters
        adapters: LoraAdapters = new_adapters(model.linears, self._config.max_loras, self.max_rank)
        for name, checkpoint in self._checkpoints.items():
            adapters.load(name, self._config.lora_modules[name], checkpoint)
        return adapters


def check_lora_memory(config: ModelConfig, max_loras: int, rank: int, itemsize: int, free: int) -> None:
    """Check that the slots fit in the free memory. `itemsize` and `free` are bytes. Raises ValueError."""
    layers = range(config.num_hidden_layers)
    numbers = sum(sum(shape) for layer in layers for shape in module_shapes(config, layer).values())
    num_bytes = num_lora_slots(max_loras) * rank * numbers * itemsize
    if num_bytes > free:
        raise ValueError(
            f"--max-loras {max_loras} of --max-lora-rank {rank} take {num_bytes / MIB:.0f} MiB, but only "
            f"{free / MIB:.0f} MiB are free"
        )


def choose_lora_rank(config: EngineConfig, checkpoints: Mapping[str, LoraCheckpoint]) -> int:
    """Return the largest rank that a slot can hold.

    That is `max_lora_rank` if set, else the largest rank of the adapters loaded at start, at least DEFAULT_MAX_RANK.
    """
    largest = max((checkpoint.rank for checkpoint in checkpoints.values()), default=0)
    return config.max_lora_rank or max(DEFAULT_MAX_RANK, largest)
