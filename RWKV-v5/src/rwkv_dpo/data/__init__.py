"""From people's files to tokens: forms of preference data, prompts, the tokenizer, pair files, corpora.

May import: base, files, settings, numpy. Must not enter: torch, batches, and anything that trains.
"""
