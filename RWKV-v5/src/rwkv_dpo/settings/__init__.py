"""How a room declares its settings: a flag's help, what it accepts, and its part in a run's identity.

May import: base.
Must not enter: any setting: each is in the settings.py of the room that reads it.
"""
