"""What a caller of a patched model types, in transformers' own words: generate, generate_batch, the manager."""
