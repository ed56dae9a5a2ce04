"""The files in deploy/ match the server: names of metrics and settings, and the rules for image and compose file."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families as parse_text

from deploy.bake_model import bake
from deploy.check_dashboard import load_dashboard, queries
from engine.shared.messages import EngineStats
from server.metrics import Metrics
from server.model_paths import resolve_model
from server.processes.child_process import KILL_SECONDS
from server.settings.load import load_settings
from server.settings.table import CONFIG_VARIABLE, OTHER_VARIABLES, SETTINGS
from server.sockets import bind_unix
from server.supervisor import DRAIN_GRACE_SECONDS, STOP_SECONDS
from tests.support.engine_info import ENGINE_INFO
from tests.support.paths import ROOT

DEPLOY = ROOT / "deploy"
LIGHTWELL_VARIABLES = {setting.variable for setting in SETTINGS.values()} | set(OTHER_VARIABLES)

Labels = dict[str, set[str]]  # name of a sample -> names of its labels


def load_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


COMPOSE = load_yaml(ROOT / "docker-compose.yml")
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


# Queries, compared with the metrics that the server exposes.


def exposed_metrics(prefix: str) -> Metrics:
    """Return the metrics of a server that has answered a request."""
    metrics = Metrics(prefix, "m")
    stats = EngineStats(num_blocks=100, num_blocks_used=3, prompt_tokens_total=9)
    engine = metrics.add_engine(0, lambda: stats)
    engine.set_info(ENGINE_INFO)
    engine.step_tokens.observe(9)
    engine.first_token.observe(0.1)
    metrics.observe_http("/v1/completions", "POST", 200, 3.0)
    return metrics


def exposed_labels(prefix: str) -> Labels:
    """Return the labels of each exposed sample, as a scraper parses them."""
    page = generate_latest(exposed_metrics(prefix).registry)
    labels: Labels = defaultdict(set)
    for sample in (sample for family in parse_text(page.decode()) for sample in family.samples):
        labels[sample.name] |= set(sample.labels)
    return labels


NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
KEYWORDS = {"and", "or", "unless"}
ADDED_LABELS = {"job", "instance"}  # which Prometheus adds


def selectors(query: str) -> list[tuple[str, set[str]]]:
    """Return the metrics in a PromQL query, each with the labels of its matchers."""
    query = re.sub(r"\b(by|without|on|ignoring)\s*\([^)]*\)", " ", query)
    found = re.findall(rf"(?<![\w:])({NAME})(?![\w:]*\s*\()(?:\{{([^}}]*)\}})?", re.sub(r"\[[^]]*\]", "", query))
    return [(name, set(re.findall(rf"({NAME})\s*[=!]", matchers))) for name, matchers in found if name not in KEYWORDS]


def grouping_labels(query: str) -> set[str]:
    return {name for group in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", query) for name in re.findall(NAME, group)}


def problems_of(query: str, exposed: Labels) -> list[str]:
    problems = []
    known_labels = set(ADDED_LABELS)
    for name, labels in selectors(query):
        if name != "up" and name not in exposed:
            problems.append(f"no metric {name}")
        known_labels |= exposed.get(name, set())
        unknown = labels - exposed.get(name, set()) - ADDED_LABELS
        problems += [f"{name} has no label {label}" for label in unknown]
    return problems + [f"no label {label}" for label in grouping_labels(query) - known_labels]


def test_dashboard_and_alerts_read_what_the_server_exposes() -> None:
    assert problems_of('sum by (l) (m{k="1"})', {"m": {"j"}}) == ["m has no label k", "no label l"]
    for prefix in ("vllm:", "lightwell_"):
        exposed = exposed_labels(prefix)
        variables = {"prefix": prefix, "model_name": ".*", "__rate_interval": "1m"}
        found = list(queries(load_dashboard(), variables))
        assert len(found) > 40
        assert [(title, problems) for title, query in found if (problems := problems_of(query, exposed))] == []
        assert [query for _, query in found if "$" in query] == []
    rules = [rule for group in load_yaml(DEPLOY / "prometheus/alerts.yml")["groups"] for rule in group["rules"]]
    assert rules
    assert [(rule["alert"], problems) for rule in rules if (problems := problems_of(rule["expr"], exposed))] == []


# The dashboard and how Grafana finds it.


def test_dashboard_variables() -> None:
    variables = {variable["name"]: variable for variable in load_dashboard()["templating"]["list"]}
    assert list(variables) == ["datasource", "prefix", "model_name"]
    prefixes = [option["value"] for option in variables["prefix"]["options"]]
    assert variables["prefix"]["query"].split(",") == prefixes == [SETTINGS["metrics_prefix"].default, "vllm:"]
    match = re.fullmatch(r"label_values\((.+), (.+)\)", variables["model_name"]["query"]["query"])
    assert match
    name, label = match.groups()
    assert label in exposed_labels("lightwell_")[name.replace("${prefix}", "lightwell_")]


def test_panels_read_the_chosen_source() -> None:
    panels = load_dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in (panel for panel in panels if panel["type"] != "row"):
        sources = [panel.get("datasource"), *(target["datasource"] for target in panel.get("targets", []))]
        assert {source["uid"] for source in sources} == {"${datasource}"}, panel["title"]
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24, panel["title"]


def test_grafana_is_provisioned() -> None:
    source = load_yaml(DEPLOY / "grafana/provisioning/datasources/prometheus.yml")["datasources"][0]
    provider = load_yaml(DEPLOY / "grafana/provisioning/dashboards/lightwell.yml")["providers"][0]
    mounts = dict(volume.removesuffix(":ro").split(":") for volume in SERVICES["grafana"]["volumes"])
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in SERVICES
    assert mounts["./deploy/grafana/dashboards"] == provider["options"]["path"]
    assert mounts["./deploy/grafana/provisioning"] == "/etc/grafana/provisioning"
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert Path(home).relative_to(provider["options"]["path"]) == Path("lightwell.json")


# docker-compose.yml


def test_services_listen_on_loopback_without_privileges() -> None:
    for name, service in SERVICES.items():
        assert [port for port in service["ports"] if not port.startswith("127.0.0.1:")] == [], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "image" not in service or re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name


@pytest.mark.checklist("G06")
def test_server_is_confined() -> None:
    server = SERVICES["lightwell"]
    assert server["read_only"] is True
    assert server["tmpfs"] == ["/tmp"]
    assert server["init"] is True
    assert server["restart"] == "unless-stopped"
    assert server["volumes"] == ["cache:/var/cache/lightwell"]
    assert server["environment"]["LIGHTWELL_API_KEY"].startswith("${LIGHTWELL_API_KEY:?")
    assert set(server["environment"]) <= LIGHTWELL_VARIABLES


def test_server_gets_the_time_that_it_needs_to_stop() -> None:
    grace = SERVICES["lightwell"]["stop_grace_period"]
    drain = load_settings().drain_timeout
    assert int(grace.removesuffix("s")) >= drain + DRAIN_GRACE_SECONDS + STOP_SECONDS + 2 * KILL_SECONDS


def test_prometheus_scrapes_the_server_with_the_key() -> None:
    job = load_yaml(DEPLOY / "prometheus/prometheus.yml")["scrape_configs"][0]
    assert job["static_configs"] == [{"targets": ["lightwell:8000"]}]
    assert SERVICES["lightwell"]["ports"] == ["127.0.0.1:8000:8000"]
    secret = SERVICES["prometheus"]["secrets"][0]
    assert job["authorization"] == {"credentials_file": f"/run/secrets/{secret['target']}"}
    assert secret["mode"] == 0o444
    assert COMPOSE["secrets"][secret["source"]] == {"environment": "LIGHTWELL_API_KEY"}
    assert not SERVICES["prometheus"].get("read_only")  # compose refuses it together with such a secret


# Dockerfile


def read_stages() -> list[list[tuple[str, str]]]:
    """Return the instructions of each stage, each with its arguments."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    stages: list[list[tuple[str, str]]] = [[]]
    for name, arguments in (line.split(maxsplit=1) for line in text.splitlines() if line):
        if name == "FROM":
            stages.append([])
        stages[-1].append((name, arguments.strip()))
    return stages


STAGES = read_stages()
IMAGE = dict(STAGES[-1])


def pairs(name: str, stages: list[list[tuple[str, str]]] = STAGES[-1:]) -> dict[str, str]:
    """Return the `key=value` pairs of all instructions called `name`, by default of the last stage."""
    found = [arguments for stage in stages for kind, arguments in stage if kind == name]
    return dict(word.split("=", 1) for arguments in found for word in shlex.split(arguments))


@pytest.mark.checklist("G06")
def test_image_runs_the_server_as_a_user_who_is_not_root() -> None:
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", IMAGE["USER"])
    assert json.loads(IMAGE["ENTRYPOINT"]) == ["lightwell", "serve"]
    assert IMAGE["STOPSIGNAL"] == "SIGTERM"


def test_image_downloads_nothing_from_fixed_addresses() -> None:
    instructions = [each for stage in STAGES for each in stage]
    assert [each for each in instructions if "://" in each[1] or each[0] == "ADD"] == []
    arguments = pairs("ARG", STAGES)
    assert arguments["PIP_ARGS"] == arguments["BAKE_MODEL"] == ""
    assert re.fullmatch(r"python:\$\{PYTHON_VERSION\}-slim-\w+", arguments["BASE_IMAGE"])


def test_image_settings_are_settings() -> None:
    variables = pairs("ENV")
    ours = {name: value for name, value in variables.items() if name.startswith("LIGHTWELL_")}
    assert set(ours) <= LIGHTWELL_VARIABLES
    del ours[CONFIG_VARIABLE]
    settings = load_settings(environ={**ours, "LIGHTWELL_API_KEY": "k"})
    assert settings.host == "0.0.0.0"
    assert str(settings.port) == IMAGE["EXPOSE"]
    assert variables["LIGHTWELL_CACHE"] == variables["HOME"] == IMAGE["VOLUME"]


@pytest.mark.checklist("G06")
def test_image_is_healthy_when_it_is_ready() -> None:
    command = json.loads(IMAGE["HEALTHCHECK"].split("CMD", 1)[1])
    assert command == ["python3", "-I", "/opt/lightwell/healthcheck.py"]
    assert ("COPY", "deploy/healthcheck.py /opt/lightwell/") in STAGES[-1]
    for status, code in ((200, 0), (503, 1)):
        with socket.create_server(("127.0.0.1", 0)) as listener, answering_once(listener, status):
            port = str(listener.getsockname()[1])
            result = check_health(LIGHTWELL_PORT=port)
        assert (result.returncode, result.stderr) == (code, "")
        assert result.stdout.startswith(str(status))
    assert check_health(LIGHTWELL_PORT=port).stdout.startswith("no answer")


@pytest.mark.long
@pytest.mark.parametrize("is_tls", [False, True])
def test_the_healthcheck_knows_unix_sockets_and_certificates(tmp_path: Path, *, is_tls: bool) -> None:
    path, listener = str(tmp_path / "lw.sock"), bind_unix(str(tmp_path / "lw.sock"))
    variables = {"LIGHTWELL_PORT": "1", "LIGHTWELL_UDS": path}
    if is_tls:
        certificate = ROOT / "tests/support/tls/one.crt"
        variables["LIGHTWELL_SSL_CERTFILE"] = str(certificate)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate, certificate.with_suffix(".key"))
        listener = context.wrap_socket(listener, server_side=True)
    with listener, answering_once(listener, 200):
        result = check_health(**variables)
    assert (result.returncode, result.stderr) == (0, "")


def check_health(**variables: str) -> "subprocess.CompletedProcess[str]":
    """Run the image's healthcheck with these environment variables."""
    check = [sys.executable, "-I", str(DEPLOY / "healthcheck.py")]
    return subprocess.run(check, env=variables, capture_output=True, text=True, check=False, timeout=20)


@contextmanager
def answering_once(listener: socket.socket, status: int) -> Iterator[None]:
    """Answer one request for /readyz with `status`, in a thread."""

    def answer() -> None:
        listener.settimeout(20)
        with listener.accept()[0] as connection:
            assert connection.recv(4096).startswith(b"GET /readyz HTTP/1.1\r\n")
            connection.sendall(f"HTTP/1.1 {status} X\r\ncontent-length: 0\r\n\r\n".encode())

    thread = threading.Thread(target=answer)
    thread.start()
    yield
    thread.join()


def test_image_version_is_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    labels = pairs("LABEL")
    for label, name in {"version": "version", "description": "description", "licenses": "license"}.items():
        assert labels[f"org.opencontainers.image.{label}"] == project[name]


def test_image_gets_what_it_copies() -> None:
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    copies = [arguments.split() for stage in STAGES for name, arguments in stage if name == "COPY"]
    copied = {source for words in copies if "--from" not in words[0] for source in words[:-1]}
    assert copied == allowed
    assert [source for source in copied if not (ROOT / source).exists()] == []


@pytest.mark.long
@pytest.mark.parametrize(("has_triton", "has_header"), [(False, True), (True, True), (True, False)])
def test_image_has_a_compiler_for_triton_only(has_triton: bool, has_header: bool, tmp_path: Path) -> None:
    """The instruction runs with programs that write down how they are called."""
    (command,) = [arguments for name, arguments in STAGES[-1] if name == "RUN" and "gcc" in arguments]
    assert STAGES[-1].index(("RUN", command)) < STAGES[-1].index(("USER", IMAGE["USER"]))
    if has_header:
        (tmp_path / "Python.h").touch()
    programs = {"pip": f"exit {int(not has_triton)}", "python3": f"echo {tmp_path}"}
    for name in ("pip", "python3", "apt-get", "rm"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >>{tmp_path}/calls\n{programs.get(name, "")}\n')
        (tmp_path / name).chmod(0o755)
    subprocess.run(["/bin/sh", "-ec", command], env={"PATH": str(tmp_path)}, check=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "pip show --quiet triton"
    installed = [call for call in calls if "install" in call]
    packages = "gcc libc6-dev" if has_header else "gcc libc6-dev python3-dev"
    assert installed == ([f"apt-get install --yes --no-install-recommends {packages}"] if has_triton else [])


@pytest.mark.long
def test_a_module_is_compiled_as_triton_does(tmp_path: Path) -> None:
    if not (shutil.which("gcc") and importlib.util.find_spec("triton")):
        pytest.skip("no gcc or no Triton")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    check = [sys.executable, str(DEPLOY / "check_triton.py")]
    done = subprocess.run(check, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert re.search(r"headers of CUDA \d{5}$", done.stdout.strip())
    assert list(tmp_path.glob("*/check_triton*.so"))
    assert subprocess.run(
        check, env=environment | {"CC": "/bin/false", "TRITON_CACHE_DIR": "/dev/null"}, check=False
    ).returncode


# A model in the image.


def test_baked_model_is_the_default_under_its_own_name(tmp_path: Path, smollm2_path: Path) -> None:
    bake(tmp_path / "models", str(smollm2_path))
    settings = load_settings(config=str(tmp_path / "models" / "config.yaml"))
    model = resolve_model(settings.model)
    assert model.name == smollm2_path.name
    assert model.path.is_relative_to(tmp_path)
    assert model.path.samefile(smollm2_path)
    bake(tmp_path / "none", "")
    assert load_settings(config=str(tmp_path / "none" / "config.yaml")) == load_settings()
