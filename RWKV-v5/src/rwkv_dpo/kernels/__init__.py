"""Operations with gradients of their own: a folder a recurrence, a file a backend, what backends share once; the head's log-probabilities;
how C++ and CUDA sources become libraries.

May import: base, files, torch. Must not enter: forests, layers, flags.
"""
