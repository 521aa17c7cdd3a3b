"""What preparation tells of preference data, and training of itself: figures, what looks wrong with them, a table, pages, a picture.

May import: data, jinja2, datasketch, numpy, matplotlib.
Must not enter: models, torch; files of a run; decisions of what is kept.
"""
