"""The settings of embeddings."""

from server.settings.setting import ENGINE, Setting, choice

GROUP = ENGINE
SETTINGS = {
    "pooling": Setting(
        choice("POOLING", "mean", "last"),
        "How /v1/embeddings pools the last hidden states of a text: their mean, or the state of the last token.",
    )
}
