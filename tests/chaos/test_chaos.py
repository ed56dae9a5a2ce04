"""Two minutes of a mixed load, with hostile clients and processes that die. `make soak` goes on for an hour."""

import random
from pathlib import Path

import pytest

from tests.chaos.run import run


@pytest.mark.long
@pytest.mark.checklist("E08", "E09", "E13", "F05", "F06")
def test_two_minutes_of_chaos(smollm2_path: Path, tmp_path: Path) -> None:
    seed = random.randrange(1_000_000)
    print(f"seed {seed}")
    report = run(smollm2_path, tmp_path / "report.md", num_rounds=4, round_seconds=30, seed=seed)
    assert report.problems == [], report.text()
