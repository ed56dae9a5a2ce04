"""The LoRA adapters of a model (Hu et al. 2021): which are loaded, and which slot holds the matrices of each.

Requests with different adapters run in one step: each row of a batch has the slot of its adapter, and each linear layer
adds B (A x) with the matrices in that slot. A request identifies its adapter's weights by their fingerprint. They are
still found after the adapter was unloaded, or its name given to other weights, until the slot is reused.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engine.batch.transfer import send, to_device
from engine.config import EngineConfig, ModelConfig
from engine.loading import AdapterGoneError, AdapterLoader, Adapters, WholeModel
from engine.model import CausalLM
from engine.model.linear import Linear
from engine.model.memory_plan import MIB
from engine.parts.lora.checkpoint import LoraCheckpoint, LoraMatrices, module_shapes
from engine.parts.lora.formats import CONFIG_NAME, read_folder, read_gguf
from engine.parts.lora.layers import LoraLayer, add_slots
from engine.scheduling.request import NO_LORA_SLOT
from engine.shared.messages import AdapterField, LoraAdapter

EMPTY = ""  # in the list of fingerprints: a slot without an adapter


class AdapterError(ValueError):
    """An adapter cannot be loaded or unloaded; the message is for the client."""

    def __init__(self, message: str, field: AdapterField | None = None, *, is_temporary: bool = False) -> None:
        super().__init__(message)
        self.field = field
        self.is_temporary = is_temporary


@dataclass(frozen=True)
class LoadedAdapter:
    slot: int
    adapter: LoraAdapter


class LoraAdapters(Adapters):
    """The loaded adapters by name, and the fingerprint of the weights in each slot.

    There is one slot more than adapters can be loaded, so that an adapter can be replaced while requests use it.
    """

    def __init__(self, linears: Sequence[Linear], max_loras: int, max_rank: int) -> None:
        self.max_loras = max_loras
        self.max_rank = max_rank
        self.num_slots = num_lora_slots(max_loras)
        self._linears = [
            (linear.names, layer) for linear in linears for layer in linear.additions if isinstance(layer, LoraLayer)
        ]
        self._loaded: dict[str, LoadedAdapter] = {}
        self._fingerprints = [EMPTY] * self.num_slots  # of the weights in each slot
        self._unloaded_at = [0] * len(self._fingerprints)  # tick at which the slot's adapter was unloaded; 0: never
        self._ticks = itertools.count(1)

    def loaded(self) -> list[LoraAdapter]:
        """Return the loaded adapters, in the order in which they were loaded."""
        return [loaded.adapter for loaded in self._loaded.values()]

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots, in use or not."""
        return sum(weights.a.nbytes + weights.b.nbytes for _, weights in self._linears)

    def find(self, fingerprint: str) -> int:
        """Return the slot with these weights, NO_LORA_SLOT for an empty fingerprint. Raises AdapterGoneError."""
        if not fingerprint:
            return NO_LORA_SLOT
        for loaded in self._loaded.values():  # first, so that slots of unloaded adapters get free
            if loaded.adapter.fingerprint == fingerprint:
                return loaded.slot
        if fingerprint not in self._fingerprints:
            raise AdapterGoneError(fingerprint)
        return self._fingerprints.index(fingerprint)

    def check(self, slot: int, fingerprint: str) -> None:
        """Check that a slot still holds the weights that `find` found there. Raises AdapterGoneError."""
        if slot != NO_LORA_SLOT and self._fingerprints[slot] != fingerprint:
            raise AdapterGoneError(fingerprint)

    def check_name(self, name: str, *, replaces: bool) -> None:
        """Check that an adapter can be loaded under this name, replacing one if `replaces`. Raises AdapterError."""
        if name in self._loaded and not replaces:
            raise AdapterError(f"a LoRA adapter called {name} is loaded already", AdapterField.NAME)
        if name not in self._loaded and len(self._loaded) >= self.max_loras:
            raise AdapterError(
                f"LoRA adapter {name}: {self.max_loras} adapters are loaded, as many as --max-loras allows"
            )

    def reserve(self, in_use: Collection[int]) -> int | None:
        """Empty and return a slot without a loaded adapter and not `in_use` by requests; None if there is none.

        Slots that were never used come first, then the one whose adapter was unloaded first.
        """
        occupied = {loaded.slot for loaded in self._loaded.values()}.union(in_use)
        free = [slot for slot in range(len(self._fingerprints)) if slot not in occupied]
        if not free:
            return None
        slot = min(free, key=lambda slot: self._unloaded_at[slot])
        self._fingerprints[slot] = EMPTY
        return slot

    def write(self, slot: int, checkpoint: LoraCheckpoint) -> Iterator[None]:
        """Write the matrices into a reserved slot; yields after each linear layer."""
        for index, (names, _) in enumerate(self._linears):
            matrices = {name: checkpoint.modules[name] for name in names if name in checkpoint.modules}
            self.write_layer(index, slot, matrices)
            yield

    @torch.inference_mode()
    def write_layer(self, index: int, slot: int, matrices: Mapping[str, LoraMatrices]) -> None:
        """Write the matrices of one linear layer. Projections that the adapter does not update get rank 0."""
        names, weights = self._linears[index]
        device = weights.ranks.device
        first = 0
        ranks = [0] * len(names)
        for number, (name, size) in enumerate(zip(names, weights.sizes, strict=True)):
            if (update := matrices.get(name)) is not None:
                rank = ranks[number] = len(update.a)
                weights.a[slot, number, :rank] = send(update.a, device)
                weights.b[slot, :rank, first : first + size] = send(update.b, device).T
            first += size
        weights.ranks[slot] = to_device(ranks, np.int64, device)

    def publish(self, name: str, path: str, slot: int, checkpoint: LoraCheckpoint) -> None:
        """Make the weights that were written to a slot available under a name, in place of the name's old weights."""
        self._remove(name)
        self._fingerprints[slot] = checkpoint.fingerprint
        adapter = LoraAdapter(name=name, path=path, rank=checkpoint.rank, fingerprint=checkpoint.fingerprint)
        self._loaded[name] = LoadedAdapter(slot, adapter)

    def load(self, name: str, path: str, checkpoint: LoraCheckpoint) -> None:
        """Load an adapter at once, while no request runs. Raises AdapterError."""
        self.check_name(name, replaces=False)
        slot = self.reserve(in_use=())
        assert slot is not None
        for _ in self.write(slot, checkpoint):
            pass
        self.publish(name, path, slot, checkpoint)

    def unload(self, name: str) -> None:
        """Remove an adapter by name; its weights stay in their slot. Raises AdapterError if it is not loaded."""
        if name not in self._loaded:
            raise AdapterError(f"no LoRA adapter called {name} is loaded", AdapterField.NAME)
        self._remove(name)

    def _remove(self, name: str) -> None:
        if (loaded := self._loaded.pop(name, None)) is not None:
            self._unloaded_at[loaded.slot] = next(self._ticks)


def num_lora_slots(max_loras: int) -> int:
    """Return the number of slots for `max_loras` adapters: one more, or none at all."""
    return max_loras + 1 if max_loras else 0


def read_adapter(name: str, path: str, config: ModelConfig, max_rank: int | None) -> LoraCheckpoint:
    """Read an adapter's matrices, of rank `max_rank` at most. Raises AdapterError, which names the adapter."""
    try:
        return load_lora(Path(path), config, max_rank)
    except ValueError as error:
        raise AdapterError(f"LoRA adapter {name}: {error}", AdapterField.PATH) from error


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


def load_lora(path: Path, config: ModelConfig, max_rank: int | None = None) -> LoraCheckpoint:
    """Read the adapter at `path`, for the model that `config` describes.

    Raises:
        ValueError: a file is missing or damaged, or a pickle file; or the adapter is not plain LoRA, is for another
            model, or has a rank above `max_rank`. The message names the file. No other exception is raised, whatever
            the files hold.
    """
    try:
        if path.is_dir():
            modules = read_folder(path, config, max_rank)
        elif path.is_file():
            modules = read_gguf(path, config, max_rank)
        else:
            raise ValueError(f"{path}: no such adapter (expected a GGUF file, or a folder with {CONFIG_NAME})")
        return LoraCheckpoint(modules, _fingerprint(modules))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ArithmeticError, LookupError, MemoryError, RuntimeError) as error:  # from torch, NumPy and `gguf`
        raise ValueError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error


def _fingerprint(modules: dict[str, LoraMatrices]) -> str:
    """Hash the names, shapes and numbers of all matrices, so that an adapter has one fingerprint in all formats."""
    digest = hashlib.sha256()
    for module, matrices in sorted(modules.items()):
        digest.update(json.dumps([module, list(matrices.a.shape), list(matrices.b.shape)]).encode())
        for matrix in (matrices.a, matrices.b):
            digest.update(matrix.contiguous().numpy().data)
    return digest.hexdigest()
