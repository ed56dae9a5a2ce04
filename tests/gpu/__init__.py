"""On a CUDA device: `pytest -m gpu`. Elsewhere these tests are skipped."""
