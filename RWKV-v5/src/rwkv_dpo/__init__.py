"""Direct Preference Optimization for RWKV language models. Each folder is a room; its first lines say what belongs in it."""

__version__ = "0.1.0"
