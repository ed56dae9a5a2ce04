"""The examples in the README."""

from tests.support.documents import blocks
from tests.support.server_process import ServerProcess


def readme_example(language: str, part: str, server: ServerProcess) -> str:
    """Return the one code block of `language` that contains `part`, with the port of `server`."""
    texts = [block.text for block in blocks("README.md") if block.language == language]
    (text,) = (text for text in texts if part in text)
    assert ":8000" in text
    return text.replace(":8000", f":{server.port}")
