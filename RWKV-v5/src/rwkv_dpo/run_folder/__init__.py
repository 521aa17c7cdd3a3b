"""--proj_dir: whose run it is, what it holds, who has it, and from what a run goes on.

May import: base, files, settings, optimizer, torch.
Must not enter: models, Lightning.
"""
