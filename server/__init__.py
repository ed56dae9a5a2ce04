"""The server of Lightwell: text and HTTP around the engine. Never imports torch."""
