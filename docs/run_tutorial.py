"""Runs the tutorial and keeps what its cells show.

> python docs/run_tutorial.py
"""

import pathlib

import nbformat
from nbclient import NotebookClient

TUTORIAL = pathlib.Path(__file__).with_name("tutorial.ipynb")


def execute(folder, settings=""):
    """Runs all cells, in a kernel of their own.

    Arguments
    ---------
    folder : str or pathlib.Path
        The kernel's working folder.
    settings : str
        Python that comes after the tutorial's settings, to change them.

    Returns
    -------
    nbformat.NotebookNode
        The notebook with its outputs.

    Raises
    ------
    nbclient.exceptions.CellExecutionError
        At the first cell that fails.
    """
    notebook = nbformat.read(TUTORIAL, as_version=4)
    (cell,) = (
        cell
        for cell in notebook.cells
        if "parameters" in cell.metadata.get("tags", ())
    )
    cell.source += settings
    client = NotebookClient(
        notebook,
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    return client.execute()


def tidy(notebook):
    """Leaves out progress bars, and what hangs on the machine."""
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        kept = []
        for output in cell.outputs:
            if output.get("name") == "stderr":
                continue
            if kept and kept[-1].output_type == output.output_type == "stream":
                kept[-1].text += output.text  # a bar had come in between
            else:
                kept.append(output)
        cell.outputs = kept
    notebook.metadata.language_info = {"name": "python"}


if __name__ == "__main__":
    done = execute(TUTORIAL.parent)
    tidy(done)
    nbformat.write(done, TUTORIAL)
