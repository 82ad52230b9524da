"""Execute the notebooks of the documentation: ``python docs/run_notebooks.py`` writes docs/notebooks/*.ipynb.

Each notebook says what must have run before. Their outputs are committed; a test compares them with a new execution.
"""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent / "notebooks"


def execute(path: Path, folder: Path) -> nbformat.NotebookNode:
    """Return a notebook with new outputs.

    Args:
        path: Notebook.
        folder: Current folder of the notebook's process.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    # Times and parts of streams would differ each time.
    settings = {"kernel_name": "python3", "timeout": 600, "record_timing": False, "coalesce_streams": True}
    NotebookClient(notebook, resources={"metadata": {"path": str(folder)}}, **settings).execute()
    notebook.metadata.language_info = {"name": "python"}  # the version of Python is no result
    return notebook


def main() -> None:
    """Execute all notebooks in place."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        nbformat.write(execute(path, FOLDER), path)


if __name__ == "__main__":
    main()
