"""Bounds on what hostile clients and files take, which the core loads by name."""
