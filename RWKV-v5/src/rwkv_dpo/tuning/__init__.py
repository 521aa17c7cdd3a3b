"""What --peft trains in place of all weights: adapters and states, their files, merging them into a checkpoint.

May import: base, files, settings, batches, model, torch, peft.
Must not enter: losses, and what trains.
"""
