"""Several engines, API processes or ranks behind one address: the division of work, and what the loss of one costs."""

import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from openai import OpenAI

from engine.config import load_model_config
from tests.e2e.conftest import StartServer
from tests.e2e.test_processes import answer, check_lost, kill_engine, wait_for_restart
from tests.support.lora_adapters import save_random_adapter
from tests.support.processes import wait_for_end_of
from tests.support.server_process import CHAT, COMPLETIONS, MODEL, ServerProcess
from tests.support.serving import wait_until
from tests.support.streams import start_streams

pytestmark = pytest.mark.long

READY = 180.0  # seconds; bounds hangs only
GONE = 60.0
NUM_RANKS = 3  # of which SmolLM2's 9 heads and 3 KV heads have equal parts
RANKS = f"--tensor-parallel-size={NUM_RANKS}"
THREE = "--api-server-count=3"


# Engines.


def states(server: ServerProcess) -> list[str]:
    """Return the state of each engine."""
    return [engine["status"] for engine in server.get("/health").json()["engines"]]


def start_two(start_server: StartServer, *flags: str) -> ServerProcess:
    server = start_server("--data-parallel-size=2", *flags)
    wait_until(lambda: states(server) == ["ok", "ok"], READY)
    return server


def by_engine(server: ServerProcess, name: str) -> list[float]:
    """Return the values of a metric of each engine."""
    return [server.metric(name, engine=number) for number in ("0", "1")]


def engines_of_requests(server: ServerProcess) -> dict[str, int]:
    """Return which engine has which request."""
    data = server.get("/lightwell/v1/requests").json()["data"]
    return {each["id"]: each["engine"] for each in data}


def test_the_turns_of_a_chat_go_to_the_same_engine(start_server: StartServer) -> None:
    """The first turns, at the same time, are spread over both. Later, no queue is too long."""
    server = start_two(start_server)
    chats: list[list[dict[str, str]]] = [[] for _ in range(4)]
    ids: list[list[str]] = [[] for _ in chats]

    def take_turn(number: int) -> None:
        text = f"This is part {len(ids[number])} of story {number}. " * 6  # about two blocks
        chats[number].append({"role": "user", "content": text})
        found = server.answer(CHAT, {"messages": chats[number], "max_completion_tokens": 4})
        ids[number].append(found["id"])
        chats[number].append(found["choices"][0]["message"])

    with ThreadPoolExecutor(len(chats)) as pool:
        list(pool.map(take_turn, range(len(chats))))
    for _ in range(3):
        for number in range(len(chats)):
            take_turn(number)
    engines = engines_of_requests(server)
    used = [{engines[request_id] for request_id in each} for each in ids]
    assert all(len(each) == 1 for each in used), used
    assert len(set().union(*used)) == 2
    hits, queries = (sum(by_engine(server, f"lightwell_prefix_cache_{name}_total")) for name in ("hits", "queries"))
    assert hits > queries / 3
    check_records(server)


def check_records(server: ServerProcess) -> None:
    """The records say which engine has computed what."""
    both = [server.get(f"/lightwell/v1/steps?engine={number}").json() for number in (0, 1)]
    assert both[0]["engine"] != both[1]["engine"]
    assert all(each["data"] for each in both)
    assert server.get("/lightwell/v1/engine?engine=1").json()["num_engines"] == 2
    assert server.get("/lightwell/v1/engine?engine=2").status_code == 400
    for request_id, number in list(engines_of_requests(server).items())[:4]:
        details = server.get(f"/lightwell/v1/requests/{request_id}").json()
        assert [choice["engine"] for choice in details["choices"]] == [number]
        inside = server.http.post("/lightwell/v1/inspect", json={"id": request_id})
        assert inside.json()["is_equal"], inside.text


def test_the_loss_of_an_engine(start_server: StartServer) -> None:
    """Its streams end with an error, and the others go on. It is started again."""
    server = start_two(start_server)
    streams = start_streams(server, 4, max_tokens=600)
    engines = engines_of_requests(server)
    lost = [stream for stream in streams if engines[stream.chunks[0]["id"]] == 1]
    kept = [stream for stream in streams if stream not in lost]
    assert lost
    assert kept
    max(server.children("engine.process"), key=lambda each: each.pid).kill()
    check_lost(lost)
    assert server.get("/health").status_code == 200
    assert server.complete(max_tokens=3).status_code == 200
    wait_until(lambda: states(server) == ["ok", "ok"], READY)
    assert all(stream.result().is_complete for stream in kept)
    assert by_engine(server, "lightwell_engine_restarts_total") == [0, 1]
    server.signal(signal.SIGTERM)
    assert server.wait(GONE) == 0, server.end_of_log()


# API processes.


def test_all_api_processes_answer(start_server: StartServer) -> None:
    """Also requests that only the coordinator can answer, and cancellations. SIGTERM ends nothing too early."""
    server = start_server(THREE)
    streams = start_streams(server, 9, max_tokens=300)
    num_connections = [
        sum(each.status == psutil.CONN_ESTABLISHED for each in process.net_connections(kind="tcp"))
        for process in server.children("server.main")
    ]
    assert len(num_connections) == 3
    assert min(num_connections) >= 1
    assert max(num_connections) < 9
    with OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        first = client.responses.create(model=MODEL, input="hi", max_output_tokens=16)
        for _ in range(3):  # by different processes
            again = client.responses.create(
                model=MODEL, input="and?", max_output_tokens=16, previous_response_id=first.id
            )
            assert client.responses.retrieve(again.id).output_text == again.output_text
    for stream in streams[:6]:
        assert server.http.post(f"/v1/requests/{stream.chunks[0]['id']}/cancel").status_code == 200
        assert stream.result().chunks[-1]["choices"][0]["finish_reason"] == "abort"
    server.signal(signal.SIGTERM)
    assert all(stream.result().is_complete for stream in streams[6:])
    assert server.wait(GONE) == 0, server.end_of_log()


def test_the_engine_and_then_an_api_process_dies(start_server: StartServer) -> None:
    """Streams end with an error in all processes, which use the next engine. The end of one of them ends the server."""
    server = start_server(THREE)
    streams = start_streams(server, 6, max_tokens=4000)
    kill_engine(server)
    check_lost(streams)
    with ThreadPoolExecutor(6) as pool:  # they wait for it
        statuses = list(pool.map(lambda _: server.complete(max_tokens=3).status_code, range(6)))
    assert statuses == [200] * 6
    max(server.children("server.main"), key=lambda each: each.pid).kill()
    assert server.wait(GONE) == 1
    assert server.end_of_log(1).endswith("the API 2 process was killed by SIGKILL")


# Ranks.

BODY = {"prompt": "Once upon a time", "max_tokens": 24, "temperature": 1.0, "seed": 7, "logprobs": 2}


def ranks_of(server: ServerProcess) -> list[psutil.Process]:
    """Return the processes of the ranks other than 0."""
    return [child for child in server.engine.children() if "engine.parts.distributed.rank" in child.cmdline()]


def test_what_one_process_can_do(start_server: StartServer, smollm2_path: Path, tmp_path: Path) -> None:
    """LoRA adapters from start and later, cached prefixes, drafts and grammars; alone and all together."""
    adapter = save_random_adapter(tmp_path / "poet", load_model_config(smollm2_path), 1, ranks={"": 8}, strength=1.0)
    loading = ("--max-loras=2", "--allow-runtime-lora-updating", f"--lora-modules=poet={adapter}")
    server = start_server(RANKS, *loading, "--speculative=ngram")
    ranks = ranks_of(server)
    assert len(ranks) == NUM_RANKS - 1
    loaded = server.http.post("/v1/load_lora_adapter", json={"lora_name": "later", "lora_path": str(adapter)})
    assert loaded.status_code == 200, loaded.text
    plain = BODY | {"prompt": "The quick brown fox jumps over the lazy dog. " * 40}
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
    assert f"-tp{NUM_RANKS}-" in server.answer(COMPLETIONS, BODY)["system_fingerprint"]
    server.signal(signal.SIGTERM)
    assert server.wait(GONE) == 0, server.end_of_log()
    wait_for_end_of(*(rank.pid for rank in ranks), seconds=GONE)
    assert "cannot go on" not in server.log


@pytest.mark.checklist("F05")
def test_a_rank_dies_or_hangs(start_server: StartServer) -> None:
    """The streams end with an error, the log names the rank, and the engine starts again with all ranks."""
    server = start_server(RANKS, "--step-timeout=10", "--max-num-seqs=4")
    expected = answer(server, COMPLETIONS, BODY)
    for number, signum in enumerate((signal.SIGKILL, signal.SIGSTOP), start=1):
        streams = start_streams(server, 4, max_tokens=900)
        ranks, engine = ranks_of(server), server.engine
        ranks[-1].send_signal(signum)
        check_lost(streams)
        wait_for_restart(server, number)
        wait_for_end_of(engine.pid, *(rank.pid for rank in ranks), seconds=GONE)
        assert answer(server, COMPLETIONS, BODY) == expected
    assert "rank 2 of 3 was killed by SIGKILL" in server.log
