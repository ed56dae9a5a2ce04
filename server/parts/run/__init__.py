"""Serves a model and chats with it: a command."""
