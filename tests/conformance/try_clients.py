"""Install each program of programs.py from its registry and hold a short conversation with it.

    python -m tests.conformance.try_clients [--only NAME ...] [--folder FOLDER] [--record]

Writes tried.json, from which `python -m tests.docs.generate` makes the table in docs/clients.md. With --record, also
writes the requests of those that passed to replays/, reduced to what differs, without texts, paths and ids of whoever
recorded them, for test_replays.py.
Programs already installed in FOLDER are used as they are; without it, a temporary folder is used and removed.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.conformance.programs import PROGRAMS, Program, converse, installed_version
from tests.conformance.scripted_server import Exchange, ScriptedServer, scripted_server
from tests.conformance.table import REPLAYS, TRIED

MAX_CHARS = 48  # longer texts are replaced
TEXT_KEYS = {"description", "text", "instructions", "content", "output", "title", "markdownDescription"}
KEPT_TEXTS = {"hello", "I will look.\n", "marker-42"}
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
# Headers that a server may read. Clients send others about themselves.
HEADERS = ("accept", "anthropic-version", "anthropic-beta", "content-type", "openai-beta", "user-agent")


def install(program: Program, folder: Path) -> Path:
    """Install the program in `folder` unless it is there, and return the folder of its commands."""
    bin = folder / ("node_modules/.bin" if program.registry == "npm" else "bin")
    if bin.exists():
        return bin
    folder.mkdir(parents=True, exist_ok=True)
    quiet = ["--no-audit", "--no-fund", "--no-update-notifier"]
    command = ["npm", "install", "--prefix", str(folder), *quiet]
    if program.registry == "PyPI":
        venv.create(folder, with_pip=True)
        command = [str(bin / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*command, *program.packages], check=True, stdout=subprocess.DEVNULL)
    return bin


def attempt(program: Program, folder: Path, server: ScriptedServer, *, record: bool) -> dict[str, Any]:
    """Install and run a program, and return its row of tried.json."""
    row: dict[str, Any] = {"package": program.package, "registry": program.registry, "locked": bool(program.locked)}
    row["date"] = datetime.now(UTC).date().isoformat()
    try:
        bin = install(program, folder)
    except subprocess.CalledProcessError as error:
        return row | {"version": "", "apis": [], "failure": f"could not be installed: {error}"}
    version = installed_version(program, bin)
    with tempfile.TemporaryDirectory(prefix="lw-home-", ignore_cleanup_errors=True) as home:
        trial = converse(program, bin, Path(home), server)
    if trial.failure:
        print(trial.output[-3000:], file=sys.stderr)
    elif record:
        write_replay(program, version, trial.exchanges)
    paths = {exchange.path.partition("?")[0] for exchange in trial.exchanges}
    apis = sorted(path for path in paths if path.startswith("/v1/"))
    return row | {"version": version, "apis": apis, "failure": trial.failure}


def write_replay(program: Program, version: str, exchanges: Sequence[Exchange]) -> None:
    """Write the requests of a conversation that are not like an earlier one."""
    requests: list[dict[str, Any]] = []
    for exchange in exchanges:
        if exchange.path.startswith("/v1/"):
            headers = {name: exchange.headers[name] for name in HEADERS if name in exchange.headers}
            request = {"method": exchange.method, "path": exchange.path, "headers": headers}
            requests.append(request | {"warnings": exchange.warnings, "body": reduced(exchange.body)})
    requests = _distinct(requests, lambda each: {f"{each['path']} {shape}" for shape in shapes(each["body"])})
    replay = {"client": program.package, "version": version, "requests": requests}
    text = json.dumps(replay, indent=1, ensure_ascii=False)
    (REPLAYS / f"{program.slug}.json").write_text(text + "\n", encoding="utf-8")


def reduced(value: Any, key: str = "") -> Any:
    """Return the value with short texts, and with only those tools that are not like an earlier one."""
    if isinstance(value, dict):
        return {name: reduced(item, name) for name, item in value.items()}
    if isinstance(value, list):
        items = [reduced(item, key) for item in value]
        return _distinct(items, lambda item: set(shapes(item)))[:12] if key == "tools" else items
    if isinstance(value, str):
        return _reduced_text(value, key)
    return value


def _reduced_text(text: str, key: str) -> str:
    text = UUID.sub("00000000-0000-4000-8000-000000000000", text)
    if text in KEPT_TEXTS or key == "$schema" or (key not in TEXT_KEYS and len(text) <= MAX_CHARS and "/" not in text):
        return text
    if key == "arguments" or not text:  # JSON
        return text
    return f"A text of {len(text)} characters."


def _distinct(items: list[Any], shapes_of: Callable[[Any], set[str]]) -> list[Any]:
    """Return the items whose shape has something that no earlier one has."""
    kept, seen = list[Any](), set[str]()
    for item in items:
        if not (new := shapes_of(item)) <= seen:
            kept.append(item)
        seen |= new
    return kept


def shapes(value: Any, path: str = "") -> Iterator[str]:
    """Yield the paths in a value, each with the type found there. Names of properties and indices are left out."""
    if isinstance(value, dict):
        is_named = path.endswith(".properties")
        for name, item in value.items():
            yield from shapes(item, path if is_named else f"{path}.{name}")
    elif isinstance(value, list):
        yield f"{path} list"
        for item in value:
            yield from shapes(item, path)
    elif path.endswith((".type", ".role")):
        yield f"{path} {value}"
    else:
        yield f"{path} {type(value).__name__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [program.name for program in PROGRAMS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="programs to try")
    parser.add_argument("--folder", type=Path, help="where programs are installed, and stay")
    parser.add_argument("--record", action="store_true", help="write replays/")
    arguments = parser.parse_args()
    rows: dict[str, Any] = json.loads(TRIED.read_text(encoding="utf-8")) if TRIED.exists() else {}
    with ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lw-clients-")))
        server = stack.enter_context(scripted_server())
        for program in (program for program in PROGRAMS if program.name in arguments.only):
            row = attempt(program, folder.resolve() / program.slug, server, record=arguments.record)
            print(f"{program.name} {row['version']}: {row['failure'] or 'passed'}", flush=True)
            rows[program.name] = row
            TRIED.write_text(json.dumps({name: rows[name] for name in names if name in rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
