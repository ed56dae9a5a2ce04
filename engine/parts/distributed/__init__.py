"""Tensor parallelism: one model in several processes (ranks), each of which has a part of every layer's weights.

All ranks run each step, so that their hidden states are the same. Rank 0 is the engine process: it alone schedules and
samples. The decoder does not know: each rank builds it from the shape and the weights of its part (`plan`), and then
`parallelize` replaces the modules whose results are to be added up.
"""
