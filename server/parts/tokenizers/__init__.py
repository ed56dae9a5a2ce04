"""Tokenizers of other files than tokenizer.json, which `server.text.tokenizer` loads by name."""
