"""The engine of Lightwell: token ids in, token ids out. No text, no HTTP."""
