"""Regular expressions of both packages: none takes more than linear time, whatever text it is matched with."""

import ast
import importlib
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, product
from typing import NamedTuple

from engine.config.families import FAMILIES
from engine.distributed.plan import PLAN
from engine.weights.quantized_formats import _LAYOUTS
from server.api.messages.conversion import PARAMETER_NAMES as MESSAGES_NAMES
from server.api.ollama.conversion import EMBED_NAMES, EMBEDDINGS_NAMES, OPTIONS, OTHER_NAMES
from server.api.responses.conversion import PARAMETER_NAMES as RESPONSES_NAMES
from server.text.parsers.object_reader import _NAME, _OTHER_MEMBERS
from server.text.templates.chat_encoding import _trie_pattern
from server.text.templates.tool_probe import _VALUES
from tests.support.paths import ROOT
from tests.support.regex_cost import MODES, SEARCHES, why_not_linear

PACKAGES = ("engine", "server")
SETTING_TYPES = ("pattern", "named_paths")  # of settings whose second argument is matched as a whole

# Patterns that the code makes while it runs, by module and by the name or the source of the pattern: what they can be.
MADE: Mapping[tuple[str, str], Sequence[str]] = {
    ("engine.distributed.plan", "pattern"): [pattern for pattern, _ in PLAN],
    ("engine.lora.checkpoint", "pattern"): [
        pattern for family in FAMILIES for layout in (family.layout, family.gguf_layout) for pattern, _ in layout.names
    ],
    ("engine.weights.layout", "pattern"): (),  # those of the entry above
    ("engine.weights.quantized_formats", "_LAYOUTS[quantization.method][0]"): [row[0] for row in _LAYOUTS.values()],
    ("server.api.chat.request_builder", "pattern"): [
        *(MESSAGES_NAMES | RESPONSES_NAMES | OTHER_NAMES | EMBED_NAMES | EMBEDDINGS_NAMES),
        *(r"tools\[1\]\.function\.parameters", r"tools\[1\]\.function"),
        *(rf"{name}(?=$|\[)" for name in OPTIONS.values()),
    ],
    ("server.api.ollama.conversion", "pattern"): (),  # those of the entry above
    ("server.constrained.marker_writer", 'f"({tokens})"'): [r"(<\|end\|>|a\+)"],
    ("server.hub.files", 'rf"(?:^|[-.]){re.escape(tag.lower())}$"'): [r"(?:^|[-.])a\-a$"],
    ("server.settings.value_types", "regex"): (),  # found by SETTING_TYPES
    ("server.settings.value_types", "name_regex"): (),
    ("server.text.parsers.markers", "_pattern"): [r"<\|end\|>|<\|", "(?!)"],
    ("server.text.parsers.nested_tags", "_tag"): [r"<ns><(/?)([^<>/]+)>"],
    ("server.text.parsers.object_reader", "_header"): [
        rf'\{{\s*{_OTHER_MEMBERS}"(?:name|tool)"\s*:\s*"({_NAME})"\s*,\s*"(?:arguments)"\s*:\s*\{{'
    ],
    ("server.text.parsers.object_reader", "_arguments_first"): [
        rf'\{{\s*{_OTHER_MEMBERS}"(?:arguments|parameters)"\s*:\s*\{{'
    ],
    ("server.text.stop_strings", "_first_char"): [r"[a\]\-]"],
    ("server.text.templates.chat_encoding", '_trie_pattern(tokens) if tokens else "(?!)"'): [
        _trie_pattern(("<|end|>", "<|endoftext|>", "aab", "aaa", "aa"))
    ],
    ("server.text.templates.chat_encoding", "_any_guard"): ["[ab]"],
    ("server.text.templates.tool_probe", "re.escape(char)"): [r"\{"],
    ("server.text.templates.tool_probe", "_VALUES[kind]"): list(_VALUES.values()),
    ("server.text.templates.tool_probe", "pattern[0]"): [r"(?<!\w)0(?!\w)"],
    ("server.text.templates.tool_probe", "pattern[1]"): [r"(?<!\w)1(?!\w)"],
}
# Patterns that are not examined, with the reason.
EXCEPTIONS = {
    ("engine.lora.peft_config", 'rf"(.*\\.)?({pattern})$"'): "an adapter's own: few branchings, limited by time",
}


class Found(NamedTuple):
    """A regular expression in the source."""

    module: str
    name: str  # of the pattern, or its source if it has none
    line: int
    source: str
    flags: str
    modes: frozenset[str]  # the functions of `re` that match it

    def problems(self) -> Iterator[str]:
        """Yield why it may be slow. Raises NameError for a pattern that is made while the code runs."""
        names = vars(importlib.import_module(self.module))
        key = self.module, self.name
        patterns = MADE[key] if key in MADE else [eval(self.source, names)]
        for pattern, mode in product(patterns, self.modes):
            for why in why_not_linear(pattern, eval(self.flags, names), mode=mode):
                yield f"{self.module}:{self.line}: {mode} of {pattern!r}: {why}"


def find_patterns() -> list[Found]:
    """Return the patterns that both packages pass to functions of `re` and to the types of settings."""
    texts = {path: path.read_text() for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}
    texts = {path: text for path, text in texts.items() if re.search(r"\bre\.|\b(pattern|named_paths)\(", text)}
    nodes = {path: list(ast.walk(ast.parse(text))) for path, text in texts.items()}
    uses: dict[str, set[str]] = defaultdict(set)  # of compiled patterns, by name
    for node in chain.from_iterable(nodes.values()):
        if isinstance(node, ast.Attribute) and node.attr in MODES:
            uses[_name(node.value)].add(node.attr)
    found = []
    for path, text in texts.items():
        assigned = {node.value: _name(node.targets[0]) for node in nodes[path] if isinstance(node, ast.Assign)}
        for node in nodes[path]:
            if isinstance(node, ast.Call) and (argument := _pattern_argument(node)) is not None:
                source = ast.get_source_segment(text, argument) or ""
                function = _name(node.func)
                name = assigned.get(node, source) if function == "compile" else source
                modes = (uses.get(name) or MODES) if function == "compile" else {function} & MODES or {"fullmatch"}
                modes = {"search" if mode in SEARCHES else mode for mode in modes}
                module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                found.append(Found(module, name, node.lineno, source, _flags(node), frozenset(modes)))
    return found


def _name(node: ast.AST) -> str:
    return getattr(node, "id", getattr(node, "attr", ""))


def _pattern_argument(call: ast.Call) -> ast.expr | None:
    function = _name(call.func)
    if isinstance(call.func, ast.Attribute):
        is_re = _name(call.func.value) == "re" and function in MODES | {"compile"}
        return call.args[0] if is_re else None
    return call.args[1] if function in SETTING_TYPES else None


def _flags(call: ast.Call) -> str:
    arguments = [ast.unparse(each) for each in (*call.args, *(keyword.value for keyword in call.keywords))]
    return "|".join(["0", *(each for each in arguments if re.fullmatch(r"re\.[A-Z]+( \| re\.[A-Z]+)*", each))])


def test_patterns_take_linear_time() -> None:
    found = find_patterns()
    keys = {(each.module, each.name) for each in found}
    assert len(found) > 100
    assert [key for key in (*MADE, *EXCEPTIONS) if key not in keys] == []
    examined = [each for each in found if (each.module, each.name) not in EXCEPTIONS]
    assert list(chain.from_iterable(each.problems() for each in examined)) == []


def test_pydantic_matches_patterns_in_linear_time() -> None:
    """Its default engine, in Rust, does not backtrack."""
    texts = (path.read_text() for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    assert not any("regex_engine" in text or "from re import" in text for text in texts)


def test_slow_patterns_are_found() -> None:
    """One of each kind: a loop within a loop, two ways around a loop, one loop after another, a search."""
    for pattern in ("(a+)+b", "(aa|aaa)*b", "a*a*b", r"\s+$", r"(.)\1"):
        assert why_not_linear(pattern) != [], pattern
    assert why_not_linear(r"-?(\d+(\.\d+)?(ns|us|ms|s|m|h))+", mode="fullmatch") == []
