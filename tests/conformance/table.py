"""The table of tested clients: their versions, and the features of the server that their checks exercise."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
ENVIRONMENTS = FOLDER.parents[1] / ".venv-clients"
REPLAYS = FOLDER / "replays"
TRIED = FOLDER / "tried.json"  # by try_clients.py

# In the order of the table.
CAPABILITIES = (
    *("chat", "streaming", "async", "usage", "tools", "structured output", "logprobs"),
    *("completions", "responses", "messages", "embeddings", "models", "errors"),
)


@dataclass(frozen=True)
class Client:
    """A Python package, or an npm package if its file is JavaScript. `lock` names its Python environment."""

    package: str
    file: str
    lock: str = "clients"

    @property
    def is_javascript(self) -> bool:
        return self.file.endswith(".mjs")

    @property
    def name(self) -> str:
        return f"`{self.package}`, {'JavaScript' if self.is_javascript else 'Python'}"

    @property
    def version(self) -> str:
        if self.is_javascript:
            packages = json.loads((FOLDER / "package-lock.json").read_text(encoding="utf-8"))["packages"]
            return str(packages[f"node_modules/{self.package}"]["version"])
        lock = (FOLDER / "requirements" / f"{self.lock}.txt").read_text(encoding="utf-8")
        (version,) = re.findall(rf"^{re.escape(self.package)}==(\S+)", lock, re.MULTILINE)
        return str(version)

    @property
    def exercises(self) -> set[str]:
        source = (FOLDER / "clients" / self.file).read_text(encoding="utf-8")
        return set(re.findall(r'"(.+?)"', " ".join(re.findall(r"\bexercises\((.*?)\)", source))))


CLIENTS = (
    Client("openai", "openai_client.py"),
    Client("openai", "openai_client.mjs"),
    Client("anthropic", "anthropic_client.py"),
    Client("langchain-openai", "langchain_client.py"),
    Client("litellm", "litellm_client.py"),
    Client("instructor", "instructor_client.py", lock="instructor"),
    Client("pydantic-ai-slim", "pydantic_ai_client.py"),
    Client("@ai-sdk/openai-compatible", "ai_sdk_client.mjs"),
    Client("ollama", "ollama_client.py"),
    Client("ollama", "ollama_client.mjs"),
    Client("langchain-ollama", "langchain_ollama_client.py"),
)


def markdown_table() -> str:
    lines = ["| Client | version | what is exercised |", "|---|---|---|"]
    for client in CLIENTS:
        exercised = [capability for capability in CAPABILITIES if capability in client.exercises]
        lines.append(f"| {client.name} | {client.version} | {', '.join(exercised)} |")
    return "\n".join(lines) + "\n"


def tried_table() -> str:
    """Return the table of the programs of tried.json, and of those of which there are only recorded requests."""
    lines = ["| Program | Package | Version | Requests to | Result |", "|---|---|---|---|---|"]
    rows = json.loads(TRIED.read_text(encoding="utf-8"))
    for name, row in rows.items():
        result = f"fails: {row['failure']}" if row["failure"] else f"passed on {row['date']}"
        result += ", in `make test-long`" if row["locked"] else ""
        lines.append(_tried_row(name, row["package"], row["version"], row["apis"], result))
    for path in sorted(REPLAYS.glob("*.json")):
        replay = json.loads(path.read_text(encoding="utf-8"))
        if replay["client"] not in {row["package"] for row in rows.values()}:
            name, paths = path.stem.replace("-", " ").capitalize(), {request["path"] for request in replay["requests"]}
            lines.append(_tried_row(name, replay["client"], replay["version"], sorted(paths), "replayed"))
    return "\n".join(lines) + "\n"


def _tried_row(name: str, package: str, version: str, paths: list[str], result: str) -> str:
    endpoints = ", ".join(f"`{path.removeprefix('/v1/')}`" for path in paths)
    return f"| {name} | `{package}` | {version} | {endpoints} | {result} |"
