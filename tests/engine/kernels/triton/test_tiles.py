"""Tiles of products, by card, shape of the weights and number of rows."""

import pytest

from engine.kernels.triton.tiles import MAX_SPLIT_SUMS, TABLE, LinearTable, LinearTiles

# Weights of Llama-3-8B and -70B, Llama-3.2-1B and SmolLM2: outputs and inputs.
SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)]
SHAPES += [(10240, 8192), (57344, 8192), (3072, 2048), (2048, 8192), (960, 576), (576, 1536)]
TABLES = [
    pytest.param(table, id=f"{card} {kind}")
    for card, tiles in TABLE.items()
    for kind, table in (("plain", tiles.linear), ("packed", tiles.packed_linear))
]


def sizes_of(tiles: LinearTiles, *nums_rows: int) -> list[tuple[int, int]]:
    """Return rows and columns of the tile for each number of rows."""
    return [(tiles.tile_for(num_rows).rows, tiles.tile_for(num_rows).columns) for num_rows in nums_rows]


def test_tiles_of_shapes() -> None:
    """Tiles of an H100 for 1, 32, 33, 64, 65, 256 and 8192 rows."""
    expected = {
        (6144, 4096): [(64, 64)] * 4 + [(64, 128), (128, 128), (128, 256)],
        (4096, 4096): [(64, 32)] * 2 + [(64, 64)] * 3 + [(64, 128), (128, 256)],
        (28672, 4096): [(64, 128)] * 4 + [(128, 256)] * 3,
        (128256, 4096): [(64, 128)] * 4 + [(128, 256)] * 3,
    }
    for shape, sizes in expected.items():
        tiles = TABLE[9, 0].linear_for(*shape, is_packed=False)
        assert sizes_of(tiles, 1, 32, 33, 64, 65, 256, 8192) == sizes, shape
        assert tiles.splits == 1


@pytest.mark.parametrize("table", TABLES)
def test_tiles_fill_the_card(table: LinearTable) -> None:
    """Those that follow the smallest are enough, or follow one that is too narrow; many rows have the largest."""
    for shape in SHAPES:
        tiles = table.tiles_for(*shape)
        starts = [first for first, _ in tiles.tiles]
        assert starts == sorted(set(starts))
        assert starts[0] == 1
        for first, tile in tiles.tiles[1:]:
            num_tiles = -(-first // tile.rows) * -(-shape[0] // tile.columns)
            assert num_tiles * tiles.splits >= table.programs or first == 33
        widest = [tile for tile in table.tiles if tiles.splits == 1 or tile.sums_per_thread <= MAX_SPLIT_SUMS]
        assert tiles.tile_for(10**5) == widest[-1]


@pytest.mark.parametrize("table", TABLES)
def test_only_weights_with_few_outputs_are_split(table: LinearTable) -> None:
    for num_outputs, num_inputs in SHAPES:
        tiles = table.tiles_for(num_outputs, num_inputs)
        num_tiles = -(-num_outputs // table.tiles[0].columns)
        assert tiles.splits == 1 or num_tiles * tiles.splits // 2 < table.programs
        assert num_tiles * tiles.splits >= table.programs or num_inputs < 2048 * tiles.splits
        assert tiles.splits == 1 or num_inputs >= 1024 * tiles.splits
