"""From tar shards to micro-batches: index (shards), order, reading (stream), decoding, views, loaders. Start at `loader.py`.

Nothing is imported here: `data/shards.py` serves programs that have no use for torch.
"""
