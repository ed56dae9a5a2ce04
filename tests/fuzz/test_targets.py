"""Every target runs its seeds, and all inputs that were once found to break it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import seeds, targets
from tests.fuzz.targets import TARGETS
from tests.support.examples import num_examples
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


KEYS = f"keys: {seeds.DIGEST}"
YAML_PARTS = st.sampled_from(["a: ", "b", *"{}[]\n", "  ", "- ", "&x ", "*x", "!!int ", "<<: ", KEYS, "weight: 1"])


@settings(max_examples=num_examples(40, 1000), deadline=None)
@given(st.binary(max_size=200) | st.lists(YAML_PARTS, max_size=20).map("".join).map(str.encode))
def test_any_keys_file(data: bytes) -> None:
    targets.keys_file(data)
