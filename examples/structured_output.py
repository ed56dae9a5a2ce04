"""Ask for JSON that matches a schema, and for text that matches a regular expression.

    python examples/structured_output.py

A grammar limits which tokens can be sampled, so even a small model keeps to the form.
"""

import json
import os
import re

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
)
model = client.models.list().data[0].id

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "colour": {"enum": ["red", "green", "blue"]},
    },
    "required": ["name", "age", "colour"],
    "additionalProperties": False,
}
answer = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Invent a person."}],
    response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}},
    max_tokens=256,
    seed=1,
)
person = json.loads(answer.choices[0].message.content or "")
print(f"{person['name']} is {person['age']} and likes {person['colour']}")

DATE = r"[12][0-9]{3}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
answer = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "When did the first human walk on the Moon?"}],
    extra_body={"structured_outputs": {"regex": DATE}},
    temperature=0,
)
date = answer.choices[0].message.content or ""
assert re.fullmatch(DATE, date)
print(date)
