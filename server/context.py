"""The objects that all handlers share, created once at start-up and passed to `create_app`."""

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, TypeVarTuple, Unpack, cast

from starlette.requests import Request

from engine.config import ModelConfig
from engine.shared.messages import LoraAdapter
from server.access.api_keys import ApiKeys
from server.constrained.constraints import ConstraintBuilder
from server.constrained.grammar_checker import GrammarChecker
from server.engine_client.answer_budget import AnswerBudget, AnswerShare
from server.engine_client.answer_size import too_large_error
from server.engine_client.client import EngineClient
from server.http.body_middleware import get_text_size
from server.http.errors import MissingParameterError, ModelNotFoundError
from server.http.json_response import AnswerResponse
from server.metrics import Metrics
from server.recordings import Recordings
from server.running_requests import RunningRequests
from server.schemas.default_sampling import DefaultSampling
from server.settings.table import Settings
from server.tenants import Tenant, get_tenant
from server.text.templates.chat_template import ChatTemplate
from server.text.text_threads import TextThreads
from server.text.token_sequences import SequenceBreakers
from server.text.tokenizer import Tokenizer
from server.weight_files import WeightFiles, describe_weights

if TYPE_CHECKING:
    from server.otel.tracer import Tracer

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

LONG_BYTES = 1 << 14  # of a request; converting several hundred messages takes some ten milliseconds


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The base model or a LoRA adapter, as selected by a request's `model` field."""

    name: str
    adapter: LoraAdapter | None = None

    @property
    def lora_name(self) -> str:
        """Name of the adapter, or "" for the base model."""
        return "" if self.adapter is None else self.adapter.name

    @property
    def lora_fingerprint(self) -> str:
        """Hash of the adapter's weights, or "" for the base model. A name can be reused for other weights."""
        return "" if self.adapter is None else self.adapter.fingerprint


@dataclass(frozen=True)
class ServerContext:
    """Settings, the model's text tools, the engine client and the state shared by all requests."""

    settings: Settings
    client: EngineClient
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None  # None: the model has none, and chat requests are rejected
    grammar_checker: GrammarChecker
    model_config: ModelConfig
    default_sampling: DefaultSampling  # of the model and its adapters
    model_path: Path
    model_names: tuple[str, ...]  # accepted in `model`; the first is the id in responses
    created: int  # Unix time in seconds
    metrics: Metrics
    running: RunningRequests
    recordings: Recordings
    api_keys: ApiKeys
    answers: AnswerBudget
    score_token_ids: tuple[int, ...] = ()  # of --score-tokens: true, false
    background_tasks: set[asyncio.Task[None]] = field(default_factory=set)  # asyncio itself holds only weak references
    text_threads: TextThreads = field(default_factory=TextThreads)
    tracer: "Tracer | None" = None  # None: without --otlp-endpoint
    num_step_readers: Counter[str] = field(default_factory=Counter)  # streams of steps, by tenant

    async def run_text_work(self, request: Request, function: Callable[[Unpack[Ts]], T], *args: *Ts) -> T:
        """Run `function`, which works on the texts of a request, in a thread."""
        return await self.text_threads.run(get_tenant(request), get_text_size(request), function, *args)

    async def convert(self, request: Request, function: Callable[[Unpack[Ts]], T], *args: *Ts) -> T:
        """Run `function`, which converts a request of one API to another's, in a thread if the request is long."""
        if get_text_size(request) <= LONG_BYTES:
            return function(*args)
        return await self.run_text_work(request, function, *args)

    def long_answer(self, request: Request, content: bytes, headers: Mapping[str, str] | None = None) -> AnswerResponse:
        """Return an answer, as JSON, that counts in the memory limit of answers until it is sent."""
        too_large = too_large_error(None, "answer", self.answers.max_bytes)
        share = AnswerShare(self.answers, get_tenant(request), lambda error: None, too_large)
        share.add(len(content))
        return AnswerResponse(content, share, headers or {})

    def served_models(self, tenant: Tenant) -> list[ServedModel]:
        """Return the base model under each of its names, then the loaded adapters that the tenant may use."""
        adapters = [(name, adapter) for name, adapter in self.client.adapters.items() if tenant.may_use(name)]
        return [*map(ServedModel, self.model_names), *(ServedModel(name, adapter) for name, adapter in adapters)]

    def find_model(self, name: str, tenant: Tenant) -> ServedModel:
        """Return the model or adapter with this name.

        Raises:
            MissingParameterError: The name is empty.
            ModelNotFoundError: There is no such model or adapter for the tenant.
            EngineUnavailableError: The adapter is loaded at start-up, and the engine is not ready yet.
        """
        if not name:
            raise MissingParameterError("model")
        if name in self.model_names:
            return ServedModel(name)
        if name in self.client.adapters and tenant.may_use(name):
            return ServedModel(name, self.client.adapters[name])
        if self.client.info is None and name in self.settings.lora_paths and tenant.may_use(name):
            self.client.ready_info()
        raise ModelNotFoundError(name, [model.name for model in self.served_models(tenant)])

    def system_fingerprint(self, model: ServedModel) -> str:
        """Return an id of everything outside the request that affects the output.

        It covers the engine, the adapter, a chat template given by --chat-template, the default sampling, and
        --allow-additional-properties. Raises EngineUnavailableError while the engine is not ready.
        """
        parts = [self.client.ready_info().fingerprint]
        if model.adapter is not None:
            parts.append(model.adapter.fingerprint[:12])
        if self.settings.chat_template is not None:
            parts.append(self._template_fingerprint)
        if self.default_sampling.fingerprint:
            parts.append(self.default_sampling.fingerprint)
        if self.settings.allow_additional_properties:
            parts.append("open")
        return "-".join(parts)

    @property
    def deterministic(self) -> str:
        """Return whether answers are the same in any batch, as a header value."""
        return "true" if self.client.ready_info().deterministic else "false"

    @cached_property
    def _template_fingerprint(self) -> str:
        source = "" if self.chat_template is None else self.chat_template.source
        return hashlib.sha256(source.encode()).hexdigest()[:12]

    @cached_property
    def constraint_builder(self) -> ConstraintBuilder:
        return ConstraintBuilder(self.tokenizer, self.settings.allow_additional_properties)

    @cached_property
    def weight_files(self) -> WeightFiles:
        """The model's files. The first call reads their headers. Raises OSError or ValueError."""
        return describe_weights(self.model_path)

    @cached_property
    def sequence_breakers(self) -> SequenceBreakers:
        return SequenceBreakers(self.tokenizer)

    @property
    def max_model_len(self) -> int:
        """Maximum tokens of prompt and output together. Raises EngineUnavailableError while the engine is not ready."""
        return self.client.ready_info().max_model_len


def get_context(request: Request) -> ServerContext:
    """Return the context of the application that handles the request."""
    return cast("ServerContext", request.app.state.context)
