"""Continuous batching on one patched model: what runs in a step, the step itself, the pages, the choice of tokens.

One thread at a time calls it; nothing in here knows of threads, or of transformers' requests and results.
"""
