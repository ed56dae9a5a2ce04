"""Measure vLLM on a model, and print the seconds as JSON. Run by tests.bench.gpu in the interpreter that has vLLM.

Arguments, as JSON: the model's folder, the vocabulary's size, numbers of streams, tokens of their context, tokens of
a prompt, and tokens to generate. A decoding step is the difference between a run of many tokens and of one, so that
the prompts do not count; a prompt is a run of one token. Imports nothing of this project.
"""

import json
import random
import sys
import time
from typing import Any


def main() -> None:
    from vllm import LLM, SamplingParams

    folder, vocab_size, streams, context, prompt, num_generated = json.loads(sys.argv[1])
    model = LLM(
        model=folder,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enable_prefix_caching=False,
        max_num_batched_tokens=max(8192, prompt),
        max_model_len=max(context, prompt) + num_generated,
    )
    rng = random.Random(0)

    def seconds(num_prompts: int, num_tokens: int, max_tokens: int) -> float:
        ids = [[rng.randrange(vocab_size) for _ in range(num_tokens)] for _ in range(num_prompts)]
        prompts: list[Any] = [{"prompt_token_ids": some} for some in ids]
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        outputs = model.generate(prompts, params, use_tqdm=False)
        took = time.perf_counter() - started
        assert all(len(output.outputs[0].token_ids) == max_tokens for output in outputs)
        return took

    found: dict[str, Any] = {"decode": {}}
    for number in streams:
        for _ in range(2):  # the second counts
            one, many = seconds(number, context, 1), seconds(number, context, num_generated)
        found["decode"][number] = (many - one) / (num_generated - 1)
    for _ in range(2):
        found["prefill"] = seconds(1, prompt, 1)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
