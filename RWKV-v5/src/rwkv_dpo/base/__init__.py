"""What any command needs before it does anything: faults in one line, signals, missing packages.

May import: the standard library. Must not enter: anything that knows of files, models or flags.
"""
