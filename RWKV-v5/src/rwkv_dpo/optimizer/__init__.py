"""How weights move: AdamW and its states, learning rates by step, and how many steps a run has.

May import: base, settings, torch. Must not enter: models, losses, Lightning.
"""
