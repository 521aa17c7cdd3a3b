"""From people's files to tokens: forms of preference data, prompts, the tokenizer, pair files, corpora.

May import: base, files, settings, numpy, pyarrow, datasets, pyrwkv_tokenizer, torch.
Must not enter: micro-batches, and torch except for
writing the original's pair files.
"""
