"""Hybrid models: layers with a state of fixed size in place of attention, and snapshots of these states."""
