"""What is named of the values of a layer. What layers do is tested in `test_inspector.py`."""

import torch

from engine.inspection.layers import top_pairs


def test_a_certain_token_is_named() -> None:
    """Its log probability is 0."""
    logits = torch.full((1, 4), float("-inf"))
    logits[0, 2] = 3.0
    assert top_pairs(logits.log_softmax(dim=-1), 3) == [[(2, 0.0)]]


def test_positions_without_a_weight_are_not_named() -> None:
    assert top_pairs(torch.tensor([[0.75, 0.0, 0.25]]), 3, above=0.0) == [[(0, 0.75), (2, 0.25)]]
