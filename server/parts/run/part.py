"""Serves a model and chats with it: a command."""

from server.part import Part

PART = Part()
