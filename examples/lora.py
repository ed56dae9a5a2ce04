"""Load a LoRA adapter into a running server, compare its answer with the model's, and unload it.

    python examples/lora.py path/to/adapter

The server must run with `--allow-runtime-lora-updating`. The path, which the server reads, is a folder in PEFT's format
or a GGUF file.
"""

import os
import sys

import httpx
from openai import OpenAI

NAME = "example"
BASE_URL = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
API_KEY = os.environ.get("OPENAI_API_KEY", "none")
client = OpenAI(base_url=BASE_URL, api_key=API_KEY)
admin = httpx.Client(base_url=BASE_URL, headers={"Authorization": f"Bearer {API_KEY}"}, timeout=600)
model = client.models.list().data[0].id


def call(path: str, **body: str) -> None:
    response = admin.post(path, json=body)
    print(response.text)
    response.raise_for_status()


call("/load_lora_adapter", lora_name=NAME, lora_path=os.path.abspath(sys.argv[1]))
try:
    for name in (model, NAME):
        completion = client.completions.create(model=name, prompt="Once upon a time", max_tokens=24, temperature=0)
        print(f"{name}: {completion.choices[0].text!r}")
finally:
    call("/unload_lora_adapter", lora_name=NAME)
