"""`POST /lightwell/v1/inspect`: what happens inside the model, computed again for one request or prompt."""

from array import array
from collections.abc import Iterable
from functools import cache, partial
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Request, Response
from pydantic import Field

from engine.parts.inspection.records import Inspect, Inspected, InspectionProblem, LayerView, PositionView, StageView
from server.dialect import ModelRoute
from server.generation.preamble import begin, find_model
from server.generation.prompts import encode_prompt
from server.http import errors
from server.models.served_model import ServedModel
from server.parts.inspection.access import RecordAccess, check_may_read
from server.schemas.request_fields import OpenObject, optional
from server.text.choice_text import token_text

MAX_POSITIONS = 64
MAX_END = 8192  # attention to so many positions takes the engine some milliseconds for each position and layer
MAX_ATTENDED = 1 << 17  # positions that are named for all heads of all layers at all positions, about 3 MB of JSON
MAX_TOP = 20
MAX_INT = 1 << 53  # of positions and indices: more fits into no message

PROBLEMS = {
    InspectionProblem.NO_BLOCKS: "Other requests need the free blocks of the KV cache. Please retry later.",
    InspectionProblem.TOO_SLOW: "The inspection did not come to its end beside other requests. Please retry later.",
    InspectionProblem.TOO_LONG: "Invalid 'end': the KV cache has too few blocks for so many positions.",
    InspectionProblem.NO_ADAPTER: "The LoRA adapter of this request is no longer loaded.",
    InspectionProblem.NOT_KEPT: "The tokens of this request are not kept. With API keys, --record-requests keeps them.",
    InspectionProblem.NOT_FOUND: "No request with the id '{}' and this choice is running or among the last.",
}
CODES = {
    InspectionProblem.NO_ADAPTER: "adapter_not_loaded",
    InspectionProblem.NOT_KEPT: "tokens_not_kept",
    InspectionProblem.NOT_FOUND: "request_not_found",
}


class InspectRoute(ModelRoute):
    """A route for clients that may read records."""

    async def respond(self, request: Request, fields: dict[str, Any]) -> Response:
        await check_may_read(request, request.query_params.get("model"))
        return await super().respond(request, fields)


router = APIRouter(route_class=InspectRoute, dependencies=[Depends(check_may_read)])  # for the OpenAPI document


class InspectRequest(OpenObject):
    """Either the id of a request, or a prompt."""

    id: str | None = optional("Of the answer, or its x-request-id.")
    prompt_index: int = Field(0, ge=0, le=MAX_INT, description="Which of the request's prompts.")
    index: int = Field(0, ge=0, le=MAX_INT, description="Which of the prompt's choices.")
    prompt: str | Annotated[list[int], Field(fail_fast=True)] | None = optional("A text, or token ids.")
    model: str | None = optional("Of a prompt: the model or LoRA adapter. Default: the model.")
    start: int | None = Field(
        None, ge=0, le=MAX_INT, description="First position. Default: 16 before the end; of a prompt 0."
    )
    end: int | None = Field(
        None, ge=1, le=MAX_INT, description="Position after the last one. Default: that of the last token."
    )
    top: int = Field(5, ge=1, le=MAX_TOP, description="How many tokens and attended positions are named.")
    layer: int | None = Field(None, ge=0, le=MAX_INT, description="With `head`: return its attention in full.")
    head: int | None = Field(None, ge=0, le=MAX_INT)

    def check(self, layer_heads: list[int]) -> None:
        """Raise BadRequestError if fields contradict each other, or the model's number of heads in each layer."""
        if self.id is None and self.prompt is None:
            raise errors.MissingParameterError("id")
        if self.id is not None and self.prompt is not None:
            raise errors.InvalidValueError("Expected either 'id' or 'prompt', but got both.", param="prompt")
        if self.id is not None and self.model is not None:
            raise errors.InvalidValueError("Expected 'model' only with 'prompt': a request has its own.", param="model")
        if (self.layer is None) != (self.head is None):
            missing = "layer" if self.layer is None else "head"
            raise errors.InvalidValueError("Expected 'layer' and 'head' together.", param=missing)
        if self.layer is not None and self.layer >= len(layer_heads):
            message = f"Invalid 'layer': expected 0 to {len(layer_heads) - 1}, but got {self.layer} instead."
            raise errors.InvalidValueError(message, param="layer")
        if self.layer is not None and self.head is not None and self.head >= layer_heads[self.layer]:
            message = f"Invalid 'head': layer {self.layer} has {layer_heads[self.layer]} heads, but got {self.head}."
            raise errors.InvalidValueError(message, param="head")


@router.post("/lightwell/v1/inspect")
async def inspect(request: Request, body: InspectRequest) -> Response:
    """Show what happens inside the model: logit lens, attention, norms, experts and the stages of the sampler."""
    if body.model is not None:
        request.state.model = body.model
    access = RecordAccess(request)
    model = find_model(request, access.model.name if body.model is None else body.model)
    access.model = base = model.base
    access.engine = base.client.engines[0]
    headers = begin(request, body).accept()
    layer_heads = [layer.attention.num_heads if layer.attention else 0 for layer in base.config.layers]
    body.check(layer_heads)
    token_ids: list[int] = []
    if body.prompt is not None:
        encode = partial(encode_prompt, limit=base.max_model_len)
        prompt = await access.context.run_text_work(request, encode, base, body.prompt)
        token_ids = prompt.token_ids
        if len(token_ids) > base.max_model_len:
            raise errors.ContextLengthExceededError(base.max_model_len, len(token_ids), noun="prompt")
    max_positions = min(MAX_POSITIONS, max(1, MAX_ATTENDED // (sum(layer_heads) * body.top)))
    question = Inspect(
        tenant=access.own_name,
        prompt=body.prompt_index,
        prompt_token_ids=token_ids,
        lora_name=model.lora_name,
        lora_fingerprint=model.lora_fingerprint,
        max_positions=max_positions,
        max_end=min(MAX_END, base.max_model_len),
        **{name: getattr(body, name) for name in ("id", "index", "start", "end", "top", "layer", "head")},
    )
    answer = await _ask_and_charge(access, question)
    if answer.problem is not None:
        raise _error(answer.problem, answer.num_tokens, body, question)
    return await access.respond(_inspection, base, body, answer, headers=headers)


async def _ask_and_charge(access: RecordAccess, question: Inspect) -> Inspected:
    """Return the answer of the engine. The positions that it computes count as the client's prompt tokens.

    For a client that leaves, those of its prompt count; how many a request has is known with the answer. Raises
    APIError.
    """
    num_tokens = min(len(question.prompt_token_ids), question.end or question.max_end)
    try:
        answer = await _ask(access, question)
        is_computed = answer.problem in (None, InspectionProblem.TOO_SLOW)
        num_tokens = max(num_tokens, answer.end) if is_computed else 0
        return answer
    except errors.APIError:
        num_tokens = 0
        raise
    finally:
        access.tenant.account.count_tokens(prompt=num_tokens)


async def _ask(access: RecordAccess, question: Inspect) -> Inspected:
    """Return the answer of the engine that has the request, or of the first one that is ready. Raises APIError."""
    first, *others = access.of_all_engines()
    answer = await first.ask(question, Inspected)
    for other in others:
        if answer.problem is InspectionProblem.NOT_FOUND:
            answer = await other.ask(question, Inspected)
    return answer


def _error(problem: InspectionProblem, num_tokens: int, body: InspectRequest, question: Inspect) -> errors.APIError:
    match problem:
        case InspectionProblem.BUSY:
            return errors.QueueFullError(1, "Another inspection runs. Please retry later.")
        case InspectionProblem.NO_BLOCKS | InspectionProblem.TOO_SLOW:
            return errors.EngineUnavailableError(PROBLEMS[problem], code="overloaded")
        case InspectionProblem.OUT_OF_RANGE:
            last, most = min(num_tokens, question.max_end), question.max_positions
            expected = f"0 <= start < end <= {last}, and at most {most} positions"
            message = f"Invalid 'end': of {num_tokens} positions, expected {expected} with this 'top'."
            return errors.InvalidValueError(message, param="end")
        case InspectionProblem.TOO_LONG:
            return errors.InvalidValueError(PROBLEMS[problem], param="end")
    return errors.APIError(404, PROBLEMS[problem].format(errors.clip(body.id or "")), code=CODES[problem], param="id")


# The answer.


class InspectedToken(msgspec.Struct, frozen=True):
    token_id: int
    token: str


class RankedToken(msgspec.Struct, frozen=True):
    token_id: int
    token: str
    logprob: float


class StateChange(msgspec.Struct, frozen=True):
    """What a token does to the state of a gated delta net: means over its heads."""

    kept: float  # share of the state that its decay leaves
    written: float  # strength with which the token is written, 0 to 1


class LayerInside(msgspec.Struct, frozen=True):
    """What a layer does at one position."""

    lens: list[RankedToken]  # what the final norm and the LM head make of the residual stream after this layer
    residual_norm: float  # L2 norms: of the residual stream after the layer,
    attention_norm: float  # of what attention adds to it,
    mlp_norm: float  # and of what MLP or experts add
    heads: list[list[tuple[int, float]]]  # of each head: positions and their weights, the largest first
    experts: list[tuple[int, float]] | None  # the router's choice, and its weights
    state: StateChange | None  # of a layer that has one in place of attention; null, too, for short convolutions


class PositionInside(msgspec.Struct, frozen=True, kw_only=True):
    """What happens at one position."""

    position: int
    layers: list[LayerInside]
    next: InspectedToken | None  # the token that follows
    recomputed: InspectedToken | None  # the token that the sampler chooses now; null: the next one is of the prompt
    is_equal: bool | None  # whether these are the same


class FullAttention(msgspec.Struct, frozen=True):
    """The attention of one head, for each position in the range."""

    layer: int
    head: int
    rows: list[list[float]]  # weights of the positions from 0 on


class Stage(msgspec.Struct, frozen=True):
    """The distribution after one stage of the sampler."""

    name: str
    num_tokens: int  # that are possible
    num_removed: int  # by this stage
    top: list[RankedToken]
    removed: list[RankedToken]  # the likeliest of those


class NoisyToken(msgspec.Struct, frozen=True):
    """A candidate. The one with the largest sum of logit and noise is chosen."""

    token_id: int
    token: str
    logit: float
    noise: float


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How the token after the last position is chosen."""

    position: int
    stages: list[Stage]
    noise: list[NoisyToken]  # empty for greedy decoding
    recomputed: InspectedToken | None
    sent: InspectedToken | None


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """What happens inside the model at some positions."""

    id: str | None
    model: str
    num_layers: int
    num_heads: int  # of the layer that has most
    num_experts: int
    num_prompt_tokens: int
    num_tokens: int
    start: int
    end: int
    tokens: list[InspectedToken]  # from position 0 to the end
    positions: list[PositionInside]
    attention: FullAttention | None
    sampling: Sampling | None
    is_equal: bool | None  # whether all recomputed tokens are those that were sent; null: there are none


class _Texts:
    """The texts of tokens, each looked up once."""

    def __init__(self, model: ServedModel) -> None:
        self._text = cache(partial(token_text, model.tokenizer))

    def token(self, token_id: int) -> InspectedToken:
        return InspectedToken(token_id, self._text(token_id))

    def ranked(self, pairs: Iterable[tuple[int, float]]) -> list[RankedToken]:
        return [RankedToken(token_id, self._text(token_id), logprob) for token_id, logprob in pairs]


def _inspection(model: ServedModel, body: InspectRequest, answer: Inspected) -> Inspection:
    """Return what a client sees of an answer. `body` is the question."""
    texts = _Texts(model)
    positions = [_position(texts, view, answer) for view in answer.positions]
    compared = [position.is_equal for position in positions if position.is_equal is not None]
    attention = None
    if body.layer is not None and body.head is not None:
        rows = [[round(weight, 6) for weight in array("f", view.attention)] for view in answer.positions]
        attention = FullAttention(body.layer, body.head, rows)
    last = positions[-1]
    sampling = Sampling(
        position=last.position,
        stages=[_stage(texts, view) for view in answer.stages],
        noise=[
            NoisyToken(each.token_id, texts.token(each.token_id).token, each.logit, each.noise)
            for each in answer.candidates
        ],
        recomputed=last.recomputed,
        sent=last.next,
    )
    return Inspection(
        id=answer.ids[0] if answer.ids else None,
        model=answer.lora_name or model.name,
        num_layers=len(model.config.layers),
        **{name: getattr(answer, name) for name in ("num_heads", "num_experts", "num_prompt_tokens", "num_tokens")},
        start=answer.start,
        end=answer.end,
        tokens=[texts.token(token_id) for token_id in answer.token_ids[: answer.end]],
        positions=positions,
        attention=attention,
        sampling=sampling if answer.stages else None,
        is_equal=all(compared) if compared else None,
    )


def _position(texts: _Texts, view: PositionView, answer: Inspected) -> PositionInside:
    following = answer.token_ids[view.position + 1 : view.position + 2]
    recomputed = None if view.token_id is None else texts.token(view.token_id)
    return PositionInside(
        position=view.position,
        layers=[_layer(texts, layer) for layer in view.layers],
        next=texts.token(following[0]) if following else None,
        recomputed=recomputed,
        is_equal=view.token_id == following[0] if recomputed is not None and following else None,
    )


def _layer(texts: _Texts, view: LayerView) -> LayerInside:
    return LayerInside(
        lens=texts.ranked(view.lens),
        residual_norm=view.residual_norm,
        attention_norm=view.attention_norm,
        mlp_norm=view.feed_forward_norm,
        heads=view.heads,
        experts=view.experts or None,
        state=None if view.state is None else StateChange(*view.state),
    )


def _stage(texts: _Texts, view: StageView) -> Stage:
    return Stage(
        view.name, view.num_tokens, view.num_removed, top=texts.ranked(view.top), removed=texts.ranked(view.removed)
    )
