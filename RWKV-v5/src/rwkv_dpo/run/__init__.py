"""A run from its command line to its end: flags, the rules between them, and the assembler, which alone knows all rooms.

May import: everything. Must not enter: work of its own; whatever can be done with the settings of one room is done there.
"""
