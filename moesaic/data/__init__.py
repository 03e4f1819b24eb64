"""From text to batches: corpus, sources, tokenizer, prepare (token shards), shards, loader.

Nothing here knows a model. Only loader.py imports torch; each name is imported from its own module.
"""
