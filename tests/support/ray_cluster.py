"""A Ray cluster of one node on free ports, with the application of `server.parts.ray` as `serve deploy` starts it."""

import copy
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from tests.support.paths import ROOT
from tests.support.server_process import MODEL, READY_SECONDS, free_port
from tests.support.serving import wait_until

SCRIPTS = Path(sys.executable).parent
KEY = "sk-ray"
APPLICATION = "lightwell"
DEPLOY_ATTEMPTS = 3  # a cluster that has just started on a busy machine may not answer in time

Options = dict[str, Any]


class RayCluster:
    """The processes of a cluster. The application listens on `url` once it is deployed."""

    def __init__(self, folder: Path, num_cpus: int) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self._dashboard = f"http://127.0.0.1:{free_port()}"
        self._folder = folder
        self.log = folder / "log"
        ports = ["port", "ray-client-server-port", "dashboard-agent-listen-port"]
        flags = [f"--{name}={free_port()}" for name in ports]
        flags += [f"--dashboard-port={self._dashboard.rsplit(':', 1)[1]}", f"--num-cpus={num_cpus}"]
        flags += ["--object-store-memory=100000000", "--disable-usage-stats", f"--temp-dir={folder / 'ray'}"]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [SCRIPTS / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_enable_worker_prestart": "0", "TMPDIR": str(folder)},
            )

    def deploy(self, model: Path, replicas: Options, **settings: object) -> None:
        """Deploy `deploy/ray/serve.yaml` with other settings, and other options of the replicas. Wait until it runs."""
        config = yaml.safe_load((ROOT / "deploy/ray/serve.yaml").read_text(encoding="utf-8"))
        config["http_options"] = {"host": "127.0.0.1", "port": int(self.url.rsplit(":", 1)[1])}
        (application,) = config["applications"]
        small = {"max-model-len": 1024, "kv-cache-memory": "64MiB", "api-key": KEY}
        application["args"] = {"model": str(model), "served-model-name": MODEL, **small, **settings}
        (own, ingress) = copy.deepcopy(application["deployments"])
        del own["autoscaling_config"]
        application["deployments"] = [
            own | {"ray_actor_options": {"num_cpus": 1}, "health_check_period_s": 1} | replicas,
            ingress | {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0.1}},
        ]
        path = self._folder / "serve.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        command = [str(SCRIPTS / "serve"), "deploy", "--address", self._dashboard, str(path)]
        for _ in range(DEPLOY_ATTEMPTS):
            result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=READY_SECONDS)
            if result.returncode == 0:
                break
        assert result.returncode == 0, result.stdout + result.stderr
        wait_until(lambda: self.status() in ("RUNNING", "DEPLOY_FAILED"), READY_SECONDS)
        assert self.status() == "RUNNING", self.application()["message"]

    def application(self) -> Options:
        """Return what Serve's REST API says of the application."""
        answer = httpx.get(f"{self._dashboard}/api/serve/applications/", timeout=60, trust_env=False)
        details: Options = answer.raise_for_status().json()["applications"].get(APPLICATION, {})
        return details

    def status(self) -> str:
        return str(self.application().get("status"))

    def replicas(self) -> dict[str, int]:
        """Return the process ids of the running replicas, by their ids."""
        found = self.application()["deployments"]["Lightwell"]["replicas"]
        return {replica["replica_id"]: replica["pid"] for replica in found if replica["state"] == "RUNNING"}

    def is_up(self) -> bool:
        assert self._process.poll() is None, self.log.read_text(encoding="utf-8")
        try:
            return httpx.get(f"{self._dashboard}/api/serve/applications/", timeout=60, trust_env=False).is_success
        except httpx.TransportError:
            return False

    def close(self) -> None:
        """Kill all processes. Those of the servers end with their replicas."""
        main = psutil.Process(self._process.pid)
        family = [main, *main.children(recursive=True)]
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        psutil.wait_procs(family, READY_SECONDS)


@contextmanager
def ray_cluster(num_cpus: int = 8) -> Iterator[RayCluster]:
    """Run a cluster. Its folder has a short path, since socket paths are limited."""
    folder = Path(tempfile.mkdtemp(prefix="lw-"))
    cluster = RayCluster(folder, num_cpus)
    try:
        wait_until(cluster.is_up, READY_SECONDS)
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(folder, ignore_errors=True)
