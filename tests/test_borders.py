"""Who may import whom, and what is never called.

Imports are tried in fresh processes; what stands in the source is read from its syntax tree, or found by ruff.
"""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import networkx as nx
import pytest

from tests.support.paths import ROOT

SOURCES = sorted(
    path.relative_to(ROOT).as_posix() for room in ("engine", "server") for path in ROOT.glob(f"{room}/**/*.py")
)
ENGINE, SERVER = ([path for path in SOURCES if path.startswith(room)] for room in ("engine/", "server/"))

# The books and the contract: plain Python.
ENGINE_WITHOUT_TORCH = ["shared", "config", "grammar", "scheduling"]
HEAVY = ["torch", "numpy", "transformers", "huggingface_hub"]
WEB = {"server", "fastapi", "pydantic", "starlette", "uvicorn"}
PARTS_FOR_SERVER = {"engine.parts.tokenizers", "engine.parts.inspection.records"}
ENGINE_FOR_SERVER = {"engine.shared", "engine.config", "engine.grammar"} | PARTS_FOR_SERVER

PROBE = """
import importlib, json, pkgutil, sys

names, unwanted = json.loads(sys.argv[1])
found = {}
for name in names:
    package = importlib.import_module(name)
    below = pkgutil.walk_packages(getattr(package, "__path__", []), name + ".")
    for module in [name, *(info.name for info in below)]:
        importlib.import_module(module)
        for other in sorted(sys.modules.keys() & set(unwanted)):
            found.setdefault(other, module)
print(json.dumps(found))
"""


def imported_along(names: list[str], unwanted: list[str]) -> dict[str, str]:
    """Import modules and all below in a fresh process; the unwanted ones that come along: name -> with whom first."""
    command = [sys.executable, "-c", PROBE, json.dumps([names, unwanted])]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    found: dict[str, str] = json.loads(result.stdout)
    return found


def test_the_books_of_the_engine_import_no_torch_and_no_server() -> None:
    assert imported_along([f"engine.{name}" for name in ENGINE_WITHOUT_TORCH], ["torch", *WEB]) == {}


def test_the_server_imports_nothing_heavy() -> None:
    """All but what runs in Ray's processes: Ray imports numpy."""
    modules = {module_name(path) for path in SERVER if not is_below(module_name(path), {"server.parts.ray"})}
    assert imported_along(sorted(modules - {"server", "server.parts"}), HEAVY) == {}
    assert imported_along(["server.parts.ray"], [name for name in HEAVY if name != "numpy"]) == {}


@cache
def tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def imports(path: str) -> Iterator[str]:
    """The full names that a file imports anywhere: modules, and what it takes from them."""
    package = Path(path).parent.parts
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else ())))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def first_part(name: str) -> str:
    return name.partition(".")[0]


def is_below(name: str, modules: set[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def test_the_engine_knows_nothing_of_the_web() -> None:
    assert [(path, name) for path in ENGINE for name in imports(path) if first_part(name) in WEB] == []


def test_the_server_knows_only_the_contract_of_the_engine() -> None:
    names = [(path, name) for path in SERVER for name in imports(path)]
    assert [entry for entry in names if first_part(entry[1]) == "torch"] == []
    of_engine = [entry for entry in names if first_part(entry[1]) == "engine"]
    assert [entry for entry in of_engine if not is_below(entry[1], ENGINE_FOR_SERVER)] == []


def module_name(path: str) -> str:
    """Return the dotted name of a source file; a package's is that of its folder."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def import_graph() -> dict[str, set[str]]:
    """Return the modules that each module imports, wherever in the file: under TYPE_CHECKING and in functions too."""
    modules = {module_name(path): path for path in SOURCES}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        names = set(imports(path))
        graph[module] = {name if name in modules else name.rpartition(".")[0] for name in names} & modules.keys()
    return graph


def folder_graph() -> dict[str, set[str]]:
    """Return the folders that the modules of each folder import from; an API and a part count by themselves."""

    def folder(module: str) -> str:
        names = module.split(".")
        return ".".join(names[: 3 if names[1:2] in (["api"], ["parts"]) else 2])

    graph: dict[str, set[str]] = {}
    for module, imported in import_graph().items():
        graph.setdefault(folder(module), set()).update(folder(name) for name in imported)
    return {name: imported - {name} for name, imported in graph.items()}


@pytest.mark.parametrize("graph", [import_graph, folder_graph])
def test_none_import_each_other_in_a_circle(graph: Callable[[], dict[str, set[str]]]) -> None:
    assert [part for part in nx.strongly_connected_components(nx.DiGraph(graph())) if len(part) > 1] == []


def test_the_core_imports_no_part() -> None:
    """It loads those that are there by their names, which stand in a table."""
    graph = import_graph()
    cores = [module for module in graph if ".parts" not in module]
    assert {(core, name) for core in cores for name in graph[core] if ".parts." in name} == set()


def test_every_folder_is_a_package() -> None:
    """Otherwise its files are not installed, and the tests above do not see them."""
    folders = {Path(path).parent for path in SOURCES}
    assert [folder for folder in sorted(folders) if not (ROOT / folder / "__init__.py").is_file()] == []


BANNED = ("pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "torch.load")
# As an argument, or as a key of arguments, with any value but False.
OPTIONS = re.compile(r"\b(trust_remote_code|allow_pickle)[\"']?\s*[=:](?!\s*False\b)")


def dangers(*places: Path) -> str:
    """Return what ruff finds that can run code from a file or from the network."""
    banned = ", ".join(f'"{name}" = {{msg = "runs code"}}' for name in BANNED)
    command = ["ruff", "check", "--isolated", "--ignore-noqa", "--quiet", "--select=TID251,S102,S307"]
    command += [f"--config=lint.flake8-tidy-imports.banned-api={{{banned}}}", "--output-format=concise"]
    return subprocess.run([sys.executable, "-m", *command, *places], capture_output=True, text=True, check=False).stdout


@pytest.mark.checklist("B10")
def test_no_code_is_run_that_comes_from_outside(tmp_path: Path) -> None:
    example = tmp_path / "example.py"
    example.write_text(
        "from pickle import loads\nimport torch\ntorch.load(x)  # noqa\neval(x)\nexec(x)\ntorch.eval()\n"
    )
    assert [int(line.split(":")[1]) for line in dangers(example).splitlines()] == [1, 3, 4, 5]
    assert dangers(ROOT / "engine", ROOT / "server") == ""
    assert OPTIONS.search('load(x, trust_remote_code=flag, options={"allow_pickle": False})')
    assert [path for path in SOURCES if OPTIONS.search((ROOT / path).read_text(encoding="utf-8"))] == []


def test_the_search_for_imports_finds_them() -> None:
    assert import_graph()["engine.core"] >= {"engine.runner", "engine.scheduling.scheduler"}
    assert "engine.scheduling.kv_manager.KVManager" in imports("engine/scheduling/scheduler.py")
    server_modules = [path.removesuffix(".py").replace("/", ".") for path in SERVER if not path.endswith("__init__.py")]
    assert sorted(imported_along(["server"], server_modules)) == server_modules


def test_only_readers_of_files_ask_for_the_family_of_a_model() -> None:
    names = {"engine.config.FAMILIES", "engine.config.family_of", "engine.config.families"}
    asking = {Path(path).parent.as_posix() for path in SOURCES if any(is_below(name, names) for name in imports(path))}
    assert asking == {"engine/config", "engine/parts/lora"}
