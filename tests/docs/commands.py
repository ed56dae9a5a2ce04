"""The commands that the documentation shows, and why no test runs some of them."""

from collections.abc import Mapping

from tests.support.documents import DOCUMENTS, commands

INSTALLS = "installs PyTorch, for which there is tests/install/try_install.py"
RAY = "starts or needs a Ray cluster; tests/e2e/test_ray.py deploys the same file on one"
SEVERAL_MODELS = "a server of its own; tests/e2e/test_several_models.py"
HUB = "downloads other servers from package registries, 6 GB"

# The beginning of a command -> why no test runs it. All others are run by tests/e2e/test_documentation.py.
EXCEPTIONS: Mapping[str, str] = {
    "LIGHTWELL_API_KEY=choose-one docker compose up": "Docker",
    "LIGHTWELL_API_KEY=choose-one docker compose --profile open-webui up": "Docker",
    'curl http://127.0.0.1:8000/v1/models -H "Authorization: Bearer $LIGHTWELL_API_KEY"': "the server of compose",
    "LIGHTWELL_API_KEY=choose-one lightwell serve --host 0.0.0.0 --ssl-certfile": "needs a certificate",
    ".venv/bin/lightwell serve": "serves in an environment that no test makes",
    ".venv/bin/pip install": INSTALLS,
    ".venv/bin/serve run": RAY,
    "serve deploy": RAY,
    "serve status": RAY,
    "docker build ": "Docker",
    "docker run ": "Docker",
    "lightwell serve MODEL --device cuda:0": "GPU",
    "lightwell serve smollm2-135m --model gemma3:270m": SEVERAL_MODELS,
    "curl http://127.0.0.1:8000/v1/models/gemma3:270m": SEVERAL_MODELS,
    """curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{"model": "gemma3""": (
        SEVERAL_MODELS
    ),
    "lightwell serve smollm2-135m --data-parallel-size": "a server of its own; tests/e2e/test_several_processes.py",
    "lightwell serve smollm2-135m --tensor-parallel-size": "a server of its own; tests/e2e/test_several_processes.py",
    "lightwell serve smollm2-135m --api-server-count": "a server of its own; tests/e2e/test_several_processes.py",
    "kubectl ": "a Kubernetes cluster",
    "vllm-router ": "servers on other machines; tests/conformance/test_router.py runs it",
    "make bench-gpu": "GPU",
    ".venv/bin/python -m tests.conformance.try_clients": "downloads programs, 10 GB",
    "python3 -m venv .venv": INSTALLS,
    "uv pip install": INSTALLS,
    "uv venv": INSTALLS,
    'make peers ARGS="setup FOLDER"': HUB,
    'make peers ARGS="compare FOLDER': HUB,
}


def is_exception(command: str) -> bool:
    return command.startswith(tuple(EXCEPTIONS))


def shown_commands() -> list[str]:
    """Return every command that some document shows, once, in the order of the documents."""
    return list(dict.fromkeys(command for document in DOCUMENTS for command in commands(document)))
