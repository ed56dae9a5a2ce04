"""Keep the code readable: short files and functions, docstrings that say what a function does, one word a thing."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

SOURCES = sorted(
    path.relative_to(ROOT).as_posix() for room in ("engine", "server") for path in ROOT.glob(f"{room}/**/*.py")
)

MAX_FILE_LINES = 500
MAX_CLASS_LINES = 330
MAX_FUNCTION_LINES = 60
MAX_FOLDER_MODULES = 15

# A docstring that begins like this names a thing; it should say what the function does.
NAMES_A_THING = re.compile(r"(What|Whether|Of|As|Those|That|How|Where|By|Who|From|To be)\b")

PRIVATE_WORDS = re.compile(
    r"judge[_ds]|_judge|verdict|lifeline|(?<!\x22)sibling|\bheir\b|leader_of|_mourn|thoughts|NO_PLACE|lora_place|\bthereof\b",
    re.IGNORECASE,
)

# Modules without a test file of their own name, and where they are tested.
TESTED_ELSEWHERE = {
    "engine/batch/inputs.py": "tests/engine/batch/test_builder.py",
    "engine/batch/transfer.py": "tests/engine/batch/test_builder.py",
    "engine/config/families.py": "tests/engine/config/test_decoder.py",
    "engine/config/rope.py": "tests/engine/model/test_rotary.py",
    "engine/config/structs.py": "tests/engine/config/test_huggingface.py",
    "engine/distributed/collectives.py": "tests/engine/test_promise.py",
    "engine/distributed/parallelize.py": "tests/parity/test_tensor_parallel.py",
    "engine/distributed/part.py": "tests/parity/test_tensor_parallel.py",
    "engine/execution/cpu_program.py": "tests/engine/test_runner.py",
    "engine/execution/eager.py": "tests/engine/execution/test_cuda_graphs.py",
    "engine/execution/interface.py": "tests/engine/test_runner.py",
    "engine/execution/load.py": "tests/engine/test_runner.py",
    "engine/execution/observer.py": "tests/engine/inspection/test_inspector.py",
    "engine/grammar/compiler.py": "tests/engine/grammar/test_matcher.py",
    "engine/inspection/borrowed_blocks.py": "tests/engine/inspection/test_inspector.py",
    "engine/inspection/sampling.py": "tests/engine/inspection/test_inspector.py",
    "engine/kernels/cpu/collectives.py": "tests/engine/test_promise.py",
    "engine/kernels/cpu/c_structs.py": "tests/engine/kernels/cpu/test_library.py",
    "engine/kernels/cpu/heads.py": "tests/parity/test_model_families.py",
    "engine/kernels/cpu/program.py": "tests/engine/kernels/cpu/test_kernels.py",
    "engine/kernels/cpu/recorder.py": "tests/engine/kernels/cpu/test_kernels.py",
    "engine/kernels/cpu/weights.py": "tests/engine/kernels/cpu/test_kernels.py",
    "engine/kernels/interface.py": "tests/engine/kernels/test_load.py",
    "engine/kernels/lazy_memory.py": "tests/engine/model/test_kv_cache.py",
    "engine/model/attention.py": "tests/parity/test_model_families.py",
    "engine/model/attention_weights.py": "tests/engine/inspection/test_inspector.py",
    "engine/model/decoder.py": "tests/parity/test_families.py",
    "engine/model/latent_attention.py": "tests/parity/test_model_families.py",
    "engine/model/observation.py": "tests/engine/inspection/test_inspector.py",
    "engine/model/linear.py": "tests/engine/model/test_parameters.py",
    "engine/model/mlp.py": "tests/parity/test_model_families.py",
    "engine/model/norm.py": "tests/parity/test_model_families.py",
    "engine/model/per_layer_input.py": "tests/parity/test_model_families.py",
    "engine/process.py": "tests/e2e/test_death.py",
    "engine/rank.py": "tests/e2e/test_ranks.py",
    "engine/scheduling/kv_manager.py": "tests/engine/scheduling/test_scheduler.py",
    "engine/shared/block_hashes.py": "tests/engine/scheduling/test_block_pool.py",
    "engine/shared/machine.py": "tests/engine/test_doctor.py",
    "engine/shared/messages.py": "tests/server/engine_client/test_client.py",
    "engine/shared/records.py": "tests/engine/inspection/test_reader.py",
    "engine/shared/parent_death.py": "tests/server/test_supervisor.py",
    "server/api/admin/metrics_page.py": "tests/server/test_metrics.py",
    "server/api/admin/models.py": "tests/server/api/admin/test_lora_adapters.py",
    "server/api/admin/replay.py": "tests/server/test_recordings.py",
    "server/api/admin/schemas.py": "tests/server/api/test_every_field.py",
    "server/api/chat/counting.py": "tests/server/api/messages/test_routes.py",
    "server/api/chat/request_builder.py": "tests/server/api/messages/test_schemas.py",
    "server/api/chat/schemas.py": "tests/server/api/test_every_field.py",
    "server/api/completions/conversion.py": "tests/server/api/completions/test_routes.py",
    "server/api/completions/echo.py": "tests/server/api/completions/test_routes.py",
    "server/api/completions/schemas.py": "tests/server/api/completions/test_routes.py",
    "server/api/completions/writer.py": "tests/server/api/completions/test_routes.py",
    "server/api/embeddings/conversion.py": "tests/server/api/embeddings/test_routes.py",
    "server/api/embeddings/pipeline.py": "tests/server/api/embeddings/test_routes.py",
    "server/api/embeddings/schemas.py": "tests/server/api/embeddings/test_routes.py",
    "server/api/embeddings/writer.py": "tests/server/api/embeddings/test_routes.py",
    "server/api/inspection/schemas.py": "tests/server/api/inspection/test_routes.py",
    "server/api/messages/client_tools.py": "tests/server/api/messages/test_schemas.py",
    "server/api/ollama/schemas.py": "tests/server/api/test_every_field.py",
    "server/api/rerank/schemas.py": "tests/server/api/rerank/test_routes.py",
    "server/api/rerank/scorers.py": "tests/server/api/rerank/test_routes.py",
    "server/api/responses/custom_tools.py": "tests/server/api/responses/test_schemas.py",
    "server/api/responses/event_schemas.py": "tests/server/api/responses/test_writer.py",
    "server/coordination/messages.py": "tests/server/coordination/test_worker.py",
    "server/statistics/choice_stats.py": "tests/server/engine_client/test_client.py",
    "server/cli/commands/build_kernels.py": "tests/server/cli/test_main.py",
    "server/cli/commands/clients.py": "tests/server/cli/test_main.py",
    "server/cli/commands/doctor.py": "tests/server/cli/test_doctor.py",
    "server/cli/commands/models.py": "tests/server/cli/test_model_list.py",
    "server/cli/commands/run.py": "tests/server/cli/test_run.py",
    "server/cli/commands/serve.py": "tests/server/cli/test_main.py",
    "server/constrained/answers.py": "tests/server/constrained/test_tool_grammar.py",
    "server/constrained/messages.py": "tests/server/constrained/test_grammar_process.py",
    "server/constrained/process.py": "tests/server/constrained/test_grammar_process.py",
    "server/constrained/marker_writer.py": "tests/server/constrained/test_tag_grammar.py",
    "server/engine_client/connected_engine.py": "tests/server/engine_client/test_client.py",
    "server/generation/endpoint.py": "tests/server/generation/test_pipeline.py",
    "server/generation/prompt_batch.py": "tests/server/api/embeddings/test_routes.py",
    "server/http/error_schemas.py": "tests/server/http/test_errors.py",
    "server/http/json_response.py": "tests/server/http/test_request_middleware.py",
    "server/hub/cache.py": "tests/server/hub/test_fetch.py",
    "server/hub/client.py": "tests/server/hub/test_fetch.py",
    "server/hub/errors.py": "tests/server/hub/test_fetch.py",
    "server/hub/repository.py": "tests/server/hub/test_fetch.py",
    "server/models/load_model.py": "tests/server/test_main.py",
    "server/models/served_model.py": "tests/server/models/test_registry.py",
    "server/models/slot.py": "tests/server/models/test_manager.py",
    "server/otel/child_span.py": "tests/server/generation/test_request_span.py",
    "server/processes/model_files.py": "tests/server/test_supervisor.py",
    "server/ray/child.py": "tests/server/ray/test_replica.py",
    "server/ray/messages.py": "tests/server/ray/test_ingress.py",
    "server/running_requests.py": "tests/server/api/admin/test_requests.py",
    "server/schemas/answers.py": "tests/server/generation/test_timings.py",
    "server/schemas/rendered_prompt.py": "tests/server/generation/test_pipeline.py",
    "server/schemas/request_fields.py": "tests/server/schemas/test_generation_request.py",
    "server/schemas/samplers.py": "tests/server/schemas/test_generation_request.py",
    "server/schemas/structural_tag.py": "tests/server/constrained/test_tag_grammar.py",
    "server/schemas/structured_outputs.py": "tests/server/constrained/test_constraints.py",
    "server/schemas/tools.py": "tests/server/api/chat/test_constraints.py",
    "server/settings/setting.py": "tests/server/settings/test_load.py",
    "server/text/parsers/answer_parts.py": "tests/server/text/parsers/test_answer_parser.py",
    "server/text/parsers/call_reader.py": "tests/server/text/parsers/test_tool_parser.py",
    "server/text/parsers/object_reader.py": "tests/server/text/parsers/test_tool_parser.py",
    "server/text/templates/process.py": "tests/server/text/templates/test_renderer.py",
    "server/text/templates/tool_prompt.py": "tests/server/api/chat/test_conversion.py",
}


def tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def functions(module: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def num_lines(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


@pytest.mark.parametrize("path", SOURCES)
def test_files_classes_and_functions_are_short(path: str) -> None:
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    classes = [node for node in ast.walk(tree(path)) if isinstance(node, ast.ClassDef)]
    assert [node.name for node in classes if num_lines(node) > MAX_CLASS_LINES] == []
    assert [node.name for node in functions(tree(path)) if num_lines(node) > MAX_FUNCTION_LINES] == []


def test_no_folder_is_crowded() -> None:
    num_modules = Counter(str(Path(path).parent) for path in SOURCES if not path.endswith("__init__.py"))
    assert {folder: num for folder, num in num_modules.items() if num > MAX_FOLDER_MODULES} == {}


@pytest.mark.parametrize("path", SOURCES)
def test_docstrings_say_what_a_function_does(path: str) -> None:
    docstrings = [(node.name, ast.get_docstring(node) or "") for node in functions(tree(path))]
    assert [(name, text) for name, text in docstrings if NAMES_A_THING.match(text)] == []


@pytest.mark.parametrize("path", SOURCES)
def test_words_are_the_fields(path: str) -> None:
    assert PRIVATE_WORDS.findall((ROOT / path).read_text(encoding="utf-8")) == []


def mirror_of(path: str) -> Path:
    """Return the test file of a module: engine/scheduling/scheduler.py -> tests/engine/scheduling/test_scheduler.py."""
    module = Path(path)
    return Path("tests") / module.parent / f"test_{module.name}"


def test_every_module_has_its_tests() -> None:
    """Modules that hold code, and the table has no line too many."""
    with_code = [path for path in SOURCES if Path(path).name not in ("__init__.py", "__main__.py")]
    without_mirror = {path for path in with_code if not (ROOT / mirror_of(path)).is_file()}
    assert without_mirror == TESTED_ELSEWHERE.keys()
    assert [test for test in TESTED_ELSEWHERE.values() if not (ROOT / test).exists()] == []
