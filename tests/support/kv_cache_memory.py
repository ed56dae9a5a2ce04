"""How much memory a server in a test gets for its KV cache."""

import torch

from engine.loading import choose_dtype


def kv_cache_flag(mib: int) -> str:
    """Return the flag for a KV cache of `mib` MiB in bfloat16.

    On a processor that computes in float32, it has twice the size, and so holds the same number of tokens.
    """
    return f"--kv-cache-memory={mib * choose_dtype('auto', torch.device('cpu')).itemsize // 2}MiB"
