"""The manifests of deploy/kubernetes as kustomize builds them: schemas, settings, times, rights, names of metrics."""

import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_validate.utils import validate
from prometheus_client import generate_latest

from server.engine_client.liveness import MISSED_HEARTBEATS
from server.processes.child_process import KILL_SECONDS
from server.processes.supervisor_channel import HEARTBEAT_SECONDS
from server.settings.load import load_settings
from server.settings.table import SETTINGS, Settings
from server.supervisor import DRAIN_GRACE_SECONDS, STOP_SECONDS
from tests.deploy.test_deploy import DEPLOY, IMAGE, exposed_labels, exposed_metrics, load_yaml, pairs, problems_of
from tests.server.test_metrics import PICKER_METRICS
from tests.support.documents import blocks, text_of
from tests.support.paths import ROOT

FOLDER = DEPLOY / "kubernetes"
DOCUMENT = "docs/kubernetes.md"
KUBERNETES_VERSIONS = ("1.32", "1.37")
BUILT_IN_GROUPS = {"", "apps", "policy", "networking.k8s.io", "rbac.authorization.k8s.io"}
SECRET = "lightwell-keys"
PICKER = "lightwell-endpoint-picker"

Manifest = Any

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        shutil.which("kustomize") is None, reason="needs kustomize: on Debian, install the package kustomize"
    ),
]
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool: on Debian, install the package prometheus"
)


@cache
def build(folder: Path) -> list[Manifest]:
    """Return what `kustomize build` makes of a folder. A warning is an error."""
    done = subprocess.run(["kustomize", "build", str(folder)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    """Return what the example of docs/kubernetes.md makes, which has all components and a repository beside it."""
    (text,) = [block.text for block in blocks(DOCUMENT) if "kind: Kustomization" in block.text]
    assert set(re.findall(r"components/([\w-]+)", text)) == {path.name for path in (FOLDER / "components").iterdir()}
    folder = tmp_path_factory.mktemp("example")
    (folder / "lightwell").symlink_to(ROOT)
    (folder / "kustomization.yaml").write_text(text, encoding="utf-8")
    return build(folder)


@pytest.fixture(scope="module", params=["cpu", "gpu", "example"])
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    name = request.param
    return request.getfixturevalue(name) if name == "example" else build(FOLDER / "overlays" / name)


def find(manifests: list[Manifest], kind: str, name: str = "lightwell") -> Manifest:
    """Return the manifest of this kind and name. kustomize appends a hash to names of ConfigMaps."""
    name_and_hash = re.compile(rf"{name}(-\w{{10}})?")
    of_kind = (each for each in manifests if each["kind"] == kind)
    (found,) = (each for each in of_kind if name_and_hash.fullmatch(each["metadata"]["name"]))
    return found


def pod_of(manifests: list[Manifest], name: str = "lightwell") -> Manifest:
    """Return the spec of the pods of a Deployment."""
    return find(manifests, "Deployment", name)["spec"]["template"]["spec"]


def container_of(manifests: list[Manifest], name: str = "lightwell") -> Manifest:
    (container,) = pod_of(manifests, name)["containers"]
    return container


def settings_of(manifests: list[Manifest]) -> Settings:
    """Return the settings of the server in a pod: those of the image, the ConfigMap and the documented Secret."""
    image = {name: pairs("ENV")[name] for name in ("LIGHTWELL_CACHE", "LIGHTWELL_HOST", "LIGHTWELL_PORT")}
    keys = dict(re.findall(r"--from-literal=(\w+)=(\S+)", text_of(DOCUMENT)))
    variables: dict[str, str] = find(manifests, "ConfigMap")["data"]
    return load_settings(environ=image | keys | variables)


# Schemas


def test_built_in_kinds_match_their_schemas(manifests: list[Manifest]) -> None:
    assert find(manifests, "Namespace")["metadata"]["name"] == "lightwell"
    assert {each["metadata"].get("namespace") for each in manifests if each["kind"] != "Namespace"} == {"lightwell"}
    built_in = [each for each in manifests if each["apiVersion"].rpartition("/")[0] in BUILT_IN_GROUPS]
    kinds = "ConfigMap Deployment Namespace NetworkPolicy PersistentVolumeClaim PodDisruptionBudget Service"
    assert {each["kind"] for each in built_in} >= set(kinds.split())
    for each in built_in:
        for version in KUBERNETES_VERSIONS:
            validate(each, version, strict=True)


def test_custom_resources_match_their_schemas(example: list[Manifest]) -> None:
    """The pool of the inference extension is missing: no package has its schema."""
    kinds = ["HTTPRoute", "PrometheusRule", "ScaledObject", "ServiceMonitor"]
    custom = [find(example, kind) for kind in kinds]
    assert invalid_custom_resources(custom) == []
    broken = [each | {"spec": "none"} for each in custom]
    assert [line.split(":")[0] for line in invalid_custom_resources(broken)] == kinds


def invalid_custom_resources(manifests: list[Manifest]) -> list[str]:
    """Return a line for each manifest that its schema does not allow. Unknown fields are not found."""
    assert shutil.which("node"), "this test needs node and npm (on Debian and Ubuntu: the package npm)"
    assert (ROOT / "tests/deploy/node_modules").exists(), "`make test-long` installs the schemas from npm"
    command = ["node", "tests/deploy/validate_custom.mjs"]
    done = subprocess.run(command, cwd=ROOT, input=json.dumps(manifests), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


# The pod, compared with the image and the server


def test_the_environment_has_settings_only(manifests: list[Manifest]) -> None:
    container, data = container_of(manifests), find(manifests, "ConfigMap")["data"]
    name = find(manifests, "ConfigMap")["metadata"]["name"]
    assert container["envFrom"] == [{"configMapRef": {"name": name}}, {"secretRef": {"name": SECRET}}]
    assert {variable for variable in data if not variable.startswith("LIGHTWELL_")} == {"XDG_RUNTIME_DIR"}
    assert settings_of(manifests).log_format == "json"
    assert pod_of(manifests)["enableServiceLinks"] is False  # Kubernetes itself would set LIGHTWELL_PORT


def test_the_pod_is_that_of_the_image(manifests: list[Manifest]) -> None:
    container = container_of(manifests)
    context = pod_of(manifests)["securityContext"]
    assert f"{context['runAsUser']}:{context['runAsGroup']}" == IMAGE["USER"]
    assert context["fsGroup"] == context["runAsGroup"]
    assert [port["containerPort"] for port in container["ports"]] == [settings_of(manifests).port]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"cache": IMAGE["VOLUME"], "tmp": "/tmp", "shared-memory": "/dev/shm"}
    assert find(manifests, "ConfigMap")["data"]["XDG_RUNTIME_DIR"] == mounts["tmp"]
    volumes = {volume["name"]: volume for volume in pod_of(manifests)["volumes"]}
    assert volumes["cache"]["persistentVolumeClaim"]["claimName"] == "lightwell-cache"
    assert find(manifests, "PersistentVolumeClaim", "lightwell-cache")
    assert volumes["shared-memory"]["emptyDir"]["medium"] == "Memory"
    assert "sizeLimit" in volumes["tmp"]["emptyDir"]


@pytest.mark.checklist("G06")
def test_pods_are_confined(manifests: list[Manifest]) -> None:
    labels = find(manifests, "Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    for deployment in [each for each in manifests if each["kind"] == "Deployment"]:
        pod = deployment["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
    assert pod_of(manifests)["automountServiceAccountToken"] is False


def test_probes_and_times(manifests: list[Manifest]) -> None:
    """Only the liveness probe goes on while the engine is restarted; it is slower than the server's own watchdogs.

    Pods get the time that they need to stop.
    """
    container, settings = container_of(manifests), settings_of(manifests)
    startup, ready, alive = (container[f"{name}Probe"] for name in ("startup", "readiness", "liveness"))
    assert [probe["httpGet"]["path"] for probe in (startup, ready, alive)] == ["/readyz", "/readyz", "/healthz"]
    assert {probe["httpGet"]["port"] for probe in (startup, ready, alive)} == {container["ports"][0]["name"]}
    limit = settings.step_timeout + MISSED_HEARTBEATS * HEARTBEAT_SECONDS
    assert alive["periodSeconds"] * (alive["failureThreshold"] - 1) > limit
    startup_seconds = startup["periodSeconds"] * startup["failureThreshold"]
    assert startup_seconds == 60 * int(re.findall(r"allows (\d+) minutes", text_of(DOCUMENT))[0])
    assert find(manifests, "Deployment")["spec"]["progressDeadlineSeconds"] > startup_seconds
    before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert before >= ready["periodSeconds"]
    exits = DRAIN_GRACE_SECONDS + STOP_SECONDS + 2 * KILL_SECONDS
    assert pod_of(manifests)["terminationGracePeriodSeconds"] >= before + settings.drain_timeout + exits


def test_resources_of_the_overlays() -> None:
    cpu, gpu = (build(FOLDER / "overlays" / name) for name in ("cpu", "gpu"))
    resources = container_of(cpu)["resources"]
    for name in ("cpu", "memory"):
        assert resources["requests"][name] == resources["limits"][name], "for exclusive cores"
    assert resources["limits"]["cpu"].isdigit()
    (threads,) = container_of(cpu)["env"]
    assert threads == {"name": "OMP_NUM_THREADS", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}}
    assert settings_of(cpu).device == "cpu"
    assert container_of(gpu)["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert settings_of(gpu).device == "cuda"


def test_everything_selects_the_pods(manifests: list[Manifest]) -> None:
    deployment = find(manifests, "Deployment")["spec"]
    labels, pod = deployment["template"]["metadata"]["labels"], deployment["template"]["spec"]
    selectors = [
        deployment["selector"]["matchLabels"],
        find(manifests, "Service")["spec"]["selector"],
        find(manifests, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        find(manifests, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        *(each["labelSelector"]["matchLabels"] for each in pod["topologySpreadConstraints"]),
    ]
    if any(each["kind"] == "InferencePool" for each in manifests):
        selectors.append(find(manifests, "InferencePool")["spec"]["selector"]["matchLabels"])
        monitor = find(manifests, "ServiceMonitor")["spec"]["selector"]["matchLabels"]
        services = [each for each in manifests if each["kind"] == "Service"]
        assert [each for each in services if monitor.items() <= each["metadata"].get("labels", {}).items()] == [
            find(manifests, "Service")
        ]
    assert all(selector.items() <= labels.items() for selector in selectors)
    (port,) = find(manifests, "Service")["spec"]["ports"]
    assert (port["port"], port["targetPort"]) == (8000, "http")


# Components


def test_the_image_the_settings_and_the_admin_key(example: list[Manifest]) -> None:
    assert container_of(example)["image"] == "registry.example.org/lightwell:0.1.0"
    settings = settings_of(example)
    assert (settings.model, settings.max_model_len, settings.public_metrics) == ("qwen3:4b", 8192, True)
    (endpoint,) = find(example, "ServiceMonitor")["spec"]["endpoints"]
    assert endpoint["authorization"] == {"credentials": {"name": SECRET, "key": SETTINGS["admin_key"].variable}}
    assert endpoint["port"] == find(example, "Service")["spec"]["ports"][0]["name"]
    assert f"kubectl create secret generic {SECRET} " in text_of(DOCUMENT)
    assert settings.admin_key


def test_autoscaling(example: list[Manifest]) -> None:
    """It reads what the server exposes, and alone sets the number of replicas."""
    exposed = exposed_labels(settings_of(example).metrics_prefix)
    for labels in exposed.values():
        labels.add("namespace")  # which the operator adds
    queries = [trigger["metadata"]["query"] for trigger in find(example, "ScaledObject")["spec"]["triggers"]]
    assert len(queries) == 2
    assert [problems for query in queries if (problems := problems_of(query, exposed))] == []
    service = find(example, "Service")["metadata"]
    for query in queries:
        assert f'{{namespace="{service["namespace"]}", job="{service["name"]}"}}' in query
    scaled = find(example, "ScaledObject")["spec"]
    assert scaled["scaleTargetRef"] == {"name": find(example, "Deployment")["metadata"]["name"]}
    assert "replicas" not in find(example, "Deployment")["spec"]
    threshold = next(each for each in scaled["triggers"] if each["name"] == "running")["metadata"]["threshold"]
    assert 2 * int(threshold) == settings_of(example).max_num_seqs
    assert all(trigger["metadata"]["ignoreNullValues"] == "false" for trigger in scaled["triggers"])


def test_the_pool_has_its_picker(example: list[Manifest]) -> None:
    pool = find(example, "InferencePool")["spec"]
    assert pool["targetPorts"] == [{"number": settings_of(example).port}]
    service = find(example, "Service", pool["endpointPickerRef"]["name"])["spec"]
    (port,) = service["ports"]
    assert port["port"] == pool["endpointPickerRef"]["port"]["number"]
    picker = find(example, "Deployment", PICKER)["spec"]["template"]
    assert service["selector"].items() <= picker["metadata"]["labels"].items()
    arguments = dict(argument.split("=") for argument in container_of(example, PICKER)["args"])
    assert arguments["--pool-name"] == find(example, "InferencePool")["metadata"]["name"]
    (volume,) = picker["spec"]["volumes"]
    configuration = find(example, "ConfigMap", PICKER)
    assert volume["configMap"]["name"] == configuration["metadata"]["name"]
    assert Path(arguments["--config-file"]).name in configuration["data"]
    (rule,) = find(example, "HTTPRoute")["spec"]["rules"]
    assert rule["backendRefs"][0]["name"] == arguments["--pool-name"]


def test_the_picker_reads_what_the_server_exposes(example: list[Manifest]) -> None:
    """Its keys and names are those of llm-d's plugins. `tests/server/test_metrics.py` has the metrics themselves."""
    (text,) = find(example, "ConfigMap", PICKER)["data"].values()
    configuration = yaml.safe_load(text)
    plugins = {plugin["type"]: plugin.get("parameters", {}) for plugin in configuration["plugins"]}
    extractor = plugins["core-metrics-extractor"]
    (engine,) = extractor["engineConfigs"]
    prefix = settings_of(example).metrics_prefix
    specs = {setting: prefix + name for setting, (name, _) in PICKER_METRICS.items()}
    assert engine == {"name": extractor["defaultEngine"]} | specs
    assert settings_of(example).public_metrics
    (profile,) = configuration["schedulingProfiles"]
    assert {plugin["pluginRef"] for plugin in profile["plugins"]} < plugins.keys()
    documented = set(re.findall(r"`vllm:(\w+)`", text_of(DOCUMENT)))
    assert documented == {name for name, _ in PICKER_METRICS.values()}


@needs_promtool
def test_prometheus_parses_the_metrics() -> None:
    """promtool has the parser of the picker. It exits with 1 if that fails, with 3 if it would use another name."""
    for prefix in ("lightwell_", "vllm:"):
        page = generate_latest(exposed_metrics(prefix).registry)
        checked = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, check=False)
        assert checked.returncode in (0, 3), checked.stderr
        assert b"error" not in checked.stderr


def test_the_picker_may_read_the_pool_and_its_pods(example: list[Manifest]) -> None:
    binding = find(example, "RoleBinding", PICKER)
    assert binding["roleRef"]["name"] == find(example, "Role", PICKER)["metadata"]["name"]
    (subject,) = binding["subjects"]
    account = find(example, "ServiceAccount", PICKER)["metadata"]
    assert (subject["name"], subject["namespace"]) == (account["name"], account["namespace"])
    assert pod_of(example, PICKER)["serviceAccountName"] == account["name"]


# Alerts


@needs_promtool
def test_alerts_fire_when_they_should(example: list[Manifest], tmp_path: Path) -> None:
    spec = find(example, "PrometheusRule")["spec"]
    assert spec == load_yaml(DEPLOY / "prometheus/alerts.yml")
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(spec), encoding="utf-8")
    assert "7 rules found" in promtool("check", "rules", "--lint=all", "--lint-fatal", str(tmp_path / "rules.yml"))
    cases = ROOT / "tests/deploy/alert_cases.yml"
    assert "SUCCESS" in promtool("test", "rules", str(cases))
    rules = [rule for group in load_yaml(DEPLOY / "prometheus/alerts.yml")["groups"] for rule in group["rules"]]
    tested = [test for case in load_yaml(cases)["tests"] for test in case["alert_rule_test"]]
    for kind in ("fires", "silent"):
        found = {test["alertname"] for test in tested if bool(test["exp_alerts"]) == (kind == "fires")}
        assert found == {rule["alert"] for rule in rules}, kind


def promtool(*arguments: str) -> str:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
