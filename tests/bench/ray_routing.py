"""Measure the prefix cache of replicas on Ray Serve: `python -m tests.bench.ray_routing [MODEL]`.

The table has the share of prompt tokens that were cached, over chats of several turns that take turns with each other:
in one server, and in three replicas, by how requests are routed.
"""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from rich.console import Console
from rich.table import Column, Table

from server.model_paths import resolve_model
from tests.bench.quality import TEXT
from tests.bench.serve import MODEL_NAME, parse, run, running_server
from tests.support.ray_cluster import KEY, ray_cluster

NUM_CHATS, NUM_TURNS, CONCURRENCY, NUM_REPLICAS = 16, 4, 6, 3
SYSTEM_WORDS, QUESTION_WORDS, ANSWER_TOKENS = 100, 60, 24
SETTINGS = {"kv-cache-memory": "512MiB", "max-model-len": "1024"}
ROUTERS = {
    "by prefix": "server.ray.router:PrefixRouter",
    "power of two choices": "ray.serve._private.request_router:PowerOfTwoChoicesRequestRouter",  # Serve's default
    "random": f"{__spec__.name if __spec__ else __name__}:RandomRouter",
}


class RandomRouter(RequestRouter):
    """Routes each request to any replica."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        return [[replica] for replica in random.sample(candidate_replicas, len(candidate_replicas))]


def hit_rate(url: str, seed: int) -> float:
    """Hold chats, and return the share of the tokens of their prompts that were cached."""
    words, draw = TEXT.read_text(encoding="utf-8").split(), random.Random(seed)

    def text(num_words: int) -> str:
        start = draw.randrange(len(words) - num_words)
        return " ".join(words[start : start + num_words])

    system = {"role": "system", "content": text(SYSTEM_WORDS)}
    chats: list[list[Any]] = [[system] for _ in range(NUM_CHATS)]
    num_tokens = num_cached = 0
    with (
        httpx.Client(timeout=600, trust_env=False, headers={"Authorization": f"Bearer {KEY}"}) as client,
        ThreadPoolExecutor(CONCURRENCY) as pool,
    ):

        def ask(messages: list[Any]) -> Any:
            body = {"model": MODEL_NAME, "messages": messages, "max_tokens": ANSWER_TOKENS, "seed": 1}
            return client.post(f"{url}/v1/chat/completions", json=body).raise_for_status().json()

        for _ in range(NUM_TURNS):
            draw.shuffle(chats)
            for messages in chats:
                messages.append({"role": "user", "content": text(QUESTION_WORDS)})
            for messages, answer in zip(chats, pool.map(ask, chats), strict=True):
                messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
                num_tokens += answer["usage"]["prompt_tokens"]
                num_cached += answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return num_cached / num_tokens


def main() -> int:
    arguments = parse("ray_routing", __doc__, "smollm2-135m", seed=(0, "of the chats"))
    model = resolve_model(arguments.model).path
    flags = [f"--{name}={value}" for name, value in SETTINGS.items()]
    with running_server([str(model), *flags, f"--api-key={KEY}"]) as (url, _):
        rates = {"one server": hit_rate(url, arguments.seed)}
    for name, router in ROUTERS.items():
        with deployed(model, NUM_REPLICAS, router) as url:
            rates[f"{NUM_REPLICAS} replicas, {name}"] = hit_rate(url, arguments.seed)
    table = Table("", Column("cached tokens", justify="right"), Column("of one server's", justify="right"))
    for name, rate in rates.items():
        table.add_row(name, f"{rate:.1%}", f"{rate / rates['one server']:.1%}")
    Console().print(table)
    return 0 if rates[f"{NUM_REPLICAS} replicas, by prefix"] >= 0.9 * rates["one server"] else 1


@contextmanager
def deployed(model: Path, num_replicas: int, router: str) -> Iterator[str]:
    """Run a cluster of its own, so that all caches are empty, and yield the URL of the application."""
    options = {"num_replicas": num_replicas, "request_router_config": {"request_router_class": router}}
    with ray_cluster() as cluster:
        cluster.deploy(model, options, **SETTINGS, **{"served-model-name": MODEL_NAME})
        yield cluster.url


if __name__ == "__main__":
    run(main)
