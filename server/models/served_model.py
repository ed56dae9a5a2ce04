"""A model that is served, and its LoRA adapters: what a request needs of the model that it names."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from engine.config import ModelConfig
from engine.shared.messages import EngineInfo, LoraAdapter
from server.constrained.grammar_process import GrammarProcess
from server.engine_client.client import EngineClient
from server.metrics import Metrics
from server.schemas.default_sampling import DefaultSampling
from server.settings.table import Settings
from server.text.templates.chat_template import ChatTemplate
from server.text.token_sequences import SequenceBreakers
from server.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ServedModel:
    """A base model: its text tools, and the client of its engine."""

    settings: Settings
    names: tuple[str, ...]  # accepted in `model`; the first is the id in responses
    path: Path
    client: EngineClient
    metrics: Metrics
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None  # None: the model has none, and chat requests are rejected
    grammar_process: GrammarProcess
    config: ModelConfig
    default_sampling: DefaultSampling  # of the model and its adapters
    score_token_ids: tuple[int, ...] = ()  # of --score-tokens: true, false

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def max_model_len(self) -> int:
        """Maximum tokens of prompt and output together. Raises EngineUnavailableError while the engine is not ready."""
        return self.client.ready_info().max_model_len

    @property
    def deterministic(self) -> str:
        """Return whether answers are the same in any batch, as a header value."""
        return "true" if self.client.ready_info().deterministic else "false"

    @cached_property
    def variants(self) -> "dict[str, ModelVariant]":
        """The model under each of its names, without its adapters."""
        return {name: ModelVariant(name, self) for name in self.names}

    @cached_property
    def template_fingerprint(self) -> str:
        source = "" if self.chat_template is None else self.chat_template.source
        return hashlib.sha256(source.encode()).hexdigest()[:12]

    @cached_property
    def sequence_breakers(self) -> SequenceBreakers:
        return SequenceBreakers(self.tokenizer)

    async def close(self) -> None:
        """Close the connection to the engine, and end the processes of grammars and of the chat template."""
        await self.client.close()
        await self.grammar_process.close()
        if self.chat_template is not None:
            self.chat_template.close()


@dataclass
class ModelVariant:
    """A base model under one of its names, or one of its LoRA adapters, as selected by a request's `model` field."""

    name: str
    base: ServedModel
    adapter: LoraAdapter | None = None
    _fingerprint: tuple[EngineInfo | None, str] = (None, "")  # of the latest engines

    @property
    def lora_name(self) -> str:
        """Name of the adapter, or "" for the base model."""
        return "" if self.adapter is None else self.adapter.name

    @property
    def lora_fingerprint(self) -> str:
        """Hash of the adapter's weights, or "" for the base model. A name can be reused for other weights."""
        return "" if self.adapter is None else self.adapter.fingerprint

    def system_fingerprint(self, info: EngineInfo) -> str:
        """Return an id of everything outside the request that affects the output.

        It covers the engine, the adapter, a chat template given by --chat-template, the default sampling, and
        --allow-additional-properties.
        """
        if self._fingerprint[0] is not info:
            base = self.base
            parts = [info.fingerprint]
            if self.adapter is not None:
                parts.append(self.adapter.fingerprint[:12])
            if base.settings.chat_template is not None:
                parts.append(base.template_fingerprint)
            if base.default_sampling.fingerprint:
                parts.append(base.default_sampling.fingerprint)
            if base.settings.allow_additional_properties:
                parts.append("open")
            self._fingerprint = info, "-".join(parts)
        return self._fingerprint[1]
