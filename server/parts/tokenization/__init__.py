"""Texts as token ids and back, prompts as the model sees them, and what a tokenizer has."""
