"""Engines that the API process has stopped, and the names of several models."""

import pytest

from server.parts.models.entries import check_names
from server.parts.models.supervisor import OrderedEngine
from server.settings.setting import SettingsError
from tests.server.processes.test_supervision import Supervised


def test_an_engine_that_is_stopped_before_it_is_started_again_is_gone() -> None:
    it = Supervised(OrderedEngine)
    for _ in range(2):  # another one starts at once, and the next one a second later
        it.crash()
    assert it.engine.deadline == it.clock.time + 1.0
    assert isinstance(it.engine, OrderedEngine)
    it.engine.stop(5.0)
    it.engine.advance()
    assert it.engine.is_gone
    it.clock.time += 100.0
    it.engine.advance()
    assert len(it.processes) == 2


def test_names_belong_to_one_model() -> None:
    check_names([("a", "b"), ("c",)])
    with pytest.raises(SettingsError, match="two models are named b; set served-model-name of one"):
        check_names([("a", "b"), ("b", "c")])
