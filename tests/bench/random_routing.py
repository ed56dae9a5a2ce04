"""`lightwell` whose requests go to random engines, to compare: `python -m tests.bench.random_routing serve ...`."""

import random
import sys

import server.cli.main
import server.main
from engine.shared.messages import Submit
from server import supervisor
from server.engine_client.connected_engine import ConnectedEngine
from server.engine_client.engine_group import EngineGroup

API = "api-process"


def choose(self: EngineGroup, message: Submit) -> tuple[ConnectedEngine, int]:
    """Return a random engine that is ready."""
    return random.choice([engine for engine in self.alive if engine.liveness.is_ready]), 0


def main() -> int:
    if sys.argv[1:] == [API]:
        EngineGroup.choose = choose  # type: ignore[method-assign]
        server.main.main()
    commands = supervisor.Commands(api=(sys.executable, "-m", "tests.bench.random_routing", API))
    supervisor.Commands = lambda: commands  # type: ignore[misc,assignment]
    return server.cli.main.main()


if __name__ == "__main__":
    sys.exit(main())
