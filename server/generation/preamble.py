"""The first checks of every request: find its model, and refuse or report the fields that the server ignores."""

import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from fastapi import Request
from pydantic import BaseModel

from server.context import ServerContext, get_context
from server.generation.parameters import derive_seed
from server.http.errors import MissingParameterError, UnknownParameterError, UnsupportedParameterError, clip
from server.models.served_model import ModelVariant
from server.tenants import Tenant, get_tenant

WARNINGS = "x-lightwell-warnings"  # response header
MAX_WARNINGS_CHARS = 1024  # length of its list of ignored parameters
MAX_IGNORED = 1000  # fields without effect that are counted

# Parameters of older vLLM -> fields of structured_outputs.
GUIDED = {f"guided_{kind}": f"structured_outputs.{kind}" for kind in ("json", "regex", "choice", "grammar")}

# Parameters that change an answer and that no endpoint, or not every endpoint, supports -> values that are accepted
# in addition to null because they leave the answer as it is.
UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    **dict.fromkeys(("audio", "moderation", "structural_tag", "guided_whitespace_pattern", "prompt_embeds"), ()),
    **dict.fromkeys((*GUIDED, "json_schema", "regex", "ebnf", "stop_regex", "custom_logit_processor", "lora_path"), ()),
    **dict.fromkeys(("truncate_prompt_tokens", "chat_template", "max_completion_tokens"), ()),
    **dict.fromkeys(("thread", "compaction", "conversation", "prompt", "kv_transfer_params"), ()),
    **dict.fromkeys(("tools", "functions", "logits_processors", "documents", "lora"), ([],)),
    **dict.fromkeys(("use_beam_search", "continue_final_message", "add_special_tokens"), (False,)),
    **dict.fromkeys(("return_prompt_text", "echo"), (False,)),
    **dict.fromkeys(("parallel_tool_calls", "include_reasoning"), (True, False)),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    **dict.fromkeys(("grammar", "suffix"), ("",)),
    **dict.fromkeys(("n_predict", "thinking_budget_tokens", "reasoning_budget_tokens"), (-1,)),
    **dict.fromkeys(("n_probs", "top_a", "no_repeat_ngram_size", "epsilon_cutoff", "eta_cutoff"), (0,)),
    **dict.fromkeys(("smoothing_factor", "dynatemp_range", "mirostat_mode"), (0,)),
    **dict.fromkeys(("best_of", "tfs_z"), (1,)),
    "t_max_predict_ms": (0, -1),
    "reasoning_format": ("auto", "deepseek"),
    "modalities": (["text"],),
    "vllm_xargs": ({},),
    "logprobs_mode": ("raw_logprobs",),
}

# Parameters of other servers -> the parameter to use instead.
ALTERNATIVES: Mapping[str, str] = {
    **GUIDED,
    "functions": "tools",
    "function_call": "tool_choice",
    "max_completion_tokens": "max_tokens",
    "structural_tag": "structured_outputs.structural_tag",
    "n_predict": "max_tokens",
    "n_probs": "logprobs",
    "thinking_budget_tokens": "thinking_token_budget",
    "reasoning_budget_tokens": "thinking_token_budget",
    "lora_path": "the adapter's name as model",
    "lora": "the adapter's name as model",
}

# Hints, and requests for what only the server of another vendor has: ignored, and named unless the value is null or one
# of these.
HINTS: Mapping[str, tuple[object, ...]] = {
    **dict.fromkeys(("prediction", "web_search_options", "personality", "image", "access_programs"), ()),
    **dict.fromkeys(("background_options", "container", "diagnostics", "inference_geo"), ()),
    **dict.fromkeys(("chat_template_kwargs", "mm_processor_kwargs"), ({},)),
    **dict.fromkeys(("mcp_servers", "fallbacks"), ([],)),
    "verbosity": ("medium",),
    "reasoning_effort": ("none", "medium"),
    "context_management": ([], {}),
    "speed": ("standard",),
}

# Known parameters that do not change the text of an answer.
HARMLESS = frozenset(
    (
        *("user", "store", "metadata", "service_tier", "safety_identifier"),
        *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "cache_control"),
        *("betas", "anthropic_beta", "anthropic_version", "user_profile_id", "workspace_id"),
        *("billing_policy", "fallback_credit_token", "guided_decoding_backend"),
        "spaces_between_special_tokens",  # no spaces are added between special tokens
        *("length_penalty", "early_stopping", "dynatemp_exponent", "smoothing_curve"),  # of others, in UNSUPPORTED
    )
)

OBJECT_FIELDS = ("stream_options", "lightwell", "structured_outputs")  # which may have unknown fields, too


@dataclass(frozen=True, slots=True)
class Preamble:
    """The result of the first checks of a request."""

    context: ServerContext
    ignored: list[str]  # fields without effect
    is_model_missing: bool = False  # whether the only model is used because the request names none

    def ignore(self, names: Sequence[str]) -> None:
        """Add further fields without effect. Raises UnknownParameterError if the server is strict."""
        if names and self.context.settings.strict:
            raise UnknownParameterError(clip(names[0]))
        self.ignored.extend(names[: MAX_IGNORED - len(self.ignored)])

    def accept(self) -> dict[str, str]:
        """Count the ignored fields, and return the response header with the warnings if there are any."""
        if self.ignored:
            self.context.metrics.count_unknown_parameters(len(self.ignored))
        warnings = [warnings_header(self.ignored)] if self.ignored else []
        if self.is_model_missing:
            warnings.append("model missing: the only one is used")
        return {WARNINGS: "; ".join(warnings)} if warnings else {}


def find_model(request: Request, name: str | None) -> ModelVariant:
    """Return the model or LoRA adapter with this name; None: the server's only model.

    Raises:
        MissingParameterError: the name is empty, or None although there are several models.
        ModelNotFoundError: there is no such model.
        EngineUnavailableError: it is an adapter that is loaded together with the engine, which is not ready.
    """
    return get_context(request).models.find(name, get_tenant(request))


def find_generating_model(context: ServerContext, name: str | None, tenant: Tenant) -> ModelVariant:
    """Do as `find_model` for a request that should name its model, but need not if there is only one.

    Raises MissingParameterError if there are more models or LoRA adapters, or the server is strict.
    """
    if name is None and (context.settings.strict or context.models.is_ambiguous(tenant)):
        raise MissingParameterError("model")
    return context.models.find(name, tenant)


def begin(
    request: Request, body: BaseModel, *, is_model_missing: bool = False, ignored: Sequence[str] = ()
) -> Preamble:
    """Check the undeclared fields of a request.

    Args:
        is_model_missing: whether the request should have named its model.
        ignored: further fields without effect, such as options that the chat template does not read.

    Raises:
        UnsupportedParameterError: a field cannot be ignored, because it would change the answer.
        UnknownParameterError: a field is ignored, and the server is strict.
    """
    context = get_context(request)
    names: list[str] = []
    if body.model_extra or not body.model_fields_set.isdisjoint(OBJECT_FIELDS):
        names = ignored_fields(body, strict=context.settings.strict)
    preamble = Preamble(context, names, is_model_missing)
    if ignored:
        preamble.ignore(ignored)
    return preamble


def ignored_fields(body: BaseModel, *, strict: bool) -> list[str]:
    """Return the names of the unknown fields of a request, at most `MAX_IGNORED`.

    Raises UnsupportedParameterError for a field that cannot be ignored, UnknownParameterError for any if `strict`.
    """
    for name, value in undeclared_fields(body):
        if name in UNSUPPORTED and not _is_neutral(value, UNSUPPORTED[name]):
            raise UnsupportedParameterError(name, f"Use {ALTERNATIVES[name]}." if name in ALTERNATIVES else None)
    names = [
        name
        for name, value in undeclared_fields(body)
        if not (name in UNSUPPORTED or name in HARMLESS or (name in HINTS and _is_neutral(value, HINTS[name])))
    ]
    for part in OBJECT_FIELDS:
        nested = islice(undeclared_fields(getattr(body, part, None)), MAX_IGNORED)
        names += [f"{part}.{name}" for name, _ in nested]
    names = names[:MAX_IGNORED]
    if names and strict:
        raise UnknownParameterError(clip(names[0]))
    return names


def distinct(names: Iterable[str]) -> list[str]:
    """Return each of the names of ignored fields once, at most `MAX_IGNORED`."""
    found: dict[str, None] = {}
    for name in names:
        found[name] = None
        if len(found) == MAX_IGNORED:
            break
    return list(found)


def undeclared_fields(model: object) -> Iterator[tuple[str, object]]:
    """Yield the fields of a request object that its model does not declare. Other values have none."""
    extra = model.model_extra if isinstance(model, BaseModel) else None
    yield from (extra or {}).items()


def _is_neutral(value: object, neutral_values: tuple[object, ...]) -> bool:
    return value is None or any(
        value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral_values
    )


def warnings_header(names: Sequence[str]) -> str:
    """Return one line of printable ASCII that lists the names, cut to about MAX_WARNINGS_CHARS."""
    first = names[:MAX_WARNINGS_CHARS]  # each takes a character at least
    shown = [re.sub(r"[^A-Za-z0-9_.\[\]-]", "?", clip(name, 80)) or "?" for name in first]
    text = f"ignored parameters: {', '.join(shown)}"
    return text if len(text) <= MAX_WARNINGS_CHARS else f"{text[:MAX_WARNINGS_CHARS].rsplit(', ', 1)[0]}, ..."


async def next_seed(context: ServerContext) -> int:
    """Return the seed of a request that has none: 64 random bits, or one derived from the server's seed."""
    seed = context.settings.seed
    if seed is None:
        return secrets.randbits(64) - 2**63
    return derive_seed(seed, await context.ledger.take_number(), b"request")
