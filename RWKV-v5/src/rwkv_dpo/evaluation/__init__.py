"""What a model makes of data without training: log-probabilities, accuracy, generated text, reference scores.

May import: all rooms up to objective. Must not enter: optimizers, Lightning.
"""
