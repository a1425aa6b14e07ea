"""Execute notebooks and write them as they are committed.

    python notebooks/run.py          all notebooks of this folder
    python notebooks/run.py 02 00    those whose names begin so

Each one is run from top to bottom in a new kernel and then scrubbed of all that another
run would change: widget state (with it, web viewers show "Invalid Notebook"), views of
widgets, times, random cell ids, versions. A second run changes no line.
"""

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
VIEW = "application/vnd.jupyter.widget-view+json"


def scrub(nb):
    """Take out of nb what only the last run knows; pictures and text stay."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nb.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    nb.nbformat, nb.nbformat_minor = 4, 5
    for k, cell in enumerate(nb.cells):
        tags = cell.metadata.get("tags")
        cell.id, cell.metadata = f"c{k:02}", {"tags": tags} if tags else {}
        if cell.cell_type == "code":
            cell.outputs = [out for out in map(scrub_output, cell.outputs) if out]
    return nbformat.from_dict(nb)


def scrub_output(out):
    """Return an output without widgets and metadata, or None if nothing is left."""
    if "data" not in out:
        return out
    out.metadata = {}
    is_widget = out.data.pop(VIEW, None)
    return None if is_widget and out.data.keys() <= {"text/plain"} else out


def run(path):
    """Execute the notebook at path, scrub and write it; return the seconds it took."""
    nb = nbformat.read(path, 4)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    where = {"metadata": {"path": str(path.parent)}}
    clock = time.perf_counter()
    NotebookClient(
        nb,
        timeout=300,
        kernel_name="python3",
        resources=where,
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
    ).execute()
    seconds = time.perf_counter() - clock
    nbformat.write(scrub(nb), path)
    return seconds


def main():
    names = sys.argv[1:] or [""]
    paths = [path for name in names for path in sorted(HERE.glob(f"{name}*.ipynb"))]
    if not paths:
        sys.exit(f"run.py: no notebook here begins with {' or '.join(names)}")
    for path in paths:
        seconds = run(path)
        size = path.stat().st_size / 1e3
        print(f"{path.name:32} {seconds:5.0f} s {size:6.0f} kB", flush=True)


if __name__ == "__main__":
    main()
