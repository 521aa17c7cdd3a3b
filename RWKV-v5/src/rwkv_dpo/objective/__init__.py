"""From a micro-batch to a loss and its gradient: losses as pure functions, the step at once or in chunks.

May import: base, settings, batches, kernels, model, torch. Must not enter: optimizers, Lightning, files.
"""
