"""A run from its command line to its end: flags, the rules between them, and the assembler, the only module that knows all rooms.

May import: base, files, settings, data, report, batches, kernels, devices, machine, model, tuning, objective, optimizer, run_folder,
training, memory, numpy, torch, pytorch_lightning, yaml.
Must not enter: work of its own: what can be done with the settings of one room is done there.
"""
