"""How a room declares its settings: a flag's help, choices, range, and what it means to a run's identity.

May import: base. Must not enter: any setting. Each stands in the `settings.py` of the room that reads it.
"""
