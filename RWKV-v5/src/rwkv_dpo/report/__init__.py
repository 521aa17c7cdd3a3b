"""What preparation tells of preference data: its figures, what looks wrong with them, a table and a page.

May import: data, jinja2, datasketch, numpy.
Must not enter: models, torch; decisions of what is kept.
"""
