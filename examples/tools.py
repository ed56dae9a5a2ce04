"""Let the model call a Python function, and show it the result.

    python examples/tools.py

`tool_choice` names the function, so a grammar holds the call to the schema of its parameters.
"""

import json
import os
from typing import Any

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
)
model = client.models.list().data[0].id


def add(a: int, b: int) -> int:
    return a + b


ADD: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two integers.",
        "parameters": {
            "type": "object",
            "properties": {name: {"type": "integer", "minimum": 0, "maximum": 999} for name in ("a", "b")},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
messages: list[Any] = [{"role": "user", "content": "What is 17 + 25?"}]

answer = client.chat.completions.create(
    model=model,
    messages=messages,
    tools=[ADD],
    tool_choice={"type": "function", "function": {"name": "add"}},
    temperature=0,
    max_tokens=128,
)
message = answer.choices[0].message
messages.append(message.model_dump(exclude_none=True))
for call in message.tool_calls or ():
    assert call.type == "function"
    result = add(**json.loads(call.function.arguments))
    print(f"{call.function.name}({call.function.arguments}) = {result}")
    messages.append({"role": "tool", "tool_call_id": call.id, "content": str(result)})

final = client.chat.completions.create(model=model, messages=messages, tools=[ADD], tool_choice="none", max_tokens=64)
print(final.choices[0].message.content)
