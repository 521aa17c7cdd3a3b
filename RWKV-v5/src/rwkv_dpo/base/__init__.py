"""What any command needs before it does anything: its command line, errors in one line, signals, progress.

May import: tqdm.
Must not enter: anything that knows about files, models or settings.
"""
