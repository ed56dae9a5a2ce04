"""Mutations of model files: numbers of the header, bytes, lengths, and values of JSON."""

import random

from tests.fuzz.hostile_values import JSON_VALUES, GGUFImage, json_places, with_json_value

# Numbers that counts, sizes, offsets and types are replaced with.
NUMBERS = (0, 1, 2, 3, 7, 8, 9, 31, 32, 33, 127, 128, 255, 256, 65_535, 65_536, 1 << 20, (1 << 24) + 1, (1 << 31) - 1)
LARGE_NUMBERS = (1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, (1 << 62) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def mutate_gguf(image: GGUFImage, rng: random.Random) -> bytes:
    """Change one to three things in the header of a GGUF file, or its length."""
    changed = bytearray(image.data)
    for _ in range(rng.randint(1, 3)):
        kind = rng.random()
        if kind < 0.6:
            position, size = rng.choice(image.numbers_at)
            old = int.from_bytes(changed[position : position + size], "little")
            new = rng.choice((rng.choice(NUMBERS), rng.choice(LARGE_NUMBERS), old + 1, old - 1, old * 2, old // 2))
            changed[position : position + size] = (new % (1 << 8 * size)).to_bytes(size, "little")
        else:
            changed = mutate_bytes(changed, image.end, rng)
    return bytes(changed)


def mutate_bytes(data: bytearray, end: int, rng: random.Random) -> bytearray:
    """Change, insert, remove or cut bytes before `end`."""
    position = rng.randrange(min(end, len(data)) or 1)
    num = rng.choice((1, 1, 2, 4, 8, 100))
    match rng.randrange(5):
        case 0:
            data[position : position + 1] = bytes([data[position] ^ 1 << rng.randrange(8)])
        case 1:
            data[position : position + num] = rng.randbytes(num)
        case 2:
            data[position:position] = rng.randbytes(num)
        case 3:
            del data[position : position + num]
        case _:
            data = data[: rng.randrange(len(data))] if rng.random() < 0.3 else data + rng.randbytes(num)
    return data


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Replace values of a JSON text, or change its bytes."""
    if rng.random() < 0.1:
        return bytes(mutate_bytes(bytearray(data), len(data), rng))
    for _ in range(rng.randint(1, 3)):
        if places := list(json_places(data)):
            data = with_json_value(data, rng.choice(places), rng.choice(JSON_VALUES))
    return data


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Change the header of a safetensors file: its length, its JSON or its bytes."""
    length = int.from_bytes(data[:8], "little")
    header, tensors = data[8 : 8 + length], data[8 + length :]
    kind = rng.random()
    if kind < 0.15:
        return rng.choice((*NUMBERS, *LARGE_NUMBERS, length - 1, length + 1)).to_bytes(8, "little") + data[8:]
    if kind < 0.7:
        header = mutate_json(header, rng)
        header += b" " * (-len(header) % 8)
        return len(header).to_bytes(8, "little") + header + tensors
    return bytes(mutate_bytes(bytearray(data), 8 + length, rng))
