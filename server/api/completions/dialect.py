"""OpenAI's text completions."""

from server.api.completions.routes import router
from server.api.completions.schemas import Completion
from server.dialect import BEGINNING, EXAMPLE_PROMPT, Dialect, Operation
from server.schemas.answers import RenderedPrompt

REQUEST = {"prompt": BEGINNING, "max_tokens": 20}

COMPLETIONS = Dialect(
    tag="OpenAI",
    routers=[router],
    operations={
        ("/v1/completions", "post"): Operation(Completion, REQUEST, Completion),
        ("/v1/completions/render", "post"): Operation(
            list[RenderedPrompt], REQUEST, answer_example=[EXAMPLE_PROMPT], reaches_engine=True
        ),
    },
    in_workers=True,
)
