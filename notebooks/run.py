"""Execute notebooks and write them as they are committed.

    python notebooks/run.py          all notebooks of this folder
    python notebooks/run.py 02 00    those whose names begin so
    python notebooks/run.py --links  none: only writes the links below their titles
    python notebooks/run.py --clear FOLDER  none: copies all for a class, see below

Each one is run from top to bottom in a new kernel and then scrubbed of all that another
run would change: widget state (with it, web viewers show "Invalid Notebook"), views of
widgets, times, random cell ids, versions. A second run changes no line. The links lead
to the notebooks before and after, so a new one also changes its neighbours.

The copy for a class has all that the lessons need, but no outputs: these would give
away the answers to the PREDICT questions. In a workflow of GitHub, which sets
GITHUB_REPOSITORY to OWNER/NAME, it can also be opened on Colab and on Binder, once it
is the branch "class" of that repository: see .github/workflows/course.yml.
"""

import os
import shutil
import sys
import time
from pathlib import Path

import nbformat
from ipykernel.ipkernel import IPythonKernel
from jupyter_client.kernelspec import get_kernel_spec
from nbclient import NotebookClient

HERE = Path(__file__).parent
ROOT = HERE.resolve().parent
COLAB = """\
# On Colab this fetches the course, and what Colab lacks; anywhere else it does nothing.
import os
import sys

if "google.colab" in sys.modules and not os.path.exists("show.py"):
    !git clone --quiet --branch class https://github.com/{} course
    %pip install --quiet tyro
    %cd course/notebooks
    os.environ["PLAYERS"] = "html"  # no ipywidgets of version 8 there"""
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


def cleared(path):
    """Return the notebook at path without outputs."""
    nb = nbformat.read(path, 4)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return nb


def execute(path, env=os.environ):
    """Return the notebook at path, run from top to bottom in a new kernel, scrubbed."""
    nb = cleared(path)
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(
        nb,
        timeout=300,
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],  # no word on encryption within a machine
        resources=where,
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
    ).execute(env=env)
    return scrub(nb)


def run(path):
    """Execute the notebook at path, scrub and write it; return the seconds it took."""
    clock = time.perf_counter()
    nbformat.write(execute(path), path)
    return time.perf_counter() - clock


def kernel():
    """Return the metadata that JupyterLab writes into a notebook when it opens it here.

    It names the version of Python. So a notebook from another machine is marked as
    modified as soon as it is opened, and a copy for a class should have this.
    """
    spec = get_kernel_spec("python3").to_dict()
    spec = {key: spec[key] for key in ("display_name", "language")}
    language = IPythonKernel.language_info
    return {"kernelspec": {"name": "python3", **spec}, "language_info": language}


def copy_for_class(folder):
    """Copy the repository to a new folder, its notebooks without outputs."""
    folder = folder.resolve()
    if folder.exists() or folder.is_relative_to(ROOT):
        sys.exit("run.py: --clear wants a new folder, outside of the repository")
    other = shutil.ignore_patterns(".*", "runs", "data", "site", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=other)
    repository = os.environ.get("GITHUB_REPOSITORY")
    if repository:
        (folder / "runtime.txt").write_text("python-3.11\n")  # for Binder
    for path in folder.glob("notebooks/*.ipynb"):
        nb = cleared(path)
        nb.metadata = kernel()
        if repository:
            fetch = nbformat.v4.new_code_cell(COLAB.format(repository), id="colab")
            nb.cells.insert(1, fetch)
        nbformat.write(nb, path)


def way(path):
    """Return the line that links the notebook at path to those before and after it."""
    names = sorted(other.name for other in path.parent.glob("[0-9]*.ipynb"))
    k = names.index(path.name)
    targets = {
        "previous": names[k - 1] if k else "",
        "contents": names[0] if k else "",
        "glossary": "glossary.md",
        "next": "".join(names[k + 1 : k + 2]),
    }
    return " · ".join(f"[{word}]({name})" for word, name in targets.items() if name)


def link(path):
    """Write way(path) below the title of the notebook at path, where it differs."""
    nb = nbformat.read(path, 4)
    title, *rest = nb.cells[0].source.split("\n\n")
    old = "[glossary](glossary.md)" in "".join(rest[:1])
    source = "\n\n".join([title, way(path), *rest[old:]])
    if source != nb.cells[0].source:
        nb.cells[0].source = source
        nbformat.write(nb, path)


def choose(names):
    """Return the notebooks whose names begin so; exit if one of the names has none."""
    paths = sorted(HERE.glob("*.ipynb"))
    wrong = [x for x in names if not any(path.name.startswith(x) for path in paths)]
    if wrong:
        program = Path(sys.argv[0]).name
        sys.exit(f"{program}: no notebook here begins with {' or '.join(wrong)}")
    return [path for path in paths if path.name.startswith(tuple(names))]


def main():
    words = sys.argv[1:]
    if len(words) == 2 and words[0] == "--clear":
        return copy_for_class(Path(words[1]))
    if {"-h", "--help", "--clear"} & {*words}:
        return print(__doc__.strip())
    names = [word for word in words or [""] if word != "--links"]
    for path in choose(names):
        seconds = run(path)
        size = path.stat().st_size / 1e3
        print(f"{path.name:32} {seconds:5.0f} s {size:6.0f} kB", flush=True)
    for path in HERE.glob("[0-9]*.ipynb"):
        link(path)


if __name__ == "__main__":
    main()
