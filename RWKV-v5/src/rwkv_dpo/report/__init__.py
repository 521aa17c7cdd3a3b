"""What preparation tells of preference data: its figures, what looks wrong with them, a table and a page. The table and the picture of an
evaluation, of figures that it is given.

May import: data, jinja2, datasketch, matplotlib, numpy.
Must not enter: models, torch; decisions of what is kept.
"""
