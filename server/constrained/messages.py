"""What grammars are made of, and the results, as JSON for other processes."""

import msgspec
from pydantic import ConfigDict

from server.schemas.generation_request import GenerationRequest
from server.schemas.structured_outputs import OUTPUT_FIELDS, ResponseFormat, StructuredOutputsFields
from server.schemas.tools import ToolChoice, Tools, followed_tools
from server.text.parsers.answer_parser import AnswerFormat


class ConstrainedFields(StructuredOutputsFields):
    """The fields of a request that constrain its answer."""

    model_config = ConfigDict(strict=True)

    response_format: ResponseFormat | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None


# Fields of a request whose answer may have a grammar.
CONSTRAINED_FIELDS = OUTPUT_FIELDS | {"response_format", "tools"}


class GrammarVocabulary(msgspec.Struct):
    """What the grammars of a model depend on."""

    tokenizer: str  # the text of a tokenizer.json
    eos_token_ids: list[int]
    special_ids: dict[str, int]  # of the special tokens
    allow_additional_properties: bool = False


class GrammarRequest(msgspec.Struct):
    """What constrains an answer."""

    param: str  # the field to blame if there is no other
    fields: msgspec.Raw  # ConstrainedFields
    format: msgspec.Raw  # AnswerFormat, or null: all of the answer is content


class Grammar(msgspec.Struct, tag=True):
    """A grammar that the engine can follow."""

    text: str  # in the format of engine.grammar
    param: str  # the field that it comes from
    unenforced: list[str] = []  # keywords of schemas that it does not enforce, with their fields


class GrammarProblem(msgspec.Struct, tag=True):
    """The reason why there is no grammar, as it is shown to the client."""

    message: str
    param: str | None = None
    code: str | None = "invalid_value"


def encode_request(body: GenerationRequest, format: AnswerFormat | None) -> bytes | None:
    """Return the request for the grammar of the answers to a request, or None if they may be any text.

    Args:
        format: the parts that the answers can have; None: all is content.
    """
    param = _content_param(body)
    names = set(ConstrainedFields.model_fields)
    if format is None:
        names -= {"tools", "tool_choice"}
    elif param is None and followed_tools(getattr(body, "tools", None), getattr(body, "tool_choice", None)):
        param = "tools"
    if param is None:
        return None
    fields = body.model_dump_json(include=names, exclude_unset=True, by_alias=True).encode()
    if format is not None:
        format = msgspec.structs.replace(format, tools={name: {} for name in format.tools})
    return msgspec.json.encode(GrammarRequest(param, msgspec.Raw(fields), msgspec.Raw(msgspec.json.encode(format))))


def _content_param(body: GenerationRequest) -> str | None:
    """Return the field that constrains the content."""
    if body.response_format is not None and body.response_format.type != "text":
        return "response_format"
    return body.output_param
