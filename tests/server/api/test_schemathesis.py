"""Schemathesis reads the OpenAPI document and sends what fits it and what does not: every answer is as described there,
none is a server error, and what does not fit is refused."""

import subprocess
import sys
from pathlib import Path

from tests.server.conftest import StartServer

SEED = 2
MAX_EXAMPLES = 15  # of each operation
# What fits may be refused all the same: the document does not say what one field means for another, nor which models
# there are.
UNKNOWN = "positive_data_acceptance"


def test_what_the_document_says(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(enable_docs=True, record_requests=100)
    command = [str(Path(sys.executable).parent / "schemathesis"), "run", f"{server.url}/openapi.json", f"--seed={SEED}"]
    command += [f"--max-examples={MAX_EXAMPLES}", "--phases=examples,fuzzing", "--mode=all", "--no-shrink"]
    command += ["--continue-on-failure", f"--exclude-checks={UNKNOWN}", "--generation-database=none", "--no-color"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[:8000] + done.stderr
    assert f"Seed: {SEED}" in done.stdout
