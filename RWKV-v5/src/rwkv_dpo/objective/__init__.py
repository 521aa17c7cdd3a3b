"""From a micro-batch to a loss and its gradient: losses as pure functions, a step at once or in chunks.

May import: settings, batches, kernels, model, torch.
Must not enter: optimizers, files.
"""
