"""Models, running requests, tokens, health and metrics."""

from server.api.admin import cancel, health, metrics_page, models, tokenize
from server.api.admin.schemas import (
    CancelResponse,
    DetokenizeResponse,
    Model,
    ModelList,
    ServerVersion,
    TokenizeResponse,
    TokenizerInfo,
)
from server.dialect import BEGINNING, ID, Dialect, Operation

MODELS = Dialect(
    tag="OpenAI",
    routers=[models.router],
    operations={
        ("/v1/models", "get"): Operation(ModelList),
        ("/v1/models/{model_id}", "get"): Operation(Model),
        ("/version", "get"): Operation(ServerVersion),
    },
    in_workers=False,
)
TOKENS = Dialect(
    tag="Lightwell",
    routers=[tokenize.json_router],
    operations={
        ("/tokenize", "post"): Operation(TokenizeResponse, {"prompt": BEGINNING}),
        ("/detokenize", "post"): Operation(DetokenizeResponse, {"tokens": [10, 11, 12]}),
    },
    in_workers=True,
)
ADMIN = Dialect(
    tag="Lightwell",
    routers=[each.router for each in (cancel, tokenize, health, metrics_page)],
    operations={
        ("/v1/requests/{request_id}/cancel", "post"): Operation(
            CancelResponse, answer_example=CancelResponse(f"chatcmpl-{ID}")
        ),
        ("/tokenizer_info", "get"): Operation(TokenizerInfo),
        ("/health", "get"): Operation(dict[str, str | int]),
        ("/healthz", "get"): Operation(dict[str, str | int]),
        ("/readyz", "get"): Operation(dict[str, str | int]),
        ("/metrics", "get"): Operation(str),
    },
    in_workers=False,
)
