"""How weights move, and how long: AdamW, learning rates by step, the number of steps.

May import: base, settings, torch, deepspeed.
Must not enter: models, losses, Lightning.
"""
