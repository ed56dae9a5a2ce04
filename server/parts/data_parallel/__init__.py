"""Data parallelism (--data-parallel-size): several engines with the same model, each with some of the requests."""
