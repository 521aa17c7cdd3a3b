"""What this machine has to run on (GPUs, compilers, kernels, memory, disk), what is wrong with it, and what to do about that.

May import: files, kernels, devices, torch.
Must not enter: models, data, what a run is set to.
"""
