"""The application's arguments and its deployments."""

from typing import Any, cast

import pytest
import yaml
from kubernetes_validate.utils import validate
from ray.serve import Application

from server.parts.ray.app import app, replica_settings
from server.settings.setting import SettingsError
from server.settings.table import Settings
from tests.support.paths import ROOT

pytestmark = pytest.mark.long

FOLDER = ROOT / "deploy/ray"


@pytest.fixture(autouse=True)
def _no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LIGHTWELL_API_KEY", "LIGHTWELL_CONFIG", "LIGHTWELL_MODEL"):
        monkeypatch.delenv(name, raising=False)


def test_arguments_are_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replica_settings({"max-num-seqs": "8", "kv_cache_memory": "64MiB", "allow-unauthenticated": True})
    assert (settings.max_num_seqs, settings.kv_cache_memory) == (8, 64 << 20)
    monkeypatch.setenv("LIGHTWELL_API_KEY", "sk-secret")
    monkeypatch.setenv("LIGHTWELL_MODEL", "of the environment")
    assert replica_settings({"model": "of the arguments"}).model == "of the arguments"
    assert replica_settings({}).model == "of the environment"


def test_arguments_that_are_refused() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"max-num-sequences": 8}, "args: unknown setting 'max-num-sequences'"),
        ({"max-num-seqs": 0}, "--max-num-seqs: expected an integer from 1 to 65536, got 0"),
        ({"port": 80, "root-path": "/llm", "api-key": "k"}, "port, root_path: not here, Ray Serve has"),
        ({}, "set api-key"),
    ]
    for args, message in cases:
        with pytest.raises(SettingsError, match=message):
            app(args)


def test_settings_of_the_environment_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTWELL_HOST", "0.0.0.0")  # as the image does
    monkeypatch.setenv("LIGHTWELL_PORT", "8000")
    assert replica_settings({"api-key": "k"}).port == 8000
    monkeypatch.setenv("LIGHTWELL_SSL_CERTFILE", "/a")
    monkeypatch.setenv("LIGHTWELL_UDS", "/b")
    with pytest.raises(SettingsError, match="uds, ssl_certfile: not here, Ray Serve has"):
        replica_settings({"api-key": "k"})


def test_deployments() -> None:
    found = app({"api-key": "k", "drain-timeout": 50, "max-num-seqs": 8, "max-queued-requests": 100})
    ingress = found._bound_deployment
    replicas, settings = cast("tuple[Application, Settings]", ingress.init_args)
    assert settings.drain_timeout == 50
    assert (ingress.name, replicas._bound_deployment.name) == ("Ingress", "Lightwell")
    options = replicas._bound_deployment._deployment_config
    assert options.graceful_shutdown_timeout_s > 50, "the server ends its requests before Serve kills it"
    assert options.max_ongoing_requests > 108, "the server's own limits apply, with their errors"


def read(file: str) -> Any:
    return yaml.safe_load((FOLDER / file).read_text(encoding="utf-8"))


(APPLICATION,) = read("serve.yaml")["applications"]
OPTIONS = {each["name"]: each for each in APPLICATION["deployments"]}
SERVICE = read("rayservice.yaml")["spec"]
CLUSTER = SERVICE["rayClusterConfig"]
(WORKERS,) = CLUSTER["workerGroupSpecs"]
PODS = [group["template"] for group in (CLUSTER["headGroupSpec"], WORKERS)]


def test_shipped_files_describe_this_application() -> None:
    assert yaml.safe_load(SERVICE["serveConfigV2"])["applications"] == [APPLICATION]
    assert APPLICATION["import_path"] == f"{app.__module__}:{app.__name__}"
    settings = replica_settings(APPLICATION["args"] | {"api-key": "k"})
    assert OPTIONS.keys() == {"Ingress", "Lightwell"}
    assert OPTIONS["Lightwell"]["graceful_shutdown_timeout_s"] > settings.drain_timeout
    assert OPTIONS["Lightwell"]["autoscaling_config"]["target_ongoing_requests"] < settings.max_num_seqs


def test_the_pods_outlive_the_requests_of_their_replicas() -> None:
    """Ray's own limit on the time for requests to end is 30 seconds. Links would be settings that do not exist."""
    replicas = OPTIONS["Lightwell"]
    for template in PODS:
        pod = template["spec"]
        assert pod["enableServiceLinks"] is False
        environment = {variable["name"]: variable.get("value") for variable in pod["containers"][0]["env"]}
        drain = float(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert pod["terminationGracePeriodSeconds"] > drain > replicas["graceful_shutdown_timeout_s"]
    assert WORKERS["maxReplicas"] >= replicas["autoscaling_config"]["max_replicas"]
    cpus = float(WORKERS["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert cpus > replicas["ray_actor_options"]["num_cpus"]


def test_only_the_port_of_serve_is_open() -> None:
    policy = read("network-policy.yaml")
    validate(policy, "1.32", strict=True)
    labels = policy["spec"]["podSelector"]["matchLabels"]
    assert all(labels.items() <= template["metadata"]["labels"].items() for template in PODS)
    everybody, pods, operator = policy["spec"]["ingress"]
    assert everybody == {"ports": [{"port": 8000, "protocol": "TCP"}]}
    assert pods == {"from": [{"podSelector": {"matchLabels": labels}}]}
    ports = {port["name"]: port["containerPort"] for port in PODS[0]["spec"]["containers"][0]["ports"]}
    assert ports["serve"] == 8000
    assert [port["port"] for port in operator["ports"]] == [ports["dashboard"]]


def test_the_image_has_the_version_of_ray_that_the_service_names() -> None:
    assert f'ARG RAY="=={CLUSTER["rayVersion"]}"' in (FOLDER / "Dockerfile").read_text(encoding="utf-8").splitlines()
