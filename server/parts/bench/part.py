"""Measures a server under load: a command."""

from server.part import Part

PART = Part()
