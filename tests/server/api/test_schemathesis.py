"""Schemathesis sends requests that match the OpenAPI document and requests that do not.

Every answer must match the document, none may be a server error, and requests that do not match must be rejected.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.conftest import StartServer

SEED = 2
MAX_EXAMPLES = 100  # per operation
# Requests that match may still be rejected: the document has neither dependencies between fields nor model names.
UNKNOWN = "positive_data_acceptance"


@pytest.mark.long
@pytest.mark.drawn
def test_answers_match_the_document(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(record_requests=100)
    command = [str(Path(sys.executable).parent / "schemathesis"), "run", f"{server.url}/openapi.json", f"--seed={SEED}"]
    command += [f"--max-examples={MAX_EXAMPLES}", "--phases=examples,fuzzing", "--mode=all", "--no-shrink"]
    # Generating data is slow on a machine under load, which says nothing about the server.
    command += [
        "--suppress-health-check=too_slow",
        "--continue-on-failure",
        f"--exclude-checks={UNKNOWN}",
        "--exclude-path=/lightwell/v1/events",  # a stream without an end
        "--generation-database=none",
        "--no-color",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[:8000] + done.stderr
    assert f"Seed: {SEED}" in done.stdout
