"""Tile sizes of weights."""

from engine.kernels.triton.tiles import TABLE


def test_tiles_of_shapes() -> None:
    """Tiles for the weights of Llama-3-8B and SmolLM2 on an H100."""
    expected = {
        (6144, 4096): (128, 2),
        (4096, 4096): (128, 4),
        (28672, 4096): (128, 1),
        (4096, 14336): (128, 4),
        (128256, 4096): (128, 1),
        (960, 576): (64, 1),
        (576, 1536): (64, 1),
    }
    for shape, (columns, splits) in expected.items():
        tiles = TABLE[9, 0].linear_for(*shape)
        assert (tiles.columns, tiles.splits) == (columns, splits), shape
