"""Tokenizers of other files than tokenizer.json, which `server.text.folder_tokenizer` loads by name."""
