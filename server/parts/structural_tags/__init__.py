"""Structural tags, which `server.constrained.constraints` loads by name."""
