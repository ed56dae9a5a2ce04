"""The core without its parts: it answers, says what is missing, and passes its tests. Each part, alone and left out."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

from engine.shared.parts import ENGINE_PART_TITLES
from server.part_table import PARTS
from tests.e2e.conftest import StartServer
from tests.support.paths import ROOT
from tests.support.server_process import CHAT, ServerProcess

HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
PACKAGES = ("engine", "server", "tests")
PART = re.compile(r"(engine|server|tests\.engine|tests\.server)\.parts\.")
TEST = re.compile(r"tests\.(engine|server)\.(\w+\.)*test_")


def core(folder: Path, *parts: str) -> dict[str, str]:
    """Copy both packages without their parts but some, as engine/NAME or server/NAME. Return the environment to use."""
    for package in ("engine", "server"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("parts", "__pycache__"))
        (folder / package / "parts").mkdir()
        (folder / package / "parts" / "__init__.py").touch()
    for part in parts:
        package, name = part.split("/")
        shutil.copytree(ROOT / package / "parts" / name, folder / package / "parts" / name)
    return {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}


def with_needs(name: str) -> Iterator[str]:
    """Yield a part of the server, and the parts that it needs."""
    yield f"server/{name}"
    if (part := PARTS[name].engine_part) is not None:
        yield f"engine/{part}"
    for other in PARTS[name].needs:
        yield from with_needs(other)


def check_answers(server: ServerProcess) -> None:
    assert server.answer(CHAT, HELLO)["usage"]["completion_tokens"] == 4
    assert len(server.complete(max_tokens=4).json()["choices"][0]["text"]) > 0
    for path in ("/v1/models", "/health", "/metrics"):
        assert server.status(path) == 200, path


def test_the_core_answers_and_says_what_is_missing(start_server: StartServer, tmp_path: Path) -> None:
    environment = core(tmp_path)
    server = start_server(**environment)
    check_answers(server)
    for name, part in PARTS.items():
        for path in part.paths:
            response = server.http.post(path, json={})
            assert response.status_code == 404, path
            assert f"needs the part '{name}', which is not installed." in response.json()["error"]["message"]
    command = [sys.executable, "-m", "server.cli.main", "serve", "--api-server-count=2"]
    refused = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "--api-server-count: several API processes needs the part 'workers'" in refused.stderr


@pytest.mark.long
@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("is_alone", [True, False])
def test_each_part(start_server: StartServer, tmp_path: Path, name: str, is_alone: bool) -> None:
    everything = {*(f"server/{each}" for each in PARTS), *(f"engine/{each}" for each in ENGINE_PART_TITLES)}
    parts = set(with_needs(name)) if is_alone else everything - {f"server/{name}"}
    check_answers(start_server(**core(tmp_path, *parts)))


# The core's tests: those that import no part, when they are imported.


def imported(path: Path) -> Iterator[str]:
    """Yield the full names of what a file imports at once, and of the conftest.py beside and above it."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
    yield from (".".join((*folder.parts, "conftest")) for folder in path.relative_to(ROOT).parents)


def core_tests() -> list[str]:
    files = [
        path for package in PACKAGES for path in ROOT.glob(f"{package}/**/*.py") if "node_modules" not in path.parts
    ]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(files)}
    graph = nx.DiGraph((name, other) for name, path in names.items() for other in imported(path))
    graph.add_edges_from((name, "a part") for name in [*graph.nodes] if PART.match(name))
    chosen = names.keys() - nx.ancestors(graph, "a part")
    return sorted(str(names[name].relative_to(ROOT)) for name in chosen if TEST.match(name))


@pytest.mark.long
def test_the_core_passes_its_tests(tmp_path: Path) -> None:
    environment, chosen = core(tmp_path), core_tests()
    assert len(chosen) > 90
    shutil.copytree(
        ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("node_modules", "parts"), symlinks=True
    )
    for name in ("pyproject.toml", "docs", "README.md"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    command = [sys.executable, "-m", "pytest", "-q", "-n2", "--dist=loadfile", "-p", "no:cacheprovider", *chosen]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:]
