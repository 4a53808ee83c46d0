"""A transformers model as the engine sees it: attention on pages, sizes of layers, experts, weights over chips.

Nothing in here knows of requests, steps or threads.
"""
