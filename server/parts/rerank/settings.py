"""The settings of reranking."""

from server.settings.setting import ENGINE, Setting, pattern

GROUP = ENGINE
SETTINGS = {
    "score_tokens": Setting(
        pattern("two words such as yes,no", r"[^,\s]+,[^,\s]+", "TRUE,FALSE"),
        "The two words, one token each, that a reranker answers with: /v1/rerank and /v1/score report the "
        "probability of the first. Unset: the cosine similarity of embeddings.",
    )
}
