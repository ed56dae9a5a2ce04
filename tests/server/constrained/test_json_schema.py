"""Schemas and patterns that are rewritten for llguidance: closed objects, keywords, classes of characters.

Objects are closed where that harms nothing: answers stay valid under the original schema, and there still are some.
jsonschema is the reference. Whether a schema is satisfiable is what llguidance finds for the schema with open objects.
"""

import copy
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from itertools import product
from typing import Annotated, Any, Literal

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from llguidance import LLMatcher
from pydantic import BaseModel, Field, TypeAdapter, create_model

from engine.grammar.compiler import GrammarError, compute_mask
from server.constrained.constraints import ConstraintBuilder
from server.constrained.json_schema import ascii_classes, find_tags, normalize_schema
from server.part_table import is_installed
from server.text.tokenizer import Tokenizer
from tests.support.clients import CHAT, COMPLETIONS, ask, ask_json, shared_server
from tests.support.examples import num_examples
from tests.support.grammars import allows, check_matches, compiler_of, grammar_of, json_schema, matches
from tests.support.growth import num_calls
from tests.support.serving import RunningServer, check_error
from tests.support.tiny_tokenizer_model import END_OF_TEXT_ID
from tests.support.tool_model import write_tool_model

Schema = dict[str, Any]


def obj(*required: str, **properties: Any) -> Schema:
    """Return the schema of an object with these properties, of which some are required."""
    return {"type": "object", "properties": properties} | ({"required": [*required]} if required else {})


A, B = obj("a", a={"type": "integer"}), obj("b", b={"type": "integer"})
CAT, DOG = obj("kind", kind={"const": "cat"}, a={}), obj("kind", kind={"enum": ["dog", "wolf"]}, b={})
COW = obj(kind={"const": "cow"})
DEFS = {"A": A, "B": B}
TO_A = {"$ref": "#/$defs/A"}
IN, OUT, BOTH = {"a": 1}, {"a": 1, "z": 1}, {"a": 1, "b": 1}  # values of A, of which the first has nothing more


def schema_grammar(schema: Schema, is_open: bool) -> str:
    return ConstraintBuilder({}, is_open).json_schema(schema, "schema").grammar


def accepts(tokenizer: Tokenizer, schema: Schema, value: object, *, is_open: bool = False) -> bool:
    return allows(tokenizer, schema_grammar(schema, is_open), json.dumps(value, separators=(",", ":")))


# Schemas, values that closed objects have, and values with properties that only open objects have.
CLOSED: list[tuple[Schema, list[Any], list[Any]]] = [
    (A, [IN], [OUT, BOTH]),
    ({"properties": {"a": {}}}, [IN, {}, 5], [{"z": 1}]),
    (obj(), [{}], [{"z": 1}]),
    ({"type": "array", "items": A}, [[IN]], [[OUT]]),
    ({"type": "array", "prefixItems": [A], "items": B}, [[IN, {"b": 1}]], [[OUT], [IN, {"b": 1, "z": 1}]]),
    ({"type": "object", "additionalProperties": A}, [{"x": IN}], [{"x": OUT}]),
    ({"type": "object", "patternProperties": {"^x": A}, "additionalProperties": False}, [{"x": IN}], [{"x": OUT}]),
    (obj(properties=A), [{"properties": IN}], [{"z": 1}, {"properties": OUT}]),
    ({**TO_A, "description": "an A", "$defs": DEFS}, [IN], [OUT]),
    ({"allOf": [TO_A], "default": IN, "$defs": DEFS}, [IN], [OUT]),
    ({"$ref": "#/definitions/A", "definitions": DEFS}, [IN], [OUT]),
    ({"anyOf": [TO_A, {"type": "null"}], "$defs": DEFS}, [IN, None], [OUT]),
    ({"anyOf": [A, {"anyOf": [B, CAT]}]}, [IN, {"b": 1}], [BOTH]),
    ({"oneOf": [CAT, DOG, {"type": "null"}]}, [{"kind": "cat"}, {"kind": "wolf"}, None], [{"kind": "cat", "b": 1}]),
    (
        {"$ref": "#/$defs/tree", "$defs": {"tree": obj(next={"$ref": "#/$defs/tree"})}},
        [{"next": {"next": {}}}],
        [{"next": {"next": {"z": 1}}}],
    ),
    (obj(a={"$ref": "#"}), [{"a": {"a": {}}}], [{"a": {"z": 1}}]),
    ({"type": "array", "items": {"$ref": "#/$defs/A~1%20B"}, "$defs": {"A/ B": A}}, [[IN]], [[OUT]]),
    ({"anyOf": [{"$ref": "#/anyOf/1"}, A]}, [IN], [OUT]),
    ({"$ref": "#x", "$defs": {"A": A | {"$anchor": "x"}}}, [IN], [OUT]),
]

# Schemas, and a value that shows that they stay open.
OPEN: list[tuple[Schema, Any]] = [
    ({"type": "object"}, {"z": 1}),
    (A | {"additionalProperties": True}, OUT),
    (A | {"patternProperties": {"^x": {"type": "integer"}}}, OUT),
    (obj("z", a={}), {"z": 1}),
    (A | {"enum": [OUT]}, OUT),
    (obj("x", x=A) | {"const": {"x": OUT}}, {"x": OUT}),
    ({"allOf": [A, B]}, {"a": 1, "b": 1, "z": 1}),
    ({"allOf": [TO_A, B], "$defs": DEFS}, BOTH),
    (TO_A | B | {"$defs": DEFS}, BOTH),
    (A | {"anyOf": [B, CAT]}, BOTH),
    (A | {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, OUT),
    ({"anyOf": [A], "required": ["b"]}, BOTH),
    ({"anyOf": [TO_A, {"allOf": [TO_A, B]}], "$defs": DEFS}, BOTH),
    (obj(x={"allOf": [A, {"properties": {"y": A}}]}), {"x": {"a": 1, "y": OUT}}),
]


@pytest.mark.parametrize(("schema", "inside", "outside"), [*CLOSED, *((schema, [value], []) for schema, value in OPEN)])
def test_what_is_closed(tokenizer: Tokenizer, schema: Schema, inside: list[Any], outside: list[Any]) -> None:
    before, validator = copy.deepcopy(schema), Draft202012Validator(schema)
    for value in inside:
        assert validator.is_valid(value)
        assert accepts(tokenizer, schema, value)
        assert accepts(tokenizer, schema, value, is_open=True)
    for value in outside:
        assert validator.is_valid(value)
        assert not accepts(tokenizer, schema, value)
        assert accepts(tokenizer, schema, value, is_open=True)
    assert schema == before


# Schemas that llguidance refuses, so that only what is found is tested: all objects in them stay open.
REFUSED: list[Schema] = [
    *(obj(x=A) | {key: B} for key in ("not", "if")),
    obj(x=A) | {"$dynamicRef": "#x"},
    {"not": A},
    {"if": A, "then": B, "else": A},
    {"type": "array", "items": A, "contains": B},
    {"oneOf": [A, obj(b={})]},
    {"oneOf": [CAT, DOG, COW | {"maxProperties": 0}]},
    {"oneOf": [CAT, obj(kind={"const": "cow", "type": "null"})]},
    {"oneOf": [CAT, COW | {"required": 5}]},
    obj(x={"oneOf": [CAT, {"$ref": "#/$defs/cow"}]}, y={"allOf": [{"$ref": "#/$defs/cow"}, A]})
    | {"$defs": {"cow": COW}},
    {"oneOf": [{"properties": {"kind": {"const": "cat"}}, "required": ["kind"]}, DOG]},
    {"unevaluatedProperties": False, "anyOf": [A]},
    {"properties": {"a": {}}, "dependentRequired": {"a": ["z"]}},
    A | {"patternProperties": {"^x": {"type": "integer"}}},
    {"anyOf": {}, "oneOf": 5, "allOf": [5], "properties": {"a": 5}, "required": [{}], "type": [{}], "enum": 5},
]


@pytest.mark.parametrize("schema", REFUSED)
def test_open_where_more_would_be_valid(schema: Schema) -> None:
    assert find_tags(schema) is None


def test_what_only_looks_like_a_schema_is_not_touched() -> None:
    value = {"properties": {"a": 1}, "pattern": r"\d"}
    properties = {"properties": {"pattern": {"const": value}, "default": {"type": "string"}}}
    schema = {"default": value, "examples": [value]} | properties
    assert normalize_schema(schema | {"enum": [value], "const": value}) == schema | {"enum": [value], "const": value}
    assert normalize_schema(schema) == schema | {"additionalProperties": False}


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    name: bool


class Dog(BaseModel):
    kind: Literal["dog", "wolf"] = "dog"
    name: bool
    good: bool = True


class Cow(BaseModel, extra="forbid"):
    kind: Literal["cow"] = "cow"
    name: bool


Animal = Annotated[Cat | Dog | Cow, Field(discriminator="kind")]
Farm = create_model("Farm", animals=(list[Animal], ...), favourite=(Animal | None, None), cat=(Cat, ...))


@pytest.mark.parametrize("is_open", [False, True])
def test_default_tags_of_pydantic(tokenizer: Tokenizer, is_open: bool) -> None:
    """The tag of a discriminated union is generated although the schema does not require it; pydantic needs it."""
    animal: TypeAdapter[Any] = TypeAdapter(Animal)
    value: dict[str, Any]
    for value in ({"kind": "cat", "name": True}, {"kind": "wolf", "name": True}, {"kind": "cow", "name": False}):
        assert animal.validate_python(value)
        assert accepts(tokenizer, animal.json_schema(), value, is_open=is_open)
        farm = {"animals": [value], "favourite": value, "cat": {"kind": "cat", "name": True}}
        assert accepts(tokenizer, Farm.model_json_schema(), farm, is_open=is_open)
    for value in ({"name": True}, {"kind": "cat"}, {"kind": "hen", "name": True}):
        assert not accepts(tokenizer, animal.json_schema(), value, is_open=is_open)
    assert accepts(tokenizer, animal.json_schema(), {"kind": "cat", "name": True, "z": 1}, is_open=is_open) == is_open


def test_large_schemas_take_little_work() -> None:
    many = [{"type": "object", "properties": {"k": {"const": str(n)}}, "required": ["k"]} for n in range(800)]
    names = [f"n{n}" for n in range(2000)]
    wide = {"type": "object", "properties": {name: {} for name in names}, "required": names}
    long = {"$ref": "#" + "/" * 60_000}
    for schema in ({"oneOf": many}, {"oneOf": [wide, wide, wide]}, wide | {"anyOf": many}, {"anyOf": [long] * 9}):
        assert num_calls(partial(find_tags, schema)) < 500_000


# Random schemas.
NAMES = st.sampled_from("abc")
FIXED: list[Schema] = [{"enum": [0, 1]}, {"const": "x"}, {"enum": ["y", "z"]}, {"type": "null"}]
LEAVES: st.SearchStrategy[Schema] = st.sampled_from([*FIXED, *({"$ref": f"#/$defs/{name}"} for name in "de")])


def objects(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    optional = {
        "type": st.just("object"),
        "required": st.lists(NAMES, max_size=2, unique=True),
        "additionalProperties": st.booleans() | inner,
        "patternProperties": st.builds(lambda value: {"^[cx]": value}, inner),
    }
    return st.fixed_dictionaries({"properties": st.dictionaries(NAMES, inner, max_size=3)}, optional=optional)


def containers(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    parts = st.lists(inner, min_size=1, max_size=3)
    key = st.sampled_from(["anyOf", "anyOf", "oneOf", "allOf"])
    combined = st.builds(lambda key, parts, base: {**base, key: parts}, key, parts, st.just({}) | objects(inner))
    arrays = st.fixed_dictionaries({"type": st.just("array"), "items": inner, "maxItems": st.just(1)})
    return objects(inner) | combined | arrays


SCHEMAS = st.recursive(LEAVES, containers, max_leaves=6)
ROOTS = st.builds(lambda root, d, e: {**root, "$defs": {"d": d, "e": e}}, SCHEMAS, objects(LEAVES), SCHEMAS)


def walk(matcher: LLMatcher, rng: random.Random) -> str | None:
    """Return a random answer of a few characters, or None if it becomes long. Raises GrammarError at a dead end."""
    output = bytearray()
    while len(output) < 200:
        mask = int.from_bytes(compute_mask(matcher), "little")
        allowed = [token for token in (*b'{}[]",:01abcxyzntrufalsekidogwm', END_OF_TEXT_ID) if mask >> token & 1]
        closing = [token for token in allowed if token in [*b'"}]']]
        token = rng.choice(closing if closing and rng.random() < 0.4 else allowed)
        if token == END_OF_TEXT_ID:
            return output.decode()
        matcher.consume_token(token)
        output.append(token)
    return None


def compiled(tokenizer: Tokenizer, schema: Schema, *, is_open: bool) -> LLMatcher | None:
    with suppress(GrammarError):
        return compiler_of(tokenizer).compile(schema_grammar(schema, is_open))
    return None


def test_random_schemas(tokenizer: Tokenizer) -> None:
    counts: Counter[str] = Counter()

    @settings(max_examples=num_examples(100, 5000), deadline=None, suppress_health_check=list(HealthCheck))
    @given(schema=ROOTS, seed=st.integers(0, 99))
    def check(schema: Schema, seed: int) -> None:
        open_matcher, matcher = (compiled(tokenizer, schema, is_open=is_open) for is_open in (True, False))
        assert open_matcher is None or matcher is not None  # it does not become unsatisfiable
        counts["satisfiable"] += open_matcher is not None
        counts["closed"] += open_matcher is not None and "properties" in str(schema) and find_tags(schema) is not None
        if matcher is None:
            return
        rng = random.Random(seed)
        for _ in range(4):
            note(f"{schema}")
            try:
                text = walk(matcher.deep_copy(), rng)
            except GrammarError:
                assert "$ref" in str(schema["$defs"])  # a definition may require itself without end
                continue
            if text is not None:
                counts["answers"] += 1
                with suppress(RecursionError):  # a definition may refer to itself in place
                    Draft202012Validator(schema).validate(json.loads(text))

    check()
    assert counts["satisfiable"] > num_examples(20, 2000)
    assert counts["closed"] > num_examples(5, 600)
    assert counts["answers"] > num_examples(40, 4000)


# Keywords and patterns that are rewritten for llguidance allow the same answers as before.
A_OR_B = {"enum": ["a", "b"]}
INTEGERS = {"type": "object", "additionalProperties": {"type": "integer"}}
MEMBER = {"properties": {"propertyNames": {"type": "string"}}, "required": ["propertyNames"]}
REWRITTEN: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"type": "object", "propertyNames": {"type": "string"}}, ['{"x":1}'], []),
    ({"type": "object", "propertyNames": A_OR_B}, ["{}", '{"b":[1]}', '{"a":1,"b":2}'], ['{"c":1}']),
    (INTEGERS | {"propertyNames": A_OR_B | {"type": "string"}}, ['{"a":1}'], ['{"a":"1"}', '{"c":1}']),
    (INTEGERS | {"propertyNames": {"pattern": "^x+$"}}, ['{"xx":1}'], ['{"y":1}', '{"x":""}']),
    (INTEGERS | {"propertyNames": A_OR_B, "required": ["b"]}, ['{"b":1}'], ["{}", '{"a":1}', '{"b":""}']),
    ({"type": "array", "items": {"type": "integer"}, "uniqueItems": False}, ["[1,1]"], ['["1"]']),
    (MEMBER | {"type": "object"}, ['{"propertyNames":""}'], ["{}", '{"propertyNames":1}']),
    ({"$ref": "#/$defs/m", "$defs": {"m": {"type": "object", "propertyNames": A_OR_B}}}, ['{"a":1}'], ['{"c":1}']),
    ({"enum": [{"uniqueItems": False}]}, ['{"uniqueItems":false}'], ["{}"]),
]


@pytest.mark.parametrize(("schema", "good", "bad"), REWRITTEN)
def test_rewritten_keywords(server: RunningServer, schema: dict[str, Any], good: list[str], bad: list[str]) -> None:
    validator = Draft202012Validator(schema)
    for text in good + bad:
        assert validator.is_valid(json.loads(text)) == (text in good)
    grammar = grammar_of(server, CHAT, response_format=json_schema(schema))
    check_matches(server, grammar, good, bad)


def test_names_within_names(server: RunningServer) -> None:
    """Each level repeats the schema of its values once, however many names it allows."""
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(25):
        schema = {"type": "object", "propertyNames": A_OR_B, "additionalProperties": schema}
    grammar = grammar_of(server, CHAT, response_format=json_schema(schema))
    assert len(grammar or "") < 5_000
    assert matches(server, grammar, '{"a":' * 25 + "7" + "}" * 25)


HAS_TAGS = is_installed("structural_tags")
PERSON: dict[str, Any] = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
INSIDE, OUTSIDE = '{"name":"Jo"}', '{"name":"Jo","age":3}'
TAG: dict[str, Any] = {"type": "json_schema", "json_schema": PERSON}
FUNCTION: dict[str, Any] = {"name": "f", "parameters": PERSON}
STRUCTURE: dict[str, Any] = {"begin": "<f>", "schema": PERSON, "end": ""}
STRUCTURES = {"type": "structural_tag", "structures": [STRUCTURE], "triggers": ["<f>"]}
FORCED: dict[str, Any] = {"tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "required"}

# Each place for a schema: path, fields, and the text before and after an object in the answer.
EVERYWHERE: list[tuple[str, dict[str, Any], str, str]] = [
    (CHAT, {"response_format": json_schema(PERSON)}, "", ""),
    (COMPLETIONS, {"response_format": {"type": "json_object", "schema": PERSON}}, "", ""),
    (CHAT, {"structured_outputs": {"json": PERSON}}, "", ""),
    (COMPLETIONS, {"json_schema": json.dumps(PERSON)}, "", ""),
    *[(CHAT, {"response_format": {"type": "structural_tag", "format": TAG}}, "", "")] * HAS_TAGS,
    *[(CHAT, {"response_format": STRUCTURES}, "a<f>", "b")] * HAS_TAGS,
    (CHAT, FORCED, '<tool_call>\n{"name": "f", "arguments": ', "}\n</tool_call>"),
    ("/v1/responses", {"text": {"format": {"type": "json_schema", "name": "a", "schema": PERSON}}}, "", ""),
    ("/v1/messages", {"output_config": {"format": {"type": "json_schema", "schema": PERSON}}}, "", ""),
]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RunningServer]]:
    """Two servers, of which the second allows additional properties, and one that is strict."""
    folder = write_tool_model(tmp_path_factory.mktemp("model"), special_tags=False)
    with ExitStack() as stack:
        settings: list[dict[str, Any]] = [{}, {"allow_additional_properties": True}, {"strict": True}]
        yield [stack.enter_context(shared_server(folder, settings=each)) for each in settings]


@pytest.mark.parametrize(("path", "fields", "before", "after"), EVERYWHERE)
def test_objects_are_closed(servers: list[RunningServer], path: str, fields: Any, before: str, after: str) -> None:
    for server, allows_outside in zip(servers, (False, True), strict=False):
        ask_json(server.url, path, **fields)
        grammar = server.engine.submits[-1].params.grammar
        for text, is_allowed in ((INSIDE, True), (OUTSIDE, allows_outside)):
            written = text.replace(":", ": ").replace(",", ", ") if fields is FORCED else text
            assert matches(server, grammar, before + written + after) == is_allowed


def test_a_request_overrides_the_setting(servers: list[RunningServer]) -> None:
    for server, disables in product(servers[:2], (True, False)):
        outputs = {"json": PERSON, "disable_additional_properties": disables}
        grammar = grammar_of(server, COMPLETIONS, structured_outputs=outputs)
        assert matches(server, grammar, INSIDE)
        assert matches(server, grammar, OUTSIDE) == (not disables)
    answers = [ask_json(server.url, COMPLETIONS, max_tokens=1) for server in servers[:2]]
    assert [answer["system_fingerprint"] for answer in answers] == ["fp_fake", "fp_fake-open"]


def test_fields_that_agree(server: RunningServer) -> None:
    """`response_format` may say the same as another field, or less; empty or unknown options are no obstacle."""
    url, any_object = server.url, {"type": "json_object"}
    for format in (json_schema(PERSON), any_object):
        grammar = grammar_of(server, CHAT, response_format=format, json_schema=PERSON)
        assert matches(server, grammar, INSIDE)
        assert not matches(server, grammar, '{"nam":"Jo"}')
    for other in ({"json_schema": {"type": "array"}}, {"regex": "a"}):
        assert ask(url, CHAT, response_format=any_object, **other).status_code == 400
    grammar = grammar_of(server, CHAT, regex="a|b", structured_outputs={})
    assert matches(server, grammar, "b")
    assert ask(url, CHAT, structured_outputs={}).status_code == 400
    answer = ask(url, CHAT, structured_outputs={"regex": "a", "backend": "xgrammar"})
    assert answer.headers["x-lightwell-warnings"] == "ignored parameters: structured_outputs.backend"


class Tags(BaseModel):
    tags: set[int]


def test_sets_of_pydantic(servers: list[RunningServer]) -> None:
    """`uniqueItems` is ignored and named, or refused if the server is strict."""
    schema = Tags.model_json_schema()
    tag = TAG | {"json_schema": schema}
    loose, strict = ({"name": name, "parameters": schema, "strict": name == "g"} for name in "fg")
    tools = [{"type": "function", "function": function} for function in (loose, strict)]
    requests: list[tuple[str, str, dict[str, Any]]] = [
        (CHAT, "response_format", {"response_format": json_schema(schema)}),
        *[(CHAT, "response_format", {"response_format": {"type": "structural_tag", "format": tag}})] * HAS_TAGS,
        (COMPLETIONS, "structured_outputs", {"structured_outputs": {"json": json.dumps(schema)}}),
        (COMPLETIONS, "json_schema", {"json_schema": schema}),
        (CHAT, "tools[1].function.parameters", {"tools": tools}),
    ]
    server, _, strict_server = servers
    for path, field, fields in requests:
        answer = ask(server.url, path, max_tokens=3, **fields)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-lightwell-warnings"] == f"ignored parameters: {field}.uniqueItems"
        error = check_error(ask(strict_server.url, path, max_tokens=3, **fields), 400)
        assert f"{field}.uniqueItems" in error["message"]
    assert ask(strict_server.url, CHAT, tools=tools[:1], max_tokens=3).status_code == 200
    Tags.model_validate_json('{"tags":[1,1]}')  # so that an answer with duplicates does no harm


# Patterns match what they match in Python with `re.ASCII`, wherever a request has them.
ARABIC_DIGIT, LETTER, NO_BREAK_SPACE, LONG_S = "\u0663", "é", "\u00a0", "\u017f"
CHARACTERS = "05aZ_-[]\\^ \t\n\v\f\r\x1c\x85.#" + ARABIC_DIGIT + LETTER + NO_BREAK_SPACE + LONG_S

CLASSES = st.sampled_from([rf"\{name}" for name in "dwsDWS"])
ESCAPED = st.sampled_from(["a", "5", "_", r"\-", r"\]", r"\[", r"\\", r"\^", r"\.", r"\t", r"\x41"])
RANGES = st.sampled_from(["a-f", "0-9", "!-/", r"\[-\]"])
SETS = st.builds(
    lambda sign, parts, hyphen: f"[{sign}{''.join(parts)}{hyphen}]",
    st.sampled_from(["", "^"]),
    st.lists(CLASSES | ESCAPED | RANGES, min_size=1, max_size=4),
    st.sampled_from(["", "-"]),
)
ATOMS = CLASSES | SETS | ESCAPED | st.sampled_from([".", "-"])
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.builds("".join, st.lists(inner, max_size=3)),
        st.builds(lambda one, other: f"(?:{one}|{other})", inner, inner),
        st.builds(lambda part, count: f"({part}){count}", inner, st.sampled_from(["*", "+?", "{2}", "{0,2}"])),
    ),
    max_leaves=6,
)
TEXTS = st.lists(st.text(CHARACTERS, max_size=4), min_size=8, max_size=8)


def matches_pattern(tokenizer: Tokenizer, pattern: str, text: str) -> bool:
    with suppress(GrammarError):  # no text matches it, such as [^\d\D]
        return allows(tokenizer, LLMatcher.grammar_from_regex(ascii_classes(pattern)), text)
    return False


@settings(max_examples=num_examples(150, 20_000), deadline=None)
@given(pattern=PATTERNS.filter(bool), texts=TEXTS)
def test_random_patterns(tokenizer: Tokenizer, pattern: str, texts: list[str]) -> None:
    for text in texts:
        assert matches_pattern(tokenizer, pattern, text) == bool(re.fullmatch(pattern, text, re.ASCII)), (pattern, text)


def test_hyphens_beside_classes(tokenizer: Tokenizer) -> None:
    """They are literals, as in ECMAScript without the flags `u` and `v`. In Python such a pattern is an error."""
    for pattern, same in ((r"[!-\d]", r"[!\-\d]"), (r"[\w-\d]", r"[\w\-\d]"), (r"[\d-x]", r"[\d\-x]")):
        for character in map(chr, range(128)):
            assert matches_pattern(tokenizer, pattern, character) == bool(re.fullmatch(same, character)), character


def test_escapes_of_other_kinds_are_kept() -> None:
    for pattern in (r"\\d", r"\x64", r"\p{Nd}", r"\.\-\]", r"a-z", "\\", r"[\]-d]"):
        assert ascii_classes(pattern) == pattern
    assert ascii_classes("\\\n\\d") == "\\\n[0-9]"


def test_names_with_the_same_pattern_are_refused(server: RunningServer) -> None:
    """They are not merged, which would lose one of their schemas."""
    schema = {"type": "object", "patternProperties": {r"^\d$": {"type": "integer"}, "^[0-9]$": {"minimum": 3}}}
    response = ask(server.url, CHAT, response_format=json_schema(schema))
    assert "not disjoint" in check_error(response, 400)["message"]
