"""Operations with gradients of their own: a folder a recurrence and a file a backend, with what backends share; the head's
log-probabilities; how C++ and CUDA sources become libraries.

May import: base, files, torch.
Must not enter: forests, layers, settings.
"""
