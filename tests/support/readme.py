"""The examples in the README."""

import re

from tests.support.paths import ROOT
from tests.support.server_process import ServerProcess

README = ROOT / "README.md"


def readme_example(language: str, start: str, server: ServerProcess) -> str:
    """The one code block of `language` that begins with `start`, with the port of `server`."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (block,) = (block for block in blocks if block.startswith(start))
    assert ":8000" in block
    return str(block).replace(":8000", f":{server.port}")
