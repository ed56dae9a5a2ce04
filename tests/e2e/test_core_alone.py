"""The core without its parts: it answers, says what is missing, and passes its tests. Each part, alone and left out."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import networkx as nx
import pytest

from engine.shared.parts import ENGINE_PART_TITLES
from server.part_table import PARTS
from tests.e2e.conftest import StartServer
from tests.support.paths import ROOT
from tests.support.server_process import CHAT, ServerProcess
from tests.test_borders import imports, module_name

# These try settings and commands of parts, too.
WITH_PARTS = {f"tests/server/{name}.py" for name in ("cli/test_doctor", "settings/test_load", "test_main")}
PACKAGES = ("engine", "server", "tests")
PART = re.compile(r"(engine|server|tests\.engine|tests\.server)\.parts\.")
TEST = re.compile(r"tests\.(engine|server)\.(\w+\.)*test_")


def ignored(folder: str, names: list[str]) -> set[str]:
    return {"__pycache__", *(names if Path(folder).name == "parts" else ())} - {"__init__.py"}


def core(folder: Path, *parts: str) -> dict[str, str]:
    """Copy both packages without their parts but some, as engine/NAME or server/NAME. Return the environment to use."""
    for package in ("engine", "server"):
        shutil.copytree(ROOT / package, folder / package, ignore=ignored)
    for part in parts:
        package, name = part.split("/")
        shutil.copytree(ROOT / package / "parts" / name, folder / package / "parts" / name)
    return {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}


def run(command: list[str], environment: dict[str, str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False, **options)


def with_needs(name: str) -> set[str]:
    """Return a part of the server, and the parts that it needs."""
    part = PARTS[name]
    own = {f"server/{name}", *([f"engine/{part.engine_part}"] if part.engine_part else [])}
    return own.union(*map(with_needs, part.needs))


def check_answers(server: ServerProcess) -> None:
    assert server.answer(CHAT, {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4})["choices"]
    assert len(server.complete(max_tokens=4).json()["choices"][0]["text"]) > 0
    assert [server.status(path) for path in ("/v1/models", "/health", "/metrics")] == [200] * 3


def test_the_core_answers_and_says_what_is_missing(start_server: StartServer, tmp_path: Path) -> None:
    environment = core(tmp_path)
    server = start_server(**environment)
    check_answers(server)
    for name, part in PARTS.items():
        for path in part.paths:
            response = server.http.post(path, json={})
            assert response.status_code == 404, path
            assert response.json()["error"]["message"].startswith(f"This needs the part '{name}' (")
    command = [sys.executable, "-m", "server.cli.main"]
    for arguments, error in (
        (
            ["serve", "--api-server-count=2"],
            "--api-server-count: this needs the part 'workers' (several API processes)",
        ),
        (["build-kernels"], "build-kernels: this needs the part 'build_kernels' (the command build-kernels), which is"),
        (["serve", "-c", "2"], "unknown flag -c (see"),
    ):
        refused = run([*command, *arguments], environment)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        assert error in refused.stderr
    assert re.search("lightwell (run|bench|build)", run([*command, "doctor"], environment).stdout) is None


@pytest.mark.long
@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("is_alone", [True, False])
def test_each_part(start_server: StartServer, tmp_path: Path, name: str, is_alone: bool) -> None:
    everything = {*(f"server/{each}" for each in PARTS), *(f"engine/{each}" for each in ENGINE_PART_TITLES)}
    parts = with_needs(name) if is_alone else everything - {f"server/{name}"}
    check_answers(start_server(**core(tmp_path, *parts)))


def core_tests() -> list[str]:
    """Return the tests that import no part, nor does what they import."""
    files = [
        path.relative_to(ROOT).as_posix()
        for package in ("engine", "server", "tests")
        for path in ROOT.glob(f"{package}/**/*.py")
    ]
    names = {module_name(path): path for path in files if "node_modules" not in path}
    found = [(name, other) for name, path in names.items() for other in imports(path)]
    graph = nx.DiGraph((name, other if other in names else other.rpartition(".")[0]) for name, other in found)
    graph.add_edges_from((name, module_name(f"{Path(path).parent}/conftest.py")) for name, path in names.items())
    graph.add_edges_from((name, "a part") for name in [*graph.nodes] if PART.match(name))
    chosen = {names[name] for name in names.keys() - nx.ancestors(graph, "a part") if TEST.match(name)}
    return sorted(chosen - WITH_PARTS)


@pytest.mark.long
def test_the_core_passes_its_tests(tmp_path: Path, smollm2_path: Path) -> None:
    environment, chosen = core(tmp_path) | {"LIGHTWELL_TEST_MODEL": str(smollm2_path)}, core_tests()
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("node_modules"), symlinks=True)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "-n2", "--dist=loadfile", "-p", "no:cacheprovider", *chosen]
    done = run(command, environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-5000:]
