"""A model that is served, and its LoRA adapters: what a request needs of the model that it names."""

import hashlib
import logging
import math
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from engine.config import ModelConfig, load_model_config
from engine.shared.messages import EngineInfo, LoraAdapter, Vocabulary
from server.constrained.grammars import Grammars, GrammarVocabulary
from server.engine_client.admission import AdmissionLimits
from server.engine_client.client import EngineClient
from server.engine_client.connected_engine import EngineOptions
from server.http.errors import EngineUnavailableError
from server.metrics import Metrics
from server.part_table import hardened, load_module
from server.schemas.sampling import DefaultSampling, resolve_default_sampling, unknown_models
from server.settings.process_configs import ServedModelConfig
from server.settings.table import Settings
from server.text.templates.chat_template import UNRECOGNIZED, ChatTemplate
from server.text.templates.sandbox import SandboxedTemplate
from server.text.token_sequences import SequenceBreakers
from server.text.tokenizer import Tokenizer

logger = logging.getLogger("lightwell.api")


@dataclass(frozen=True)
class ServedModel:
    """A base model: its text tools, and the client of its engine."""

    settings: Settings
    names: tuple[str, ...]  # accepted in `model`; the first is the id in responses
    client: EngineClient
    metrics: Metrics
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None  # None: the model has none, and chat requests are rejected
    grammars: Grammars
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
    def sequence_breakers(self) -> SequenceBreakers:
        return SequenceBreakers(self.tokenizer)

    async def close(self) -> None:
        """Close the connection to the engine, and end the processes of grammars and of the chat template."""
        await self.client.close()
        self.grammars.close()
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
            if base.settings.chat_template is not None and base.chat_template is not None:
                parts.append(hashlib.sha256(base.chat_template.source.encode()).hexdigest()[:12])
            if base.default_sampling.fingerprint:
                parts.append(base.default_sampling.fingerprint)
            if base.settings.allow_additional_properties:
                parts.append("open")
            self._fingerprint = info, "-".join(parts)
        return self._fingerprint[1]


def load_served_model(
    config: ServedModelConfig, metrics: Metrics, *, can_restart: bool, client: EngineClient | None = None
) -> ServedModel:
    """Create the text tools of a model and, unless it is given, the client of its engine, which is not connected yet.

    `can_restart`: whether the supervisor replaces an engine that dies. Raises OSError or ValueError if the model's
    files, or those of its settings, are missing or invalid.
    """
    settings, path = config.settings, Path(config.path)
    tokenizer = Tokenizer.from_model(path)
    model_config = load_model_config(path)
    vocabulary = tokenizer.to_json()
    score_token_ids = ()
    if settings.score_tokens is not None:
        find_tokens = load_module("rerank", "part").find_score_tokens
        score_token_ids = find_tokens(tokenizer, settings.score_tokens, model_config.num_token_ids)
    return ServedModel(
        settings=settings,
        names=config.names,
        client=client or _make_client(config, vocabulary, metrics, can_restart=can_restart),
        metrics=metrics,
        tokenizer=tokenizer,
        grammars=Grammars(
            GrammarVocabulary(
                vocabulary,
                [*model_config.eos_token_ids],
                tokenizer.special_ids_in(tokenizer.special_tokens),
                settings.allow_additional_properties,
            )
        ),
        config=model_config,
        default_sampling=_default_sampling(config, model_config),
        score_token_ids=score_token_ids,
        # The last one, since it starts a process.
        chat_template=make_chat_template(tokenizer, settings.chat_template),
    )


def _make_client(config: ServedModelConfig, vocabulary: str, metrics: Metrics, *, can_restart: bool) -> EngineClient:
    settings = config.settings
    options = EngineOptions(
        step_timeout=settings.step_timeout,
        can_restart=can_restart and settings.on_engine_death == "restart",
        vocabulary=Vocabulary(vocabulary),
    )
    limits = AdmissionLimits(
        max_queued_requests=settings.max_queued_requests,
        queue_timeout=settings.queue_timeout,
        request_timeout=settings.request_timeout or math.inf,
    )
    new_client: type[EngineClient] = EngineClient
    if len(config.engines) > 1:
        new_client = load_module("data_parallel", "client").GroupClient
    return new_client(config.engines, options, limits=limits, metrics=metrics)


def _default_sampling(config: ServedModelConfig, model_config: ModelConfig) -> DefaultSampling:
    """Resolve the default sampling and log it. Raises ValueError if a source has an invalid field."""
    files = "generation_config.json" if Path(config.path).is_dir() else "GGUF metadata general.sampling"
    setting, names = config.settings.default_sampling, {config.settings.model, *config.names}
    if unknown := unknown_models(setting, names):
        message = "--default-sampling: no effect for %s, which is none of this model's names (%s)"
        logger.warning(message, ", ".join(unknown), ", ".join(sorted(names)))
    default = resolve_default_sampling(
        setting, names, [(files, model_config.recommended_sampling), ("model card", config.card_sampling)]
    )
    logger.info("default sampling: %s; a request's own fields have precedence", default)
    return default


def make_chat_template(tokenizer: Tokenizer, file: str | None) -> ChatTemplate | None:
    """Compile the chat template in `file`, or the model's own if `file` is None.

    Returns None if there is neither. Raises ValueError if the template is invalid or the file cannot be read.
    """
    if file is None:
        try:
            return None if tokenizer.chat_template is None else _compile(tokenizer, tokenizer.chat_template)
        except ValueError as error:
            raise ValueError(f"{error} --chat-template FILE replaces the model's template.") from error
    try:
        return _compile(tokenizer, Path(os.path.expanduser(file)).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror or error if isinstance(error, OSError) else error
        raise ValueError(f"--chat-template {file}: {reason}") from error


def _compile(tokenizer: Tokenizer, source: str) -> ChatTemplate:
    renderer = hardened("template_processes", "TemplateProcesses", SandboxedTemplate)(source)
    try:
        template = ChatTemplate(renderer, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)
    except EngineUnavailableError as error:  # its processes hang or are killed
        renderer.close()
        raise ValueError(error.message) from error
    except BaseException:
        renderer.close()
        raise
    if template.missing_part is not None:
        logger.warning("the chat template writes tool calls that are no JSON objects: %s", template.missing_part)
    elif template.tool_format_name == UNRECOGNIZED:
        logger.warning("the chat template writes tool calls in a form that is not recognized; a generic one is used")
    if template.reasoning_format_name == UNRECOGNIZED:
        logger.warning("the chat template has a switch for reasoning, but its tags are not recognized: it is content")
    return template
