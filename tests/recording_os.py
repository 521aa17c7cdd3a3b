"""A stand-in for the module os that keeps a record of what reaches the disk."""

import os
from pathlib import Path


class RecordingOS:
    """The module os, with a record of what moves a name or flushes: what a power cut would leave follows from their order."""

    def __init__(self):
        self.record: list[tuple] = []

    def __getattr__(self, name):
        return getattr(os, name)

    def fsync(self, descriptor):
        status = os.fstat(descriptor)
        self.record.append(("fsync", status.st_ino, status.st_size))
        os.fsync(descriptor)

    def replace(self, old, new):
        self.record.append(("rename", Path(new).name))
        os.replace(old, new)

    def rename(self, old, new):
        self.record.append(("rename", Path(new).name))
        os.rename(old, new)
