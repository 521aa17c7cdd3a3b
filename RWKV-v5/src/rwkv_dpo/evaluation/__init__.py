"""What a model makes of data without training: log-probabilities, accuracy, text, reference scores.

May import: base, files, data, batches, kernels, devices, model, tuning, objective, numpy, torch.
Must not enter: optimizers, Lightning.
"""
