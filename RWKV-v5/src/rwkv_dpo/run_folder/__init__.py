"""--proj_dir: which run it belongs to, what it holds, which process uses it, and what a run continues from.

May import: base, files, settings, optimizer, torch.
Must not enter: models, Lightning.
"""
