"""What any command needs before it does anything: its command line, faults in one line, signals, how far it is.

May import: tqdm.
Must not enter: anything that knows of files, models or settings.
"""
