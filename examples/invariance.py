"""Send one request alone and then among 15 others, and compare the answers bit for bit.

    python examples/invariance.py

Sampling is at temperature 0.8 with a seed. The answers include the log probability of each token.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

BASE_URL = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
HEADERS = {"Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}"}
client = httpx.Client(base_url=BASE_URL, headers=HEADERS, timeout=600)
model = client.get("/models").raise_for_status().json()["data"][0]["id"]


def complete(prompt: str, seed: int) -> dict[str, Any]:
    """Return the first choice: its text and log probabilities."""
    fields = {"max_tokens": 32, "temperature": 0.8, "logprobs": 5, "seed": seed}
    answer = client.post("/completions", json={"model": model, "prompt": prompt} | fields).raise_for_status().json()
    choice: dict[str, Any] = answer["choices"][0]
    return choice


alone = complete("Once upon a time", seed=1)
with ThreadPoolExecutor(16) as pool:
    others = [pool.submit(complete, f"Chapter {number}. " * number, seed=number) for number in range(2, 17)]
    in_company = pool.submit(complete, "Once upon a time", seed=1).result()

num_tokens = len(alone["logprobs"]["tokens"])
if in_company != alone:
    sys.exit(f"different answers:\n{alone}\n{in_company}")
print(f"alone and among {len(others)} others: the same {num_tokens} tokens and log probabilities, bit for bit")
