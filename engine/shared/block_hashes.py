"""The hashes by which blocks of cached prefixes are found. The API process uses their first bytes, as names."""

import hashlib
import struct
from collections.abc import Sequence

ROOT = b"lightwell.prefix"
HASH_BYTES = 32
STATE_SUFFIX = b"state"  # of the hashes of snapshots, after that of the prefix
NAME_BYTES = 8  # two prefixes with the same name would only send a request to a less suitable engine


def extend_block_hashes(
    block_hashes: list[bytes],
    token_ids: Sequence[int],
    block_size: int,
    salt: bytes = b"",
    num_prompt_tokens: int | None = None,
) -> None:
    """Append the chained SHA-256 hash of each full block of `token_ids` that `block_hashes` lacks.

    A hash covers the salt and all tokens up to the block's end, so equal hashes mean equal keys and values. Pass
    `num_prompt_tokens` if keys and values also depend on which tokens are prompt; the hash then covers it too.
    """
    for index in range(len(block_hashes), len(token_ids) // block_size):
        parent = block_hashes[-1] if block_hashes else hashlib.sha256(ROOT + salt).digest()
        tokens = token_ids[index * block_size : (index + 1) * block_size]
        if num_prompt_tokens is not None and index == num_prompt_tokens // block_size:
            parent += struct.pack("<I", num_prompt_tokens % block_size)
        block_hashes.append(hashlib.sha256(parent + struct.pack(f"<{block_size}I", *tokens)).digest())


def prefix_salt(lora_fingerprint: str, cache_salt: str) -> bytes:
    """Return the salt of the block hashes of a request.

    Keys and values that were computed with other weights must not match. The byte before an adapter's fingerprint
    occurs in no UTF-8 text, so no salt of a client (`cache_salt`) is equal.
    """
    adapter = b"\xff" + bytes.fromhex(lora_fingerprint) if lora_fingerprint else b""
    return adapter + cache_salt.encode()


def is_prefix(block_hash: bytes) -> bool:
    """Return whether a block's hash is that of a prefix in the first KV group."""
    return len(block_hash) == HASH_BYTES


def name_of(block_hash: bytes) -> bytes:
    """Return the name of a prefix."""
    return block_hash[:NAME_BYTES]


def prefix_names(token_ids: Sequence[int], block_size: int, salt: bytes) -> list[bytes]:
    """Return the names of the prefixes of a prompt that can be cached: those that end with a block."""
    block_hashes: list[bytes] = []
    extend_block_hashes(block_hashes, token_ids, block_size, salt)
    return [name_of(block_hash) for block_hash in block_hashes]
