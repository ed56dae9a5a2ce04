"""Each Python example, unchanged, against a real server. test_examples_javascript.py has the JavaScript example."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from engine.config import load_model_config
from tests.e2e.conftest import StartServer
from tests.support.lora_adapters import save_random_adapter
from tests.support.paths import ROOT
from tests.support.server_process import MODEL, ServerProcess

EXAMPLES = ROOT / "examples"
SECONDS = 300.0  # limit for hangs only


def run(server: ServerProcess, name: str, *arguments: str) -> str:
    """Return what an example prints. Fails if it fails."""
    process = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        env=os.environ | {"OPENAI_BASE_URL": f"{server.url}/v1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def test_chat(server: ServerProcess) -> None:
    printed = run(server, "chat.py")
    first, second = printed.split("> And of Italy?\n")
    assert "Paris" in first
    assert second.strip()


def test_tools(server: ServerProcess) -> None:
    call, answer = run(server, "tools.py").split("\n", 1)
    arguments, total = re.fullmatch(r"add\((.+)\) = (\d+)", call).groups()  # type: ignore[union-attr]
    assert sum(json.loads(arguments).values()) == int(total)
    assert answer.strip()


def test_structured_output(server: ServerProcess) -> None:
    person, date, rest = run(server, "structured_output.py").split("\n")
    assert re.fullmatch(r".{0,20} is \d+ and likes (red|green|blue)", person)
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", date)
    assert rest == ""


def test_embeddings(server: ServerProcess) -> None:
    lines = run(server, "embeddings.py").splitlines()
    similarities = [float(line.split()[0]) for line in lines]
    assert len(lines) == 3
    assert 1 >= similarities[0] >= similarities[1] >= similarities[2]


def test_batch(server: ServerProcess, tmp_path: Path) -> None:
    questions = EXAMPLES / "questions.txt"
    target = tmp_path / "answers.jsonl"
    assert "8 answers" in run(server, "batch.py", str(questions), str(target))
    entries = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert [entry["question"] for entry in entries] == questions.read_text(encoding="utf-8").splitlines()
    assert all(entry["answer"] for entry in entries)


def test_metrics(server: ServerProcess) -> None:
    printed = run(server, "metrics.py")
    assert re.search(r"^running: +\d+ requests$", printed, re.MULTILINE)
    assert re.search(r"^KV cache: \d+% in use$", printed, re.MULTILINE)
    assert re.search(r"^generation tokens: \d+ a second, \d+ in all$", printed, re.MULTILINE)


def test_invariance(server: ServerProcess) -> None:
    assert "among 15 others: the same 32 tokens" in run(server, "invariance.py")


def test_lora(start_server: StartServer, smollm2_path: Path, tmp_path: Path) -> None:
    adapter = save_random_adapter(
        tmp_path / "adapter", load_model_config(smollm2_path), 1, ranks={"": 16}, strength=1.0
    )
    added, of_model, of_adapter, removed = run(
        start_server("--allow-runtime-lora-updating", "--max-loras=1"), "lora.py", str(adapter)
    ).splitlines()
    assert "added successfully" in added
    assert "removed successfully" in removed
    assert of_model.startswith(f"{MODEL}: ")
    assert of_adapter.startswith("example: ")
    assert of_model.partition(": ")[2] != of_adapter.partition(": ")[2]


def test_every_example_is_run() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    assert [path.name for path in EXAMPLES.glob("*.py") if f'"{path.name}"' not in source] == []
    assert [path.name for path in EXAMPLES.glob("*.mjs")] == ["chat.mjs"]
