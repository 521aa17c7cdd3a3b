"""Two models judged blind by people: questions, answers under drawn sides, votes, the page and the terminal that ask, the result.

May import: base, files, data, model, objective, evaluation, torch, aiohttp, scipy.
Must not enter: Lightning; anything of which model is which into what is shown before the end.
"""
