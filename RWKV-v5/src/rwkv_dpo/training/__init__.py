"""The Lightning module and what happens around its steps: logs, checkpoints, held-out pairs, bad steps, ends.

May import: all rooms before it, Lightning, wandb. Must not enter: flags, and how a run is put together.
"""
