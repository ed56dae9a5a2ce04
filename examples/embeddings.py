"""Find which of some sentences is closest in meaning to a question.

    python examples/embeddings.py

Embeddings have length 1, so the dot product of two of them is their cosine similarity.
"""

import os

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
)
model = client.models.list().data[0].id

QUESTION = "How do I bake bread?"
SENTENCES = [
    "Mix flour, water, salt and yeast, and let the dough rise.",
    "The train to Lyon leaves at nine.",
    "Sharks are older than trees.",
]

answer = client.embeddings.create(model=model, input=[QUESTION, *SENTENCES])
question, *others = (item.embedding for item in answer.data)
similarities = [sum(x * y for x, y in zip(question, other, strict=True)) for other in others]
for similarity, sentence in sorted(zip(similarities, SENTENCES, strict=True), reverse=True):
    print(f"{similarity:.3f}  {sentence}")
