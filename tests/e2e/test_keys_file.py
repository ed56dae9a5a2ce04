"""`lightwell serve --api-keys-file`: real processes read the file again on SIGHUP."""

import hashlib
import signal
from pathlib import Path

from tests.e2e.conftest import StartServer
from tests.support.serving import wait_until


def write(file: Path, key: str) -> None:
    file.write_text(f"alice: {{keys: {hashlib.sha256(key.encode()).hexdigest()}}}")


def test_a_hangup_changes_the_keys(start_server: StartServer, tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    write(file, "first")
    server = start_server(f"--api-keys-file={file}")

    def status(key: str) -> int:
        return server.http.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code

    assert (status("first"), status("second")) == (200, 401)
    write(file, "second")
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: (status("first"), status("second")) == (401, 200))
    file.write_text("alice: {keys: canary}")
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "the keys stay as they were" in server.log)
    assert status("second") == 200
    assert "canary" not in server.log
    assert server.process.poll() is None
