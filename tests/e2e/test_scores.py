"""Scores of the real model, compared with transformers."""

from pathlib import Path

import pytest
import torch

from tests.e2e.conftest import StartServer
from tests.support.reference_model import load_reference

QUERY = "What is the capital of France?"
DOCUMENTS = ["Paris is the capital of France.", "Bread is made of flour and water.", "Rome lies in Italy."]
TOLERANCE = 0.06  # between packed weights with 8-bit activations and float32


def test_a_reranker_scores_as_transformers_does(start_server: StartServer, smollm2_path: Path) -> None:
    server = start_server("--score-tokens=yes,no")
    answer = server.http.post("/v1/rerank", json={"model": "smollm2-135m", "query": QUERY, "documents": DOCUMENTS})
    scores = {result["index"]: result["relevance_score"] for result in answer.json()["results"]}
    assert sorted(scores.values(), reverse=True) == list(scores.values())
    model = load_reference(smollm2_path)
    true, false = (server.http.post("/tokenize", json={"prompt": word}).json()["tokens"][0] for word in ("yes", "no"))
    instruction = "Given a web search query, retrieve relevant passages that answer the query"
    system = (
        "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
        'Note that the answer can only be "yes" or "no".'
    )
    for index, document in enumerate(DOCUMENTS):
        text = (
            f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n<Instruct>: {instruction}\n<Query>: {QUERY}\n"
            f"<Document>: {document}<|im_end|>\n<|im_start|>assistant\n"
        )
        token_ids = server.http.post("/tokenize", json={"prompt": text}).json()["tokens"]
        with torch.inference_mode():
            logits = model(torch.tensor([token_ids])).logits[0, -1]
        expected = torch.softmax(logits[[true, false]], dim=0)[0].item()
        assert scores[index] == pytest.approx(expected, abs=TOLERANCE)


def test_similarity_of_the_real_model(start_server: StartServer) -> None:
    server = start_server()
    answer = server.http.post(
        "/v1/score", json={"model": "smollm2-135m", "text_1": QUERY, "text_2": [QUERY, *DOCUMENTS]}
    )
    scores = [item["score"] for item in answer.json()["data"]]
    assert scores[0] == pytest.approx(1)
    assert scores[1] == max(scores[1:])
