"""What preparation tells of preference data, training of itself and an evaluation of its figures: tables, pages, pictures, and what looks
wrong.

May import: data, jinja2, datasketch, numpy, matplotlib.
Must not enter: models, torch; files of a run; decisions of what is kept.
"""
