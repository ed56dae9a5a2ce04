"""Measures a server under load: a command."""
