"""OpenAI's chat completions."""

from server.api.chat.routes import router
from server.api.chat.schemas import ChatCompletion, ChatCompletionChunk
from server.dialect import EXAMPLE_PROMPT, MESSAGES, Dialect, Operation
from server.schemas.answers import RenderedPrompt

REQUEST = {"messages": MESSAGES, "max_completion_tokens": 20}

CHAT = Dialect(
    tag="OpenAI",
    routers=[router],
    operations={
        ("/v1/chat/completions", "post"): Operation(ChatCompletion, REQUEST, ChatCompletionChunk),
        ("/v1/chat/completions/render", "post"): Operation(
            RenderedPrompt, REQUEST, answer_example=EXAMPLE_PROMPT, reaches_engine=True
        ),
    },
    in_workers=True,
)
