"""Structural tags, which `server.schemas.structured_outputs` and `server.constrained.constraints` load by name."""
