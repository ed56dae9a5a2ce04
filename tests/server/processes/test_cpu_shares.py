"""Tests of how the CPUs are divided among engines."""

import os
from pathlib import Path

import pytest

from engine.shared import cpus
from server.processes.cpu_shares import cpu_shares
from tests.support.cpu_topology import write_topology


@pytest.mark.parametrize(
    ("num_engines", "shares"),
    [
        (1, [[]]),
        (2, [[0, 4, 1, 5], [2, 6, 3, 7]]),
        (9, [[0], [4], [1], [5], [2], [6], [3], [7], [0]]),
    ],
)
def test_each_engine_has_a_share(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, num_engines: int, shares: list[list[int]]
) -> None:
    write_topology(tmp_path)
    monkeypatch.setattr(cpus, "NODES", tmp_path)
    monkeypatch.setattr(cpus, "TOPOLOGY", f"{tmp_path}/cpu{{}}/{{}}")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    assert [list(share) for share in cpu_shares(num_engines)] == shares
