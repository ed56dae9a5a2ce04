"""Programs and libraries that are tried with the scripted server, and how each is started."""

import json
import os
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conformance.scripted_server import GREETING, MODEL, NAMES, Exchange, ScriptedServer
from tests.conformance.table import FOLDER

SECONDS = 300.0  # timeout of a conversation; only bounds hangs
COMMAND = "echo marker-$((40+2))"
SUM = {"a": 40, "b": 2}
MARKER = "marker-42"  # what COMMAND, and the tool of libraries.py, return
CLAUDE = {
    "ANTHROPIC_BASE_URL": "{url}",
    "ANTHROPIC_AUTH_TOKEN": "none",
    "ANTHROPIC_MODEL": MODEL,
    "ANTHROPIC_DEFAULT_HAIKU_MODEL": MODEL,
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
}
OPENAI = {"OPENAI_API_KEY": "none", "OPENAI_MODEL": MODEL}
OPENAI |= dict.fromkeys(("OPENAI_BASE_URL", "OPENAI_API_BASE"), "{url}/v1")

CODEX_CONFIG = f"""
model = "{MODEL}"
model_provider = "lightwell"
[model_providers.lightwell]
name = "Lightwell"
base_url = "URL/v1"
wire_api = "responses"
"""
CONTINUE_CONFIG = f"""
name: lightwell
version: 1.0.0
schema: v1
models:
  - {{name: m, provider: openai, model: {MODEL}, apiBase: URL/v1, apiKey: none, capabilities: [tool_use]}}
"""
LLM_CONFIG = f"""
- {{model_id: {MODEL}, model_name: {MODEL}, api_base: URL/v1, supports_tools: true}}
"""
OPENCODE_CONFIG = """
{"provider": {"lw": {"npm": "@ai-sdk/openai-compatible", "options": {"baseURL": "URL/v1", "apiKey": "none"},
 "models": {"tiny": {}}}}, "model": "lw/tiny", "small_model": "lw/tiny", "autoupdate": false}
"""
PI_CONFIG = """
{"providers": {"lw": {"baseUrl": "URL/v1", "api": "openai-completions", "apiKey": "none",
 "models": [{"id": "tiny"}]}}}
"""


@dataclass(frozen=True)
class Program:
    """A program. In its command, {bin} is where it is installed and {url} the server; URL in its files."""

    name: str
    source: str  # npm or PyPI, and packages as its installer takes them; the first is named in the documentation
    command: str  # of the shell
    calls: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # of a tool that it offers, with arguments
    greeting: str = GREETING
    variables: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)  # in its home folder
    locked: str = ""  # the environment in which `make test-long` installs it

    @property
    def registry(self) -> str:
        return self.source.split()[0]

    @property
    def packages(self) -> list[str]:
        return self.source.split()[1:]

    @property
    def package(self) -> str:
        return self.packages[0].split("[")[0]

    @property
    def slug(self) -> str:
        return self.name.lower().replace(" ", "-").replace(",", "")


def library(
    name: str, packages: str, function: str = "", *, tool: str = "add", greeting: str = GREETING, locked: str = ""
) -> Program:
    """Return the program that runs a function of libraries.py. By default its name is the library's."""
    command = f"{{bin}}/python {FOLDER}/libraries.py {function or name.lower().replace(' ', '_')} {{url}}/v1"
    return Program(name, f"PyPI {packages}", command, {tool: SUM} if tool else {}, greeting, OPENAI, locked=locked)


def javascript_library(name: str, packages: str, function: str) -> Program:
    command = f"node {FOLDER}/libraries.mjs {function} {{url}}/v1 {{bin}}/../.."
    return Program(name, f"npm {packages}", command, {"add": SUM})


JSON_GREETING = f'{{"text": "{GREETING}"}}'

PROGRAMS = (
    Program(
        "Claude Code",
        "npm @anthropic-ai/claude-code",
        "{bin}/claude -p hello --allowedTools Bash; {bin}/claude -p /context --continue; "
        "MAX_THINKING_TOKENS=2000 {bin}/claude -p hello --allowedTools Bash",
        {"Bash": {"command": COMMAND, "description": "Print a marker"}},
        variables=CLAUDE,
        locked="npm",
    ),
    Program(
        "Claude Code, web search",
        "npm @anthropic-ai/claude-code",
        "{bin}/claude -p hello --allowedTools WebSearch",
        {"WebSearch": {"query": MARKER}},
        variables=CLAUDE,
    ),
    Program(
        "Codex",
        "npm @openai/codex",
        f"for model in {' '.join(NAMES)}; do {{bin}}/codex exec --model $model --skip-git-repo-check "
        "--dangerously-bypass-approvals-and-sandbox hello; done",
        {"exec_command": {"cmd": COMMAND}},
        files={".codex/config.toml": CODEX_CONFIG},
    ),
    Program(
        "Cline",
        "npm cline",
        f"{{bin}}/cline auth -p openai -k none -m {MODEL} -b {{url}}/v1; "
        f"{{bin}}/cline -P openai-compatible -m {MODEL} 'hello there'",
        {"run_commands": {"commands": [COMMAND]}},
    ),
    Program(
        "Continue",
        "npm @continuedev/cli",
        "{bin}/cn --config {home}/continue.yaml --auto -p hello",
        {"Bash": {"command": COMMAND}},
        files={"continue.yaml": CONTINUE_CONFIG},
        locked="npm",
    ),
    Program(
        "aider",
        "PyPI aider-chat",
        f"{{bin}}/aider --model openai/{MODEL} --no-git --yes-always --no-check-update --no-show-model-warnings "
        "--no-analytics --message hello",
        variables=OPENAI,
    ),
    library("Open WebUI", "open-webui", tool=""),
    javascript_library("LibreChat agents", "@librechat/agents", "librechat"),
    Program(
        "Qwen Code",
        "npm @qwen-code/qwen-code",
        "{bin}/qwen --auth-type openai --yolo -p hello",
        {"run_shell_command": {"command": COMMAND, "is_background": False}},
        variables=OPENAI,
    ),
    Program(
        "opencode",
        "npm opencode-ai",
        "{bin}/opencode run hello",
        {"bash": {"command": COMMAND, "description": "Print a marker"}},
        files={".config/opencode/opencode.json": OPENCODE_CONFIG},
    ),
    Program(
        "pi",
        "npm @mariozechner/pi-coding-agent",
        f"{{bin}}/pi --provider lw --model {MODEL} -p hello",
        {"bash": {"command": COMMAND}},
        files={".pi/agent/models.json": PI_CONFIG},
    ),
    Program(
        "llm",
        "PyPI llm",
        f"{{bin}}/llm -m {MODEL} --key none hello; {{bin}}/llm -m {MODEL} --key none -T llm_time hello",
        {"llm_time": {}},
        variables={"LLM_USER_PATH": "{home}"},
        files={"extra-openai-models.yaml": LLM_CONFIG},
        locked="agents",
    ),
    javascript_library("OpenAI Agents, JavaScript", "@openai/agents zod", "agents"),
    javascript_library("LangChain, JavaScript", "@langchain/openai @langchain/core zod", "langchain"),
    library("OpenAI Agents", "openai-agents", locked="agents"),
    library("AutoGen", "autogen-ext[openai] autogen-agentchat", locked="agents"),
    library("CrewAI", "crewai"),
    library("DSPy", "dspy", tool=""),
    library("Haystack", "haystack-ai"),
    library("LlamaIndex", "llama-index-llms-openai-like", "llama_index"),
    library("Outlines", "outlines[openai]", tool="", greeting=JSON_GREETING, locked="agents"),
    library("Semantic Kernel", "semantic-kernel", tool="plugin-add"),
    library("smolagents", "smolagents[openai]", locked="agents"),
)


@dataclass(frozen=True)
class Trial:
    """The outcome of one conversation."""

    exchanges: list[Exchange]
    failure: str  # "": it passed
    output: str


def converse(program: Program, bin: Path, home: Path, server: ScriptedServer) -> Trial:
    """Run the program once against the server.

    It passes if it ends well, prints what the model said and its tool returned, and none of its requests was refused.
    """
    script = server.script
    script.tool, script.arguments, script.greeting = "", {}, program.greeting
    for tool, arguments in program.calls.items():
        script.tool, script.arguments = tool, dict(arguments)
    places = {"bin": shlex.quote(str(bin)), "url": server.url, "home": shlex.quote(str(home))}
    for name, text in program.files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text.replace("URL/v1", f"{server.url}/v1"))
    work = home / "work"
    work.mkdir()
    (work / "README.md").write_text("# An example\n")
    variables = {name: value.format(**places) for name, value in program.variables.items()}
    first = len(server.exchanges)
    try:
        done = subprocess.run(
            ["sh", "-ec", program.command.format(**places)],
            cwd=work,
            env=_environment() | variables | {"HOME": str(home)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=SECONDS,
            check=False,
        )
        output, code = done.stdout.decode(errors="replace"), str(done.returncode)
    except subprocess.TimeoutExpired as error:
        output, code = (error.stdout or b"").decode(errors="replace"), "a timeout"
    exchanges = server.exchanges[first:]
    return Trial(exchanges, _failure(program, code, output, exchanges), output)


def _environment() -> dict[str, str]:
    """Return the environment without variables that would redirect a program."""
    prefixes = ("OPENAI", "ANTHROPIC", "CLAUDE", "CODEX", "LIGHTWELL", "PYTHON", "VIRTUAL_ENV", "GIT")
    return {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}


def _failure(program: Program, code: str, output: str, exchanges: list[Exchange]) -> str:
    for exchange in exchanges:
        if exchange.status >= 400 and exchange.path != "/":
            return f"{exchange.method} {exchange.path}: {exchange.status} {exchange.answer[:300]}"
    if code != "0":
        return f"it ended with {code}"
    if not any(exchange.method == "POST" and exchange.status == 200 for exchange in exchanges):
        return "it asked nothing"
    text = MARKER if any(program.calls.values()) else GREETING
    return "" if text in output else f"it did not print {text!r}"


def installed_version(program: Program, bin: Path) -> str:
    if program.registry == "npm":
        package = bin.parent / program.package / "package.json"
        return str(json.loads(package.read_text(encoding="utf-8"))["version"])
    code = f"from importlib.metadata import version; print(version('{program.package}'))"
    return subprocess.run([bin / "python", "-c", code], capture_output=True, text=True, check=True).stdout.strip()
