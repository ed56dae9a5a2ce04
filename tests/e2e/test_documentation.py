"""What the documentation shows works: each command, but those of tests/docs/commands.py, each example, and the README.

One server is started with the flags of every `lightwell serve` that is shown, and all other commands run against it.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from engine.config import load_model_config
from tests.docs.commands import is_exception, shown_commands
from tests.support.documents import DOCUMENTS, blocks, commands
from tests.support.lora_adapters import save_random_adapter
from tests.support.paths import ROOT
from tests.support.server_process import MODEL, ServerProcess, shared_server

pytestmark = pytest.mark.long

SECONDS = 300.0  # limit for hangs only
EXAMPLES = ROOT / "examples"

# Stands in for `lightwell serve`, and prints its flags and environment variables.
RECORDER = """\
import json, os, sys
variables = {name: value for name, value in os.environ.items() if name.startswith("LIGHTWELL_")}
print(json.dumps([sys.argv[1:], variables]))
"""


def is_serve(command: str) -> bool:
    return "lightwell serve" in command


RUN = [document for document in DOCUMENTS if any(not is_exception(command) for command in commands(document))]


def shell(
    command: str, folder: Path = ROOT, environment: Mapping[str, str] | None = None, given: str = "", cwd: Path = ROOT
) -> str:
    """Return what a command prints. Fails if the command fails."""
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.run(
        ["sh", "-c", command],
        cwd=cwd,
        env={**os.environ, "PATH": path, **(environment or {})},
        input=given,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert process.returncode == 0, f"{command}\n{process.stdout}{process.stderr}"
    return process.stdout


@pytest.fixture(scope="module")
def folder(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with what the commands name: two adapters and the command `lightwell`."""
    folder, config = tmp_path_factory.mktemp("commands"), load_model_config(smollm2_path)
    for seed, name in enumerate(("folder", "file.gguf")):  # a folder may stand in for a GGUF file
        save_random_adapter(folder / name, config, seed, ranks={"": 8}, strength=1.0)
    script = folder / "bin" / "lightwell"
    script.parent.mkdir()
    model = f"LIGHTWELL_MODEL={shlex.quote(str(smollm2_path))}"  # the default of `lightwell run`
    script.write_text(f'#!/bin/sh\n{model} exec {shlex.quote(sys.executable)} -m server.cli.main "$@"\n')
    script.chmod(0o755)
    (folder / "recorder.py").write_text(RECORDER)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path, smollm2_path: Path) -> Iterator[ServerProcess]:
    flags: list[str] = []
    variables: dict[str, str] = {}
    recorder = f"{shlex.quote(sys.executable)} {shlex.quote(str(folder / 'recorder.py'))}"
    for command in filter(is_serve, shown_commands()):
        if not is_exception(command):
            printed = shell(filled_in(command, folder).replace("lightwell serve", recorder), folder)
            some_flags, some_variables = json.loads(printed)
            flags += some_flags
            variables |= some_variables
    own = ("--allow-runtime-lora-updating", "--record-requests=100", "--max-model-len=1024", "--kv-cache-memory=128MiB")
    with shared_server(smollm2_path, *flags, *own, **variables) as server:
        yield server


def filled_in(command: str, folder: Path) -> str:
    for placeholder in ("folder", "file.gguf"):
        command = command.replace(f"path/to/{placeholder}", str(folder / placeholder))
    return command.replace("config.yaml", str(folder / "config.yaml"))


@pytest.mark.parametrize("document", RUN)
def test_commands_of(document: str, server: ServerProcess, folder: Path) -> None:
    request_id = server.complete(max_tokens=4).json()["id"]
    for command in commands(document):
        if not is_exception(command) and not is_serve(command) and command != "make serve":
            own = filled_in(command, folder).replace(":8000", f":{server.port}").replace("/ID/", f"/{request_id}/")
            assert run(own, server, folder)


def run(command: str, server: ServerProcess, folder: Path) -> str:
    """Run a command that is shown against `server`, and return what it prints."""
    program, _, arguments = command.partition(" ")
    match program:
        case "curl":
            return shell(f"curl -sS --fail-with-body {arguments}", folder)
        case ".venv/bin/python":
            return shell(f"{shlex.quote(sys.executable)} {arguments}", folder, {"OPENAI_BASE_URL": f"{server.url}/v1"})
        case ".venv/bin/lightwell":
            return shell(f"lightwell {arguments} --url {server.url}", folder, given="Hello!\n")
        case "make" | "cat" | "echo" | "lightwell":
            return shell(command, folder)
    pytest.fail(f"no case for this command: {command}")


def test_make_serve(tmp_path: Path) -> None:
    """In an environment that make need not create first, with a stand-in for the command."""
    assert "make serve" in shown_commands()
    (tmp_path / "lightwell").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "lightwell").chmod(0o755)
    printed = shell(f"make --silent --old-file=.venv/installed BIN={tmp_path} serve ARGS='model.gguf --port 1'")
    assert printed.splitlines()[-1] == "serve model.gguf --port 1"


def test_the_readme_as_printed(server: ServerProcess, tmp_path: Path) -> None:
    texts = [block.text.replace(":8000", f":{server.port}") for block in blocks("README.md")]
    (command,) = (text for text in texts if "The capital of France" in text and text.startswith("curl"))
    assert "Paris" in json.loads(shell(command))["choices"][0]["text"]
    (example,) = (text for text in texts if "from openai" in text)
    (tmp_path / "example.py").write_text(example)
    assert shell(f"{shlex.quote(sys.executable)} {tmp_path / 'example.py'}").strip()


# What each example prints, as a regular expression. `{folder}`: a folder with an adapter.
PRINTED = {
    "chat.py": r"(?s).*Paris.*> And of Italy\?\n.*\w.*",
    "tools.py": r"(?s)add\((.+)\) = \d+\n.*\w.*",
    "structured_output.py": r".{0,20} is \d+ and likes (red|green|blue)\n\d{4}-\d{2}-\d{2}\n",
    "embeddings.py": r"(\d\.\d+.*\n){3}",
    "batch.py {examples}/questions.txt {folder}/answers.jsonl": r"(?s).*8 answers.*",
    "metrics.py": r"(?s).*running: +\d+ requests\n.*KV cache: \d+% in use\n.*: \d+ a second, \d+ in all\n.*",
    "invariance.py": r"(?s).*among 15 others: the same 32 tokens.*",
    "lora.py {folder}/folder": r"(?s).*added successfully.*\n" + MODEL + r": (.*)\nexample: (?!\1\n).*\n.*removed.*",
}


@pytest.mark.parametrize("command", PRINTED)
def test_an_example(command: str, server: ServerProcess, folder: Path) -> None:
    """Unchanged, and with the arguments that it needs."""
    arguments = command.format(folder=folder, examples=EXAMPLES)
    printed = shell(
        f"{shlex.quote(sys.executable)} {EXAMPLES}/{arguments}", folder, {"OPENAI_BASE_URL": f"{server.url}/v1"}
    )
    assert re.fullmatch(PRINTED[command], printed), printed


def test_every_example_is_run() -> None:
    """The textbook is run by tests/e2e/test_textbook.py."""
    run = ["textbook.py", *(command.split()[0] for command in PRINTED)]
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == sorted(run)
    assert [path.name for path in EXAMPLES.glob("*.mjs")] == ["chat.mjs"]


def test_the_example_in_javascript(server: ServerProcess, tmp_path: Path) -> None:
    """With the official client from npm."""
    assert shutil.which("npm"), "this test needs node and npm (on Debian and Ubuntu: the package npm)"
    shell("npm install --no-audit --no-fund --no-update-notifier openai", cwd=tmp_path)
    shutil.copy(EXAMPLES / "chat.mjs", tmp_path)
    assert shell("node chat.mjs", environment={"OPENAI_BASE_URL": f"{server.url}/v1"}, cwd=tmp_path).strip()
