"""Answer every line of a file, many at a time, and write the answers as JSON lines in the order of the input.

    python examples/batch.py examples/questions.txt answers.jsonl

The server batches what arrives together, so 16 requests at a time take much less than 16 times as long as one.
"""

import asyncio
import json
import os
import sys
from pathlib import Path

from openai import AsyncOpenAI

CONCURRENCY = 16

client = AsyncOpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
    timeout=600,
)


async def answer_all(questions: list[str]) -> list[str]:
    """Return the answers in the order of the questions."""
    model = (await client.models.list()).data[0].id
    limit = asyncio.Semaphore(CONCURRENCY)

    async def answer(question: str) -> str:
        async with limit:
            completion = await client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": question}], max_tokens=64, temperature=0
            )
            return completion.choices[0].message.content or ""

    return await asyncio.gather(*map(answer, questions))


source, target = map(Path, sys.argv[1:])
questions = source.read_text(encoding="utf-8").splitlines()
with target.open("w", encoding="utf-8") as file:
    for question, text in zip(questions, asyncio.run(answer_all(questions)), strict=True):
        file.write(json.dumps({"question": question, "answer": text}) + "\n")
print(f"{len(questions)} answers in {target}")
