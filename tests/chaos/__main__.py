"""Run the chaos for some time and write its report: `python -m tests.chaos --minutes 60 --report FILE`."""

import argparse
import random
import sys
from pathlib import Path

from server.model_paths import resolve_model
from tests.chaos.run import run

ROUND_SECONDS = 60.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=int, default=60, help="one death of the engine in each (default: 60)")
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000), help="default: a random one")
    parser.add_argument("--report", type=Path, default=Path("soak-report.md"), help="default: soak-report.md")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    model = resolve_model("smollm2-135m").path
    report = run(model, options.report, num_rounds=options.minutes, round_seconds=ROUND_SECONDS, seed=options.seed)
    print(report.text())
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
