"""lm-eval scores the served model and transformers with the same weights: all log probabilities agree.

Its completions client has the server tokenize, and sends token ids with `echo` and `logprobs`, several prompts per
request and several requests at a time.
"""

import json
import os
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.conformance.table import ENVIRONMENTS, FOLDER
from tests.support.reference_model import load_reference
from tests.support.server_process import COMPLETIONS, MODEL, running_server

pytestmark = pytest.mark.long

TASKS_FOLDER = FOLDER / "lm_eval_tasks"
TASKS = ("lightwell_choice", "lightwell_perplexity")
MAX_LENGTH = 96  # tokens per window; the longest text takes three windows


def evaluate(output: Path, kind: str, **model_args: object) -> dict[str, Any]:
    """Return lm-eval's output: {"results": metrics by task, "samples": values of each document by task}.

    `kind` is its type of model, `model_args` are the options. It runs in an environment of its own, which `make
    test-long` creates, but with torch and transformers of this one.
    """
    python = ENVIRONMENTS / "lm-eval" / "bin" / "python"
    assert python.exists(), "`make test-long` installs lm-eval"
    arguments = ",".join(f"{name}={value}" for name, value in model_args.items())
    command: list[str | Path] = [python, "-m", "lm_eval", "run", "--model", kind, "--model_args", arguments]
    command += ["--tasks", ",".join(TASKS), "--include_path", TASKS_FOLDER, "--output_path", output]
    command += ["--log_samples", "--batch_size", "4", "--device", "cpu"]
    environment = {"PYTHONPATH": sysconfig.get_path("purelib"), "OPENAI_API_KEY": "none"}
    environment |= {"HF_HOME": str(output / "cache"), "HF_HUB_OFFLINE": "1"}
    variables = os.environ | environment
    done = subprocess.run(command, cwd=TASKS_FOLDER, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    (results,) = output.glob("**/results_*.json")
    samples = {
        path.name.split("_20")[0].removeprefix("samples_"): [json.loads(line) for line in path.read_text().splitlines()]
        for path in output.glob("**/samples_*.jsonl")
    }
    return {"results": json.loads(results.read_text())["results"], "samples": samples}


@pytest.fixture(scope="module")
def exported(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export the GGUF weights in float32, as transformers reads them, to a transformers folder."""
    folder = tmp_path_factory.mktemp("exported")
    load_reference(smollm2_path).save_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("expected")
    given = {"pretrained": exported, "dtype": "float32", "max_length": MAX_LENGTH}
    return evaluate(folder, "hf", **given)


def loglikelihoods(samples: list[dict[str, Any]]) -> list[list[Any]]:
    """Return per document [[log probability, "True" if greedy], ...], or one number for a whole text."""
    return [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]


def test_the_same_as_transformers(smollm2_path: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    flags = ("--quantization=none", "--dtype=float32", "--max-model-len=1024", "--kv-cache-memory=64MiB")
    with running_server(smollm2_path, *flags) as server:
        asked: dict[str, Any] = {"model": MODEL, "base_url": server.url + COMPLETIONS, "tokenizer_backend": "remote"}
        asked |= {"num_concurrent": 2, "max_length": MAX_LENGTH + 2}  # its windows are two tokens shorter
        found = evaluate(tmp_path, "local-completions", **asked)
        assert server.metric("lightwell_unknown_parameters_total") == 0
    for task in TASKS:
        ours, theirs = (loglikelihoods(each["samples"][task]) for each in (found, expected))
        assert len(ours) == len(theirs) >= 5
        for our_document, their_document in zip(ours, theirs, strict=True):
            for our_number, their_number in zip(our_document, their_document, strict=True):
                check_same(our_number, their_number)
    accuracy = [each["results"]["lightwell_choice"]["acc,none"] for each in (found, expected)]
    assert accuracy[0] == accuracy[1] > 0.5


def check_same(ours: Any, theirs: Any) -> None:
    if isinstance(ours, list):
        assert ours[1] == theirs[1]
        ours, theirs = ours[0], theirs[0]
    assert float(ours) == pytest.approx(float(theirs), rel=1e-4, abs=1e-3)
