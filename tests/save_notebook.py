"""Runs washingdpodata.ipynb from top to bottom as it ships, without the Hub, and saves it with its outputs.

    python tests/save_notebook.py

Its sources' fingerprint goes into the notebook's metadata, so that tests/test_notebook.py sees outputs of other cells.
"""

import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import nbclient
import nbformat

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "washingdpodata.ipynb"


def fingerprint(notebook: nbformat.NotebookNode) -> str:
    """Of all code that there is to run."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def main() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    made = ROOT / "pairs"
    if made.exists():
        sys.exit(f"{made} is in the way: the notebook makes it here")
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": folder}
        nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    shutil.rmtree(made)
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        cell.metadata.pop("execution", None)
        # Progress bars, and warnings of whatever is installed here.
        cell.outputs = [output for output in cell.get("outputs", ()) if output.get("name") != "stderr"]
    notebook.metadata["sources_sha256"] = fingerprint(notebook)
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
