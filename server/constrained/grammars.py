"""Makes the grammars of a model's requests: it interprets schemas, patterns and grammars of clients, and compiles them.

That may take a second, and more memory than there is, for which `hardened` has processes that may be killed.
"""

import hashlib
from collections import Counter
from functools import cached_property

import msgspec

from engine.grammar.compiler import GrammarCompiler, GrammarError
from engine.shared.recently_used import RecentlyUsed
from server.constrained.constraints import Constraint, ConstraintBuilder, one_line
from server.constrained.tool_grammar import answer_constraint, unenforced_keywords
from server.http.errors import BadRequestError, InvalidValueError, QueueFullError, invalid
from server.part_table import hardened
from server.schemas.generation_request import GenerationRequest
from server.schemas.structured_outputs import ConstrainedFields
from server.schemas.tools import followed_tools
from server.tenants import ANYBODY, Tenant
from server.text.parsers.answer_parser import AnswerFormat
from server.text.templates.syntaxes import decode_format
from server.text.text_threads import TextThreads

MAX_WAITING = 64  # requests of a tenant that wait for their turn
MAX_CACHED_BYTES = 16 << 20
BYTES_OF_A_RESULT = 1024  # beside its texts
TOO_DEEP = "it is nested too deep"
CRASHED = "it cannot be compiled"
UNSUITABLE = "This model's kind of tokenizer does not support constrained answers"

# Parameters that could forbid every token that a grammar allows.
EXCLUSIVE = ("allowed_token_ids", "bad_words")

# What llguidance says of a schema -> the same in words that help a client.
PROBLEMS = {
    "oneOf constraints are not supported": "the alternatives of 'oneOf' cannot be told apart: give each of them a "
    "property with another string as 'const', or use 'anyOf'"
}


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


Result = Grammar | GrammarProblem


def encode_request(body: GenerationRequest, format: AnswerFormat | None) -> bytes | None:
    """Return the request for the grammar of the answers to a request, or None if they may be any text.

    Args:
        format: the parts that the answers can have; None: all is content.
    """
    has_format = body.response_format is not None and body.response_format.type != "text"
    param = "response_format" if has_format else body.output_param
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


class GrammarMaker:
    """Makes the grammar of one request."""

    def __init__(self, vocabulary: GrammarVocabulary) -> None:
        self._vocabulary = vocabulary
        self._builder = ConstraintBuilder(vocabulary.special_ids, vocabulary.allow_additional_properties)
        self.param = ""  # the field that the request is refused for, if it is

    @cached_property
    def compiler(self) -> GrammarCompiler:
        """Raises ValueError for a tokenizer that llguidance does not support."""
        return GrammarCompiler(self._vocabulary.tokenizer, self._vocabulary.eos_token_ids)

    def make(self, request: bytes) -> Result:
        """Return the grammar of a request, or why there is none."""
        try:
            compiler = self.compiler
        except ValueError as error:
            return GrammarProblem(f"{UNSUITABLE}: {error}")
        try:
            return self._make(compiler, msgspec.json.decode(request, type=GrammarRequest))
        except BadRequestError as error:
            return problem(error)
        except RecursionError:
            return problem(invalid(self.param, TOO_DEEP))
        except (TypeError, ValueError, AttributeError, LookupError):  # values of other types than a schema has
            return problem(invalid(self.param, CRASHED))

    def close(self) -> None:
        """Do nothing: there is nothing to end."""

    def _make(self, compiler: GrammarCompiler, request: GrammarRequest) -> Grammar:
        """Return the grammar of a request. Raises BadRequestError or RecursionError."""
        self.param = request.param
        fields = ConstrainedFields.model_validate_json(bytes(request.fields))
        constraint = answer_constraint(self._builder, fields, decode_format(request.format))
        for each in (*constraint.checked_first, constraint):
            self.param = each.param
            _compile(compiler, each)
        return Grammar(constraint.grammar, constraint.param, unenforced_keywords(fields))


def _compile(compiler: GrammarCompiler, constraint: Constraint) -> None:
    """Raise InvalidValueError for a grammar that cannot be followed."""
    try:
        compiler.compile(constraint.grammar)
    except GrammarError as error:
        known = [text for beginning, text in PROBLEMS.items() if beginning in str(error)]
        raise invalid(constraint.param, [*known, one_line(error)][0]) from error


def problem(error: BadRequestError) -> GrammarProblem:
    return GrammarProblem(error.message, error.param, error.code)


class Grammars:
    """Makes the grammar of one request at a time, in turn of the tenants, and keeps the latest results."""

    def __init__(self, vocabulary: GrammarVocabulary) -> None:
        self._maker = hardened("grammar_process", "GrammarProcess", GrammarMaker)(vocabulary)
        self._results = RecentlyUsed[bytes, Result](MAX_CACHED_BYTES)  # by hash of the request
        self._threads = hardened("turns", "FairThreads", TextThreads)(1)
        self._num_waiting: Counter[str] = Counter()  # by the tenant's name

    async def make(self, request: bytes, body: GenerationRequest, tenant: Tenant = ANYBODY) -> Grammar:
        """Return the grammar for a request, which `encode_request` made of `body`. Takes up to a second.

        Raises:
            InvalidValueError: the engine cannot follow it, or a parameter is not allowed together with it.
            QueueFullError: too many requests of the tenant wait.
            EngineUnavailableError: the process that makes it does not answer.
        """
        result = await self.find(request, tenant)
        if isinstance(result, GrammarProblem):
            param = result.param or msgspec.json.decode(request, type=GrammarRequest).param
            raise InvalidValueError(result.message, param=param, code=result.code)
        for name in EXCLUSIVE:
            if getattr(body, name, None):
                raise invalid(name, f"not allowed with '{result.param}'")
        return result

    async def find(self, request: bytes, tenant: Tenant = ANYBODY) -> Result:
        """Return the answer to a request. Raises QueueFullError or EngineUnavailableError."""
        key = hashlib.sha256(request).digest()
        if (known := self._results.get(key)) is not None:
            return known
        if self._num_waiting[tenant.name] >= MAX_WAITING:
            raise QueueFullError(retry_after=MAX_WAITING)
        self._num_waiting[tenant.name] += 1
        try:
            return await self._threads.run(tenant, 0, self._answer, key, request)
        finally:
            self._num_waiting -= Counter([tenant.name])  # which drops names that have none left

    def close(self) -> None:
        """End what makes the grammars."""
        self._maker.close()

    def _answer(self, key: bytes, request: bytes) -> Result:
        if (known := self._results.get(key)) is not None:
            return known
        result = self._maker.make(request)
        num_chars = len(result.text if isinstance(result, Grammar) else result.message)
        self._results.put(key, result, BYTES_OF_A_RESULT + num_chars)
        return result
