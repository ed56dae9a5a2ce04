"""The properties of an engine, as its process reports them."""

import os

from engine.shared.messages import EngineInfo

ENGINE_INFO = EngineInfo(
    pid=os.getpid(),
    max_model_len=2048,
    max_num_seqs=8,
    block_size=32,
    num_blocks=100,
    vocab_size=259,
    device="cpu",
    dtype="float32",
    kernels="reference",
    deterministic=True,
    fingerprint="fp",
)
