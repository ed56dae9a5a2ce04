"""The page's scripts are JavaScript without a build step; TypeScript checks the types in their comments.

`types/` links to the scripts, and has declarations in place of the vendored libraries.
"""

import subprocess

import pytest

from tests.support.browser import MODULES, NO_MODULES, WEB

TSC = MODULES / "typescript/bin/tsc"


@pytest.mark.long
@pytest.mark.skipif(not TSC.exists(), reason=NO_MODULES)
def test_types() -> None:
    process = subprocess.run(
        ["node", str(TSC), "--project", str(WEB / "tsconfig.json")], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr
