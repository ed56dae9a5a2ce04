"""Every target runs its seeds, and all inputs that were once found to break it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz import targets
from tests.fuzz.targets import TARGETS
from tests.support.paths import ROOT

CASES = ROOT / "tests/fuzz/cases"
FOUND = sorted(path for path in CASES.glob("*/*") if path.is_file())


@pytest.fixture(scope="module", autouse=True)
def resources() -> Iterator[None]:
    yield
    targets.close()


@pytest.mark.checklist("A01", "B10", "C24", "F01")
@pytest.mark.parametrize("name", TARGETS)
def test_seeds(name: str) -> None:
    for seed in TARGETS[name].seeds():
        TARGETS[name].run(seed)


@pytest.mark.parametrize("path", FOUND, ids=lambda path: f"{path.parent.name}-{path.name[-12:]}")
def test_found(path: Path) -> None:
    TARGETS[path.parent.name].run(path.read_bytes())
