"""Write the generated tables of the documentation: `python -m tests.docs.generate`.

A table stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`.
"""

from collections.abc import Callable, Mapping

from server.api.chat.schemas import ChatCompletionRequest
from server.api.completions.schemas import CompletionRequest
from server.parts.embeddings.part import EmbeddingRequest
from server.parts.messages.schemas import MessagesRequest
from server.parts.ollama.schemas import OllamaChatRequest, OllamaEmbedRequest, OllamaGenerateRequest
from server.parts.rerank.part import RerankRequest, ScoreRequest
from server.parts.responses.schemas import ResponsesRequest
from server.schemas.generation_request import GenerationRequest
from tests.conformance import table as clients
from tests.docs import aliases, checklist, metrics, models, parameters, settings
from tests.support.paths import ROOT

# Document -> name of a table -> what makes it.
TABLES: Mapping[str, Mapping[str, Callable[[], str]]] = {
    "docs/settings.md": {"settings": settings.markdown_table},
    "docs/models.md": {
        "families": models.families_table,
        "types": models.formats_table,
        "aliases": aliases.markdown_table,
    },
    "docs/metrics.md": {"metrics": metrics.markdown_table},
    "docs/api.md": {
        "generation": lambda: parameters.markdown_table(GenerationRequest),
        "completions": lambda: parameters.markdown_table(CompletionRequest, without=GenerationRequest),
        "chat": lambda: parameters.markdown_table(ChatCompletionRequest, without=GenerationRequest),
        "responses": lambda: parameters.markdown_table(ResponsesRequest),
        "messages": lambda: parameters.markdown_table(MessagesRequest),
        "ollama-chat": lambda: parameters.markdown_table(OllamaChatRequest),
        "ollama-generate": lambda: parameters.markdown_table(OllamaGenerateRequest),
        "ollama-embed": lambda: parameters.markdown_table(OllamaEmbedRequest),
        "embeddings": lambda: parameters.markdown_table(EmbeddingRequest),
        "rerank": lambda: parameters.markdown_table(RerankRequest),
        "score": lambda: parameters.markdown_table(ScoreRequest),
        "clients": clients.markdown_table,
    },
    "SECURITY.md": {"checklist": checklist.markdown_table},
    "docs/clients.md": {"tried": clients.tried_table},
}


def with_tables(document: str) -> str:
    """Return the text of a document with each of its tables made anew."""
    text = (ROOT / document).read_text(encoding="utf-8")
    for name, make in TABLES[document].items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        before, _, rest = text.partition(begin)
        assert end in rest, f"{document} has no {begin.strip()} ... {end}"
        text = f"{before}{begin}{make()}{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    for document in TABLES:
        (ROOT / document).write_text(with_tables(document), encoding="utf-8")
