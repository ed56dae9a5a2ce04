"""The process that makes the grammars of requests: `python -m server.constrained.process`.

It reads a `GrammarVocabulary` and then requests from standard input, and writes an answer to each to standard output.
All that interprets schemas, patterns and grammars of clients runs here, in a forked process for each request, with
limits on time and memory: some take very long to convert or to compile, or crash the compiler.
"""

import mmap
import os
import resource
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

import msgspec

from engine.grammar.compiler import STACK_BYTES, GrammarCompiler, GrammarError
from engine.shared.launcher import die_with_parent
from server.constrained.constraints import Constraint, ConstraintBuilder, invalid
from server.constrained.messages import (
    LENGTH,
    ConstrainedFields,
    Grammar,
    GrammarAnswer,
    GrammarProblem,
    GrammarRequest,
    GrammarVocabulary,
)
from server.constrained.tool_grammar import answer_constraint, unenforced_keywords
from server.http.errors import BadRequestError
from server.part_table import is_installed, load_module
from server.text.templates.syntaxes import decode_format

MAX_PROCESSOR_SECONDS = 0.7  # for one request; most take a few milliseconds
MAX_DATA_BYTES = 2 << 30  # RLIMIT_DATA of the forked process
MAX_PARAM_BYTES = 256
TOO_SLOW = "following it takes too long"
TOO_DEEP = "it is nested too deep"
CRASHED = "it cannot be compiled"

PROBLEM_OF: dict[int, str] = {signal.SIGPROF: TOO_SLOW, signal.SIGSEGV: TOO_DEEP}  # by the signal that ended it

# What llguidance says of a schema -> the same in words that help a client.
PROBLEMS = {
    "oneOf constraints are not supported": "the alternatives of 'oneOf' cannot be told apart: give each of them a "
    "property with another string as 'const', or use 'anyOf'"
}


def main() -> None:
    """Make grammars until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C also reaches the parent, which ends this process
    die_with_parent(os.getppid())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    vocabulary = msgspec.json.decode(_read(requests), type=GrammarVocabulary)
    try:
        compiler = GrammarCompiler(vocabulary.tokenizer, vocabulary.eos_token_ids)
    except ValueError as error:
        _write(answers, GrammarProblem(str(error)))
        return
    _write(answers, None)
    builder = ConstraintBuilder(vocabulary.special_ids, vocabulary.allow_additional_properties)
    worker = _Worker(compiler, builder)
    # Forked processes find imported what these import.
    decode_format(msgspec.Raw(b"null"))
    if is_installed("structural_tags"):
        load_module("structural_tags", "grammar")
    while request := _read(requests):
        if (process := os.fork()) == 0:
            answer = worker.answer(request)
            signal.setitimer(signal.ITIMER_PROF, 0.0)
            _write(answers, answer)
            os._exit(0)
        exit_code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if exit_code == -signal.SIGKILL:  # not caused by the request
            sys.exit(1)
        if exit_code != 0:
            problem = PROBLEM_OF.get(-exit_code, CRASHED)
            _write(answers, _problem(invalid(worker.param, problem)))


class _Worker:
    """Answers one request in a forked process, which may die of it."""

    def __init__(self, compiler: GrammarCompiler, builder: ConstraintBuilder) -> None:
        self._compiler = compiler
        self._builder = builder
        self._shared = mmap.mmap(-1, LENGTH.size + MAX_PARAM_BYTES)  # with the forked processes

    @property
    def param(self) -> str:
        """The field that the last request was about to its end."""
        (length,) = LENGTH.unpack(self._shared[: LENGTH.size])
        return self._shared[LENGTH.size : LENGTH.size + length].decode(errors="ignore")

    def answer(self, request: bytes) -> GrammarAnswer:
        """Answer a request under resource limits, which end the process if exceeded."""
        resource.setrlimit(resource.RLIMIT_DATA, (MAX_DATA_BYTES, MAX_DATA_BYTES))
        signal.setitimer(signal.ITIMER_PROF, MAX_PROCESSOR_SECONDS)  # SIGPROF then ends the process
        threading.stack_size(STACK_BYTES // 2)  # so that no grammar overflows that of the engine alone
        try:
            with ThreadPoolExecutor(max_workers=1) as thread:
                return thread.submit(self._make, request).result()
        except RecursionError:
            return _problem(invalid(self.param, TOO_DEEP))
        except BadRequestError as error:
            return _problem(error)
        except (TypeError, ValueError, AttributeError, LookupError):  # values of other types than a schema has
            return _problem(invalid(self.param, CRASHED))

    def _make(self, request: bytes) -> Grammar:
        """Return the grammar of a request. Raises BadRequestError or RecursionError."""
        message = msgspec.json.decode(request, type=GrammarRequest)
        self._begin(message.param)
        fields = ConstrainedFields.model_validate_json(bytes(message.fields))
        constraint = answer_constraint(self._builder, fields, decode_format(message.format))
        for each in (*constraint.checked_first, constraint):
            self._compile(each)
        return Grammar(constraint.grammar, constraint.param, unenforced_keywords(fields))

    def _compile(self, constraint: Constraint) -> None:
        """Raise InvalidValueError for a grammar that cannot be followed."""
        self._begin(constraint.param)
        try:
            self._compiler.compile(constraint.grammar)
        except GrammarError as error:
            known = [text for beginning, text in PROBLEMS.items() if beginning in str(error)]
            raise invalid(constraint.param, [*known, str(error)][0]) from error

    def _begin(self, param: str) -> None:
        """Note the field that is to blame if the process dies."""
        content = param.encode()[:MAX_PARAM_BYTES]
        self._shared[: LENGTH.size + len(content)] = LENGTH.pack(len(content)) + content


def _problem(error: BadRequestError) -> GrammarProblem:
    return GrammarProblem(error.message, error.param, error.code)


def _read(stream: BinaryIO) -> bytes:
    """Return the next message, or b"" if the parent has closed the stream."""
    length = stream.read(LENGTH.size)
    return stream.read(LENGTH.unpack(length)[0]) if len(length) == LENGTH.size else b""


def _write(stream: BinaryIO, answer: GrammarAnswer) -> None:
    content = msgspec.json.encode(answer)
    stream.write(LENGTH.pack(len(content)) + content)
    stream.flush()


if __name__ == "__main__":
    main()
