"""A model in several processes behind a real server: what works there, and what happens when one dies or hangs."""

import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from engine.config import load_model_config
from tests.e2e.conftest import StartServer
from tests.e2e.test_restart import answer, engine_of, wait_for_restart
from tests.support.lora_adapters import save_random_adapter
from tests.support.server_process import COMPLETIONS, ServerProcess, starting_server
from tests.support.serving import wait_until
from tests.support.streams import start_streams

NUM_RANKS = 3  # of which SmolLM2's 9 heads and 3 KV heads have equal parts
RANKS = f"--tensor-parallel-size={NUM_RANKS}"
BODY = {"prompt": "Once upon a time", "max_tokens": 24, "temperature": 1.0, "seed": 7, "logprobs": 2}
LONG = "The quick brown fox jumps over the lazy dog. " * 40


def ranks_of(server: ServerProcess) -> list[psutil.Process]:
    """Return the processes of the ranks other than 0."""
    return [child for child in engine_of(server).children() if "engine.rank" in child.cmdline()]


@pytest.fixture
def adapter(smollm2_path: Path, tmp_path: Path) -> Path:
    save_random_adapter(tmp_path / "poet", load_model_config(smollm2_path), 1, ranks={"": 8}, strength=1.0)
    return tmp_path / "poet"


def test_what_one_process_can_do(start_server: StartServer, adapter: Path) -> None:
    """LoRA adapters from start and later, cached prefixes, drafts and grammars; alone and all together."""
    loading = ("--max-loras=2", "--allow-runtime-lora-updating", f"--lora-modules=poet={adapter}")
    server = start_server(RANKS, *loading, "--speculative=ngram")
    assert len(ranks_of(server)) == NUM_RANKS - 1
    loaded = server.http.post("/v1/load_lora_adapter", json={"lora_name": "later", "lora_path": str(adapter)})
    assert loaded.status_code == 200, loaded.text
    plain = BODY | {"prompt": LONG}
    bodies = [
        plain,
        plain | {"model": "poet"},
        plain | {"model": "later"},
        BODY | {"structured_outputs": {"regex": "[a-z ]{8,12}"}},
        BODY | {"n": 3, "echo": True},
    ]
    alone = [answer(server, COMPLETIONS, body) for body in bodies]
    assert alone[1]["choices"] == alone[2]["choices"]
    assert alone[1]["choices"] != alone[0]["choices"]
    assert re.fullmatch("[a-z ]{8,12}", alone[3]["choices"][0]["text"])
    streams = start_streams(server, 4, max_tokens=200)
    assert [answer(server, COMPLETIONS, body) for body in bodies] == alone
    assert all(stream.result().error is None for stream in streams)
    assert server.metric("lightwell_prefix_cache_hits_total") > 0
    assert server.metric("lightwell_spec_decode_num_accepted_tokens_total") > 0
    fingerprint = server.answer(COMPLETIONS, BODY)["system_fingerprint"]
    assert f"-tp{NUM_RANKS}-" in fingerprint


@pytest.mark.checklist("F05")
def test_a_rank_dies_or_hangs(start_server: StartServer) -> None:
    """The streams end with an error, the log names the rank, and the engine starts again with all ranks."""
    server = start_server(RANKS, "--step-timeout=10", "--max-num-seqs=4")
    expected = answer(server, COMPLETIONS, BODY)
    for number, signum in enumerate((signal.SIGKILL, signal.SIGSTOP), start=1):
        streams = start_streams(server, 4, max_tokens=900)
        first, second = ranks = ranks_of(server)
        engine = engine_of(server)
        second.send_signal(signum)
        for stream in streams:
            assert stream.result().error is not None
            assert stream.error is not None
            assert stream.error["code"] == "engine_unavailable"
            assert stream.is_done
        wait_for_restart(server, number)
        psutil.wait_procs([engine, *ranks], timeout=10)
        assert not any(process.is_running() for process in (engine, first, second))
        assert answer(server, COMPLETIONS, BODY) == expected
    assert "rank 2 of 3 was killed by SIGKILL" in server.log


def test_no_rank_outlives_the_server(start_server: StartServer) -> None:
    server = start_server(RANKS)
    ranks = ranks_of(server)
    server.signal(signal.SIGTERM)
    assert server.wait(10) == 0, server.end_of_log()
    psutil.wait_procs(ranks, timeout=10)
    assert not any(rank.is_running() for rank in ranks)
    assert "cannot go on" not in server.log


def test_idle_ranks_use_no_processor(start_server: StartServer) -> None:
    server = start_server(RANKS)
    server.complete(max_tokens=4)
    wait_until(lambda: server.is_idle, 30)
    time.sleep(0.5)

    def used() -> float:
        return sum(sum(rank.cpu_times()[:2]) for rank in ranks_of(server))

    before = used()
    time.sleep(2)
    assert used() - before < 0.1


@pytest.fixture
def refused(smollm2_path: Path) -> Iterator[ServerProcess]:
    with starting_server(smollm2_path, "--tensor-parallel-size=2") as server:
        yield server


def test_a_number_of_ranks_that_does_not_divide_the_heads(refused: ServerProcess) -> None:
    assert refused.wait(60) == 1
    assert "--tensor-parallel-size 2: the model has layers of 9 attention heads and 3 KV heads" in refused.log
    assert "divide among 3 or 9 ranks only" in refused.log
