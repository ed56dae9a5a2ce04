"""Runs lm-eval in an environment of its own, which has further packages. `make test-long` creates it."""

import json
import os
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from tests.conformance.table import ENVIRONMENTS, FOLDER

TASKS = FOLDER / "lm_eval_tasks"


def evaluate(output: Path, kind: str, tasks: str, **model_args: object) -> dict[str, Any]:
    """Return lm-eval's output for `tasks`: {"results": metrics by task, "samples": values of each document by task}.

    `kind` is lm-eval's type of model, `model_args` its options. torch and transformers are those of the caller.
    """
    python = ENVIRONMENTS / "lm-eval" / "bin" / "python"
    assert python.exists(), "`make test-long` installs lm-eval"
    arguments = ",".join(f"{name}={value}" for name, value in model_args.items())
    command = [str(python), "-m", "lm_eval", "run", "--model", kind, "--model_args", arguments, "--tasks", tasks]
    command += ["--include_path", str(TASKS), "--output_path", str(output), "--log_samples"]
    command += ["--batch_size", "4", "--device", "cpu"]
    environment = {"PYTHONPATH": sysconfig.get_path("purelib"), "OPENAI_API_KEY": "none"}
    environment |= {"HF_HOME": str(output / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=TASKS, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    (results,) = output.glob("**/results_*.json")
    samples = {
        path.name.split("_20")[0].removeprefix("samples_"): [json.loads(line) for line in path.read_text().splitlines()]
        for path in output.glob("**/samples_*.jsonl")
    }
    return {"results": json.loads(results.read_text())["results"], "samples": samples}
