"""Steps that all ranks run, between threads."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.config import EngineConfig
from engine.core import Engine
from engine.distributed.execution import LeadingExecution
from engine.distributed.group import Command
from engine.shared.messages import SamplingParams, Submit
from tests.support.kernel_choice import choose_kernels
from tests.support.ranks import load_threads
from tests.support.tiny_models import save_random_model


def test_each_run_of_the_head_is_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that run a program twice within a command would overwrite logits that others still read."""
    shape = LlamaConfig(hidden_size=32, num_attention_heads=2, intermediate_size=64, num_hidden_layers=1, vocab_size=96)
    save_random_model(LlamaForCausalLM(shape), tmp_path, seed=1)
    config = EngineConfig(model_path=str(tmp_path), max_model_len=256, max_num_seqs=4, tensor_parallel_size=2)
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, ignore_eos=True)  # which reads all hidden states
    with choose_kernels("default", num_threads=1), load_threads(config) as loaded, torch.inference_mode():
        engine = Engine(config, loaded)
        engine.add(Submit(request_id="r", prompt_token_ids=list(range(3, 93)) * 2, params=params, arrival=0.0))
        while engine.has_work:
            engine.step()
        execution = loaded.runner.execution
        assert isinstance(execution, LeadingExecution)
        rows = torch.arange(150)
        most = execution.max_logit_rows
        expected = torch.cat([execution.compute_logits(some).clone() for some in torch.split(rows, most)])
        commands: Counter[Command] = Counter()
        everywhere = execution.group.everywhere

        @contextmanager
        def counted(command: Command) -> Iterator[None]:
            commands[command] += 1
            with everywhere(command):
                yield

        monkeypatch.setattr(execution.group, "everywhere", counted)
        assert torch.equal(execution.compute_logits(rows), expected)
        assert commands == {Command.LOGITS: -(-len(rows) // most)}
        assert commands[Command.LOGITS] > 1
