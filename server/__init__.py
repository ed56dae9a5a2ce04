"""The API server: HTTP, text processing and the command line around the engine. Does not import torch."""
