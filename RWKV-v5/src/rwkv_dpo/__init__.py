"""Direct Preference Optimization for RWKV language models. Each folder is a room; its first lines say what belongs into it."""
