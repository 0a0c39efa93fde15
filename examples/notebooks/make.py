"""Write the notebooks: the examples, whose `# %%` lines begin a cell each, and the tutorial, executed.

make notebooks        (needs the extras `notebooks`, `demo`, `export` and the word embeddings)

A notebook has the code of its program, but for the last cell: it calls `main` with the arguments below, as those of the
command line are Jupyter's own.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
PROGRAMS = {
    "anomaly_detector": "main()",
    "index_in_a_model": "main()",
    "knn_head": "main()",
    "nearest_words": '_ = main(["king", "-", "man", "+", "woman"])',
}


def notebooks() -> dict[str, nbformat.NotebookNode]:
    """Every notebook by its name, not executed."""
    tutorial = (HERE.parents[1] / "docs" / "tutorial.md").read_text(encoding="utf-8")
    made = {"tutorial": jupytext.reads(re.sub(r"\]\((?!https?:)", "](../../docs/", tutorial), fmt="md")}
    for name, call in PROGRAMS.items():
        made[name] = jupytext.read(HERE.parent / f"{name}.py")
        made[name].cells[-1].source = call
    return made


def execute(notebook: nbformat.NotebookNode) -> None:
    """Run the cells in an empty folder and keep what they print, but no notices; nothing in it tells when that was."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, resources=resources, record_timing=False).execute()
    notebook.metadata.language_info = {"name": "python"}
    for number, cell in enumerate(notebook.cells, 1):
        cell.id, cell.metadata = f"cell-{number}", {}
        printed = "".join(output.text for output in cell.get("outputs", ()) if output.get("name") == "stdout")
        if cell.cell_type == "code":
            cell.outputs = [nbformat.v4.new_output("stream", text=printed)] if printed else []


def main() -> None:
    for name, notebook in notebooks().items():
        execute(notebook)
        nbformat.write(notebook, HERE / f"{name}.ipynb")
        print(f"wrote examples/notebooks/{name}.ipynb")


if __name__ == "__main__":
    main()
