"""The settings of embeddings."""

from server.settings.setting import ENGINE, Setting, choice

SETTINGS = {
    "pooling": Setting(
        ENGINE,
        choice("POOLING", "mean", "last"),
        "How /v1/embeddings pools the last hidden states of a text: their mean, or the state of the last token.",
    )
}
