"""Fuzz a target with atheris: `python -m tests.fuzz TARGET [options of libFuzzer]`, with no target: list them.

What is found is written to tests/fuzz/cases/TARGET, whose files ordinary tests run.
"""

import sys
import tempfile
from pathlib import Path

import atheris

from tests.support.paths import ROOT

with atheris.instrument_imports(include=["server", "engine"]):
    from tests.fuzz.targets import TARGETS

DEFAULTS = ("-max_total_time=60", "-timeout=30", "-rss_limit_mb=4096")


def main(name: str, options: list[str]) -> None:
    target = TARGETS[name]
    cases = ROOT / "tests/fuzz/cases" / name
    cases.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for number, seed in enumerate(target.seeds()):
            (Path(folder) / str(number)).write_bytes(seed)
        arguments = [sys.argv[0], *DEFAULTS, f"-artifact_prefix={cases}/", *options, folder, str(cases)]
        atheris.Setup(arguments, target.run)
        atheris.Fuzz()


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: python -m tests.fuzz TARGET [-max_total_time=SECONDS]; the targets are {', '.join(TARGETS)}")
    main(sys.argv[1], sys.argv[2:])
