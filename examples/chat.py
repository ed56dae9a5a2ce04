"""Hold a conversation of two turns and print the answers as they are generated.

python examples/chat.py
"""

import os

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
)
model = client.models.list().data[0].id
messages: list[ChatCompletionMessageParam] = [{"role": "system", "content": "Answer in one sentence."}]

for question in ("What is the capital of France?", "And of Italy?"):
    messages.append({"role": "user", "content": question})
    print(f"> {question}")
    answer = ""
    stream = client.chat.completions.create(model=model, messages=messages, max_tokens=64, temperature=0, stream=True)
    for chunk in stream:
        text = chunk.choices[0].delta.content or ""
        answer += text
        print(text, end="", flush=True)
    print()
    messages.append({"role": "assistant", "content": answer})
