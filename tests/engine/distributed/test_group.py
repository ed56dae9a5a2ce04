"""The processes of a group: how they find each other, and how their end is noticed."""

import os
import queue
import select
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from engine.config import EngineConfig, EngineProcessConfig
from engine.distributed.group import Command, Leader
from tests.support.tiny_models import save_random_model

SHAPE: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
SECONDS = 60  # bounds hangs only


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=1, vocab_size=64))
    return save_random_model(model, tmp_path_factory.mktemp("model"), seed=1)


@contextmanager
def started(path: Path, deaths: queue.Queue[str]) -> Iterator[Leader]:
    config = EngineConfig(model_path=str(path), tensor_parallel_size=2)
    group = Leader(EngineProcessConfig(address="", config=config), deaths.put)
    try:
        yield group
    finally:
        group.close()


def rank_process() -> psutil.Process:
    (process,) = (child for child in psutil.Process().children() if "engine.rank" in child.cmdline())
    return process


def lose_rank() -> None:
    """Do what a collective does when another rank is killed."""
    rank_process().kill()
    raise RuntimeError("Connection reset by peer")


def test_the_end_of_a_rank_is_reported(folder: Path) -> None:
    deaths: queue.Queue[str] = queue.Queue()
    with started(folder, deaths):
        rank_process().kill()
        assert deaths.get(timeout=SECONDS) == "rank 1 of 2 was killed by SIGKILL"


def test_a_connection_that_breaks_is_no_failure_of_rank_0(folder: Path) -> None:
    """The collective that fails in rank 0 knows less than the end of the other rank tells."""
    deaths: queue.Queue[str] = queue.Queue()
    with started(folder, deaths) as group:
        with pytest.raises(RuntimeError), group.everywhere(Command.FORWARD):
            lose_rank()
        assert deaths.get(timeout=SECONDS) == "rank 1 of 2 was killed by SIGKILL"
        assert deaths.empty()
        with pytest.raises(OSError), group.everywhere(Command.FORWARD):
            pass
        assert deaths.empty()


def test_a_rank_that_ends_while_the_model_is_loaded(tmp_path: Path) -> None:
    """What is wrong with the model or the settings is for rank 0 to report."""
    deaths: queue.Queue[str] = queue.Queue()
    with started(tmp_path, deaths) as group, group.loading():
        with suppress(psutil.ZombieProcess):  # it may have ended already
            assert select.select([os.pidfd_open(rank_process().pid)], [], [], SECONDS)[0]
        with pytest.raises(queue.Empty):
            deaths.get(timeout=1)
    assert deaths.empty()


def test_a_rank_that_cannot_load_its_part(tmp_path: Path) -> None:
    deaths: queue.Queue[str] = queue.Queue()
    with started(tmp_path, deaths):
        assert deaths.get(timeout=SECONDS) == "rank 1 of 2 exited with code 1"


def test_the_end_of_the_group_is_no_death(folder: Path) -> None:
    deaths: queue.Queue[str] = queue.Queue()
    with started(folder, deaths) as group:
        rank = rank_process()
        assert group.memory.integers((2,)).tolist() == [0, 0]
    assert not rank.is_running()
    assert deaths.empty()
