"""How a room declares its settings: a flag's help, what it accepts, and what it is to a run's identity.

May import: base.
Must not enter: any setting: each stands in the settings.py of the room that reads it.
"""
