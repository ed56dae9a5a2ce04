"""How much memory a server in a test gets for its KV cache."""

import torch

from engine.loading import choose_dtype


def kv_cache_flag(mib: int) -> str:
    """For as many tokens as so many MiB hold in bfloat16, also where a processor computes in float32."""
    return f"--kv-cache-memory={mib * choose_dtype('auto', torch.device('cpu')).itemsize // 2}MiB"
