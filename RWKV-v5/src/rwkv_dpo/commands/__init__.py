"""The commands: one module each, from its command line to what it prints, and the entry point of all of them.

May import: base, files, data, batches, report, devices, machine, model, tuning, objective, evaluation, blind, run, numpy, tqdm,
prompt_toolkit, pytorch_lightning, argcomplete.
Must not enter: work that another command, or a test, might need without a command line.
"""
