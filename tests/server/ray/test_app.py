"""The application's arguments and its deployments."""

from typing import Any, cast

import pytest
import yaml
from kubernetes_validate.utils import validate
from ray.serve import Application

from server.ray.app import app, replica_settings
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


def applications(file: str) -> list[dict[str, Any]]:
    config = yaml.safe_load((FOLDER / file).read_text(encoding="utf-8"))
    config = yaml.safe_load(config["spec"]["serveConfigV2"]) if "spec" in config else config
    found: list[dict[str, Any]] = config["applications"]
    return found


def test_shipped_files_describe_this_application() -> None:
    (application,) = applications("serve.yaml")
    assert applications("rayservice.yaml") == [application]
    assert application["import_path"] == f"{app.__module__}:{app.__name__}"
    settings = replica_settings(application["args"] | {"api-key": "k"})
    options = {each["name"]: each for each in application["deployments"]}
    assert options.keys() == {"Ingress", "Lightwell"}
    assert options["Lightwell"]["graceful_shutdown_timeout_s"] > settings.drain_timeout
    assert options["Lightwell"]["autoscaling_config"]["target_ongoing_requests"] < settings.max_num_seqs


def rayservice() -> dict[str, Any]:
    spec: dict[str, Any] = yaml.safe_load((FOLDER / "rayservice.yaml").read_text(encoding="utf-8"))["spec"]
    return spec


def pod_templates() -> list[dict[str, Any]]:
    """Return the templates of the pods of the RayService: the head's, and the workers'."""
    cluster = rayservice()["rayClusterConfig"]
    head, worker = (group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]))
    return [head, worker]


def test_the_pods_outlive_the_requests_of_their_replicas() -> None:
    """Ray's own limit on the time for requests to end is 30 seconds. Links would be settings that do not exist."""
    (replicas,) = [d for d in applications("rayservice.yaml")[0]["deployments"] if d["name"] == "Lightwell"]
    for template in pod_templates():
        pod = template["spec"]
        assert pod["enableServiceLinks"] is False
        environment = {variable["name"]: variable.get("value") for variable in pod["containers"][0]["env"]}
        drain = float(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert pod["terminationGracePeriodSeconds"] > drain > replicas["graceful_shutdown_timeout_s"]
    (workers,) = rayservice()["rayClusterConfig"]["workerGroupSpecs"]
    assert workers["maxReplicas"] >= replicas["autoscaling_config"]["max_replicas"]
    cpus = float(workers["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert cpus > replicas["ray_actor_options"]["num_cpus"]


def test_only_the_port_of_serve_is_open() -> None:
    policy = yaml.safe_load((FOLDER / "network-policy.yaml").read_text(encoding="utf-8"))
    validate(policy, "1.32", strict=True)
    labels = policy["spec"]["podSelector"]["matchLabels"]
    assert all(labels.items() <= template["metadata"]["labels"].items() for template in pod_templates())
    everybody, pods, operator = policy["spec"]["ingress"]
    assert everybody == {"ports": [{"port": 8000, "protocol": "TCP"}]}
    assert pods == {"from": [{"podSelector": {"matchLabels": labels}}]}
    (head, _) = pod_templates()
    ports = {port["name"]: port["containerPort"] for port in head["spec"]["containers"][0]["ports"]}
    assert ports["serve"] == 8000
    assert [port["port"] for port in operator["ports"]] == [ports["dashboard"]]


def test_the_image_has_the_version_of_ray_that_the_service_names() -> None:
    version = rayservice()["rayClusterConfig"]["rayVersion"]
    assert f'ARG RAY="=={version}"' in (FOLDER / "Dockerfile").read_text(encoding="utf-8").splitlines()
