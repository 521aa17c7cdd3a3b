"""The Lightning module and what happens around its steps: logs, a report, checkpoints, held-out evaluation, the end of a run.

May import: base, files, settings, data, report, batches, devices, model, tuning, objective, evaluation, optimizer, run_folder, numpy,
torch, pytorch_lightning, deepspeed, tqdm, wandb, typing_extensions.
Must not enter: the command line, and how a run is assembled.
"""
