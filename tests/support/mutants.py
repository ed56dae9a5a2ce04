"""Changes that a test should notice: `python -m tests.support.mutants --help`.

Each mutant is one small change of the product: a comparison turned, a term dropped, a lock left out, a number off by
one. The tests of the changed module's folder are run on it until one fails. What none notices is listed: it lacks a
test, or makes no difference. Two trees are compared by running the same mutants, by name, in both.
"""

import argparse
import ast
import copy
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.paths import ROOT

SKIPPED = ("engine/parts/triton/", "server/cli/", "server/parts/ray/")
TURNED = {
    ast.Lt: ast.GtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
MAX_SECONDS = 400.0  # of the tests of one mutant; what hangs has been noticed
NOTICED, UNNOTICED = "noticed", "NOT NOTICED"


def mutate(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yield what a node can become, with the name of the change."""
    changed = copy.deepcopy(node)
    match changed:
        case ast.Compare(ops=[operator]) if type(operator) in TURNED:
            changed.ops = [TURNED[type(operator)]()]
            yield "turned", changed
        case ast.BinOp(op=ast.Add() | ast.Sub() | ast.Mult()):
            yield "term", changed.left
        case ast.BoolOp():
            yield "condition", changed.values[0]
        case ast.UnaryOp(op=ast.Not()):
            yield "not", changed.operand
        case ast.Constant(value=int() as value) if not isinstance(value, bool):
            changed.value = value + 1
            yield "number", changed
        case ast.Constant(value=bool() as value):
            changed.value = not value
            yield "flag", changed
        case ast.With(items=[ast.withitem(context_expr=expr, optional_vars=None)]) if "lock" in ast.unparse(expr):
            yield "lock", ast.If(ast.Constant(True), changed.body, [])
        case ast.Expr(value=ast.Call() | ast.Await()):
            yield "call", ast.Pass()


class Replace(ast.NodeTransformer):
    """Replaces one node of a tree."""

    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return ast.copy_location(self.new, node) if node is self.old else self.generic_visit(node)


def functions(module: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield the functions of a module and of its classes by their dotted names."""
    for node in module.body:
        for member in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{node.name}.{member.name}" if isinstance(node, ast.ClassDef) else member.name, member


def mutants(path: Path) -> Iterator[tuple[str, str]]:
    """Yield each mutant of a file: its name within the file, and the source."""
    module = ast.parse(path.read_text(encoding="utf-8"))
    for name, function in functions(module):
        body = [node for statement in function.body for node in ast.walk(statement)]  # not in decorators and defaults
        changes = [(node, change, new) for node in body for change, new in mutate(node)]
        for number, (node, change, new) in enumerate(changes, 1):
            Replace(node, new).visit(module)
            yield f"{name}#{number}:{change}", ast.unparse(ast.fix_missing_locations(module))
            Replace(new, node).visit(module)


def sources(root: Path) -> list[Path]:
    paths = [path for room in ("engine", "server") for path in sorted((root / room).rglob("*.py"))]
    return [path for path in paths if not path.relative_to(root).as_posix().startswith(SKIPPED)]


def draw(root: Path, count: int, seed: int) -> list[str]:
    """Return the names of some mutants, each of another file."""
    rng = random.Random(seed)
    names = []
    for path in rng.sample(sources(root), len(sources(root))):
        if found := [name for name, _ in mutants(path)]:
            names.append(f"{path.relative_to(root)}::{rng.choice(found)}")
        if len(names) == count:
            break
    return sorted(names)


def tests_of(root: Path, path: str) -> list[str]:
    """Return the folders of tests for a file, the nearest first, and the files of tests that name its module."""
    module = Path(path).with_suffix("")
    name = module.as_posix().replace("/", ".")
    naming = [
        test.relative_to(root).as_posix()
        for test in sorted((root / "tests").rglob("test_*.py"))
        if name in test.read_text(encoding="utf-8")
    ]
    mirror = next(folder for folder in Path("tests", path).parents if (root / folder).is_dir())
    return [*dict.fromkeys([*naming, mirror.as_posix()])]


def is_noticed(root: Path, path: str, source: str, options: list[str]) -> bool:
    """Run the tests of a file with another source in its place."""
    file = root / path
    original = file.read_text(encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:rerunfailures", *options, *tests_of(root, path)]
    try:
        file.write_text(source, encoding="utf-8")
        ran = subprocess.run(
            command,
            cwd=root,
            env=os.environ | {"PYTHONPATH": str(root)},
            capture_output=True,
            timeout=MAX_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return True
    finally:
        file.write_text(original, encoding="utf-8")
    return ran.returncode != 0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.support.mutants", description=__doc__)
    parser.add_argument(
        "--root", type=Path, default=ROOT, help="the tree to change, a clone of its own (default: this)"
    )
    parser.add_argument("--count", type=int, default=60, help="mutants to draw (default: 60)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--names", type=Path, metavar="FILE", help="run these, one name a line, instead of drawing")
    parser.add_argument("--list", action="store_true", help="only print the names")
    parser.add_argument("options", nargs="*", help="options of pytest, after --")
    args = parser.parse_args()
    root = args.root.resolve()
    names = args.names.read_text(encoding="utf-8").split() if args.names else draw(root, args.count, args.seed)
    if args.list:
        print("\n".join(names))
        return
    num_noticed = 0
    for name in names:
        path, _, within = name.partition("::")
        source = dict(mutants(root / path)).get(within)
        if source is None:
            print(f"not there    {name}")
            continue
        started = time.monotonic()
        noticed = is_noticed(root, path, source, args.options)
        num_noticed += noticed
        print(f"{NOTICED if noticed else UNNOTICED:12} {name} in {time.monotonic() - started:.0f} s", flush=True)
    print(f"{num_noticed} of {len(names)} noticed")


if __name__ == "__main__":
    main()
