"""The notebooks: their form, links, results and exercises, and players in a browser.

Under --all each notebook is executed once, solutions included, by nbval on a copy of
the repository, two at a time. Meanwhile JupyterLab and Chromium open two of them, which
stand for all: one player shows bare pictures, the others matplotlib's figures.
"""

import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from urllib.parse import urlsplit
from urllib.request import urlopen

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "notebooks"))
import run
import show

PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BOOKS = {path.stem: nbformat.read(path, 4) for path in PATHS}
PLAYER = "player("
UNANSWERED = re.compile(r"^answer = \.\.\.", re.M)
CHECKED = "nbval-check-output"

each = pytest.mark.parametrize("name", BOOKS)


def code(nb):
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def pictures(cell):
    return [
        out for out in cell.get("outputs", []) if "image/png" in out.get("data", {})
    ]


# ---- Form ----------------------------------------------------------------------------
@each
def test_a_notebook_is_committed_as_run_py_writes_it(name):
    """Executed from top to bottom, no errors or warnings, no trace of widgets."""
    nb = BOOKS[name]
    path = ROOT / "notebooks" / f"{name}.ipynb"
    as_written = nbformat.writes(run.scrub(deepcopy(nb))) + "\n"
    assert path.read_text() == as_written, "not scrubbed: python notebooks/run.py"
    assert path.stat().st_size < 1.5e6
    counts = [cell.execution_count for cell in code(nb)]
    assert counts == [*range(1, len(counts) + 1)], "not executed from top to bottom"
    outputs = [out for cell in code(nb) for out in cell.outputs]
    assert not [out for out in outputs if out.output_type == "error"]
    assert not [out for out in outputs if out.get("name") == "stderr"]
    assert "widgets" not in nb.metadata and run.VIEW not in path.read_text()
    checked = [cell for cell in code(nb) if CHECKED in cell.metadata.get("tags", [])]
    assert all(cell.outputs for cell in checked), "nothing to check in a checked cell"
    exercises = [cell for cell in checked if UNANSWERED.search(cell.source)]
    assert len(checked) - len(exercises) >= 3
    for cell in checked:
        assert not pictures(cell), "nbval does not compare pictures: check text"


def test_what_only_one_run_knows_is_scrubbed():
    text, png = {"text/plain": "VBox()"}, {"image/png": "..."}
    view, new = {run.VIEW: {"model_id": "7"}}, nbformat.v4
    shown = [view | text, view | text | png, png]
    outputs = [new.new_output("display_data", x, metadata={"a": 1}) for x in shown]
    about = {"tags": [CHECKED], "execution": {"iopub.execute_input": "today"}}
    cell = new.new_code_cell("x", outputs=outputs, metadata=about)
    nb = run.scrub(new.new_notebook(cells=[cell], metadata={"widgets": {"state": {}}}))
    assert nb.metadata.keys() == {"kernelspec", "language_info"}
    assert nb.cells[0].id == "c00" and nb.cells[0].metadata == {"tags": [CHECKED]}
    assert [out.data for out in nb.cells[0].outputs] == [text | png, png]
    assert not any(out.metadata for out in nb.cells[0].outputs)


@each
def test_a_notebook_teaches_in_the_agreed_form(name):
    nb = BOOKS[name]
    first, last = nb.cells[0].source, nb.cells[-1].source
    assert first.startswith(f"# {name[:2]} ")
    for word in ("**Question**", "**Goal**", "**Needs**", "**Time**", "**Files**"):
        assert word in first, f"the head lacks {word}"
    assert re.search(r"\*\*Time\*\*.* \d+ (seconds|minutes?)", first)
    assert last.startswith("## What we saw\n")
    assert len(re.findall(r"^- ", last, re.M)) == 3
    assert (
        'ROOT = next(p for p in (Path.cwd() / "x").parents if (p' in code(nb)[0].source
    )
    assert "torch.set_num_threads(1)" in code(nb)[0].source
    for cell, before in zip(nb.cells[1:], nb.cells, strict=False):
        if cell.cell_type == "code":
            assert len(cell.source.splitlines()) <= 25, cell.source
            assert before.cell_type == "markdown", f"no text before:\n{cell.source}"
            if pictures(cell):
                assert "PREDICT" in before.source, f"no PREDICT:\n{cell.source}"
    assert sum("assert" in cell.source for cell in code(nb)) >= 5
    assert sum(bool(UNANSWERED.search(cell.source)) for cell in code(nb)) >= 2


def test_each_notebook_links_to_the_next():
    for name, following in zip(BOOKS, [*BOOKS][1:], strict=False):
        assert f"]({following}.ipynb)" in BOOKS[name].cells[-1].source, name


def links(nb):
    """Return the links in the text of a notebook, and in text that its cells show."""
    texts = [cell.source for cell in nb.cells if cell.cell_type == "markdown"]
    shown = [out.get("data", {}) for cell in code(nb) for out in cell.outputs]
    texts += [data["text/markdown"] for data in shown if "text/markdown" in data]
    found = re.findall(r"""\]\(([^)\s]+)|(?:href|src)=["']([^"']+)""", "\n".join(texts))
    return [one or other for one, other in found]


@each
def test_every_link_opens_in_a_lab_that_was_started_at_the_root(name):
    """Lab opens no folder, and nothing above the one that it was started in."""
    assert len(links(BOOKS[name])) > 3
    for link in links(BOOKS[name]):
        if not link.startswith("https://"):
            file = (ROOT / "notebooks" / link.split("#")[0]).resolve()
            assert file.is_file(), link
            inside = file.relative_to(ROOT).parts
            assert inside[0] not in ("runs", "data"), f"not in a new clone: {link}"


# ---- Exercises -----------------------------------------------------------------------
SOLUTION = re.compile(r"<details>.*?```python\n(.*?)\n```.*?</details>", re.S)


def solution(cell):
    """Return the code in the <details> of a markdown cell; without one, no answer."""
    found = SOLUTION.search(cell.source)
    return found[1] if found else "answer = ..."


ASK = """import contextlib, io
with contextlib.redirect_stdout(io.StringIO()) as said:
{}
print(said.getvalue()[:{}])"""


def asks(answer, cell, says):
    """Return an exercise cell with an answer put in; its text must begin with says."""
    source = UNANSWERED.sub(lambda _: answer, cell.source)
    source = ASK.format(textwrap.indent(source, "    "), len(says))
    out = nbformat.v4.new_output("stream", name="stdout", text=says + "\n")
    tags = {"tags": [CHECKED]}
    return nbformat.v4.new_code_cell(
        source, execution_count=1, outputs=[out], metadata=tags
    )


def answered(nb):
    """Return nb with each exercise asked twice more: a wrong answer, its solution."""
    cells = []
    for cell, after in zip(nb.cells, [*nb.cells[1:], None], strict=True):
        cells.append(cell)
        if cell.cell_type == "code" and UNANSWERED.search(cell.source):
            cells.append(asks("answer = -123.456", cell, "Not yet: "))
            cells.append(asks(solution(after), cell, "Right."))
    return nbformat.from_dict({**nb, "cells": cells})


def test_check_tells_right_from_wrong_and_from_unanswered(capsys):
    for answer, want, says in [
        (..., 1.0, "Not answered yet"),
        (0.995, 1.0, "Right."),
        (0.98, 1.0, "Not yet: think"),
        (0.0, 0, "Right."),
        ("b", "b", "Right."),
        (1, True, "Not yet: think"),
        (np.True_, True, "Right."),
        (torch.tensor(True), True, "Right."),
        (torch.tensor(1), True, "Not yet: think"),
        (torch.tensor([3, 4]), lambda answer: len(answer) == 2, "Right."),
        (3, lambda answer: answer > 2, "Right."),
        (1, lambda answer: answer(2) == 4, "Not yet: TypeError"),
        ("a", 1.0, "Not yet: ValueError"),
    ]:
        assert show.judge(answer, want, hint="think") is None
        assert capsys.readouterr().out.startswith(says)


@each
def test_the_exercises_keep_their_answers_out_of_sight(name):
    """In answers/NN.py, under the name of the exercise, each with a hint."""
    file = ROOT / "notebooks" / "answers" / f"{name[:2]}.py"
    known = runpy.run_path(str(file))["ANSWERS"]
    asked = [
        x
        for cell in code(BOOKS[name])
        for x in re.findall("check[(].*[)]", cell.source)
    ]
    named = [re.fullmatch(r'check\(answer, "(\d\d\.\d)"\)', x)[1] for x in asked]
    assert sorted(named) == sorted(known) != []
    assert all(len(answer["hint"]) > 10 for answer in known.values())


# ---- Figures -------------------------------------------------------------------------
@pytest.fixture
def axes(monkeypatch):
    """The axes of the figures that are shown."""
    seen = []
    monkeypatch.setattr(plt, "show", lambda: seen.append(plt.gca()))
    yield seen
    plt.close("all")


def test_the_mask_is_drawn_from_birth_to_end_in_the_order_of_births(axes):
    assert show.plot_mask([1, -1, 0, 1, 0], [30, -1, 0, 30, 0], 100) is None
    bars = {round(bar.get_y() + bar.get_height() / 2): bar for bar in axes[0].patches}
    spans = [(bars[y].get_x(), bars[y].get_width()) for y in range(5)]
    assert spans == [(0, 100), (0, 100), (30, 70), (30, 70), (100, 0)]
    legend = axes[0].figure.legends[0].get_texts()
    said = [text.get_text() for text in legend]
    assert said == ["born in stage 0: 2", "born in stage 1: 2", "not born: 1"]


def test_the_norms_are_drawn_sorted_a_curve_a_layer(axes):
    assert show.plot_norms({"a": [3.0, 1.0, 2.0], "b": [0.0, 5.0]}) is None
    curves = {line.get_label(): line.get_ydata().tolist() for line in axes[0].lines}
    assert curves == {"a": [1, 2, 3], "b": [0, 5]}


# ---- Execution -----------------------------------------------------------------------
@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """A copy of the repository without results of runs, and an environment for it."""
    base = tmp_path_factory.mktemp("site")
    ignore = shutil.ignore_patterns(".*", "runs", "data", "__pycache__", "*.ipynb")
    shutil.copytree(ROOT, base / "repo", ignore=ignore)
    for name, nb in BOOKS.items():
        nbformat.write(answered(nb), base / "repo" / "notebooks" / f"{name}.ipynb")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "IPYTHONDIR": str(base / "ipython")}
    env.pop("PYTHONPATH", None)  # a notebook has to find the scripts by itself
    for kind in ("JUPYTER_CONFIG", "JUPYTER_RUNTIME", "JUPYTER_DATA"):
        env[f"{kind}_DIR"] = str(base / kind.lower())
    for kind in ("WORKSPACES", "SETTINGS"):
        env[f"JUPYTERLAB_{kind}_DIR"] = str(base / kind.lower())
    return base, env


@pytest.fixture(scope="session")
def executed(site, request):
    """{name: future of nbval's process}, for the notebooks that this session tests."""
    base, env = site
    nbval = "-m pytest -q -p no:cacheprovider --nbval-lax --nbval-current-env".split()

    def execute(name):
        path = base / "repo" / "notebooks" / f"{name}.ipynb"
        command = [sys.executable, *nbval, "--nbval-cell-timeout=300", str(path)]
        options = {"cwd": base / "repo", "env": env, "timeout": 900}
        return subprocess.run(command, capture_output=True, text=True, **options)

    items = [item for item in request.session.items if "agrees" in item.name]
    names = [item.callspec.params["name"] for item in items]
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(execute, name) for name in names}
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def server(site):
    """The address of a JupyterLab on the copy."""
    base, env = site
    settings = base / "settings" / "@jupyterlab"
    for plugin, values in {
        # without these, cells off screen are not in the page, and it asks for news
        "notebook-extension/tracker": {"windowingMode": "none"},
        "apputils-extension/notification": {"fetchNews": "false"},
    }.items():
        file = settings / f"{plugin}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, *"-m jupyterlab --no-browser --allow-root".split()]
    command += [f"--port={port}", "--ip=127.0.0.1", "--expose-app-in-browser"]
    command += ["--ServerApp.token=t", f"--ServerApp.root_dir={base / 'repo'}"]
    with open(base / "server.log", "w") as log:
        options = {"env": env, "stdout": log, "stderr": log, "start_new_session": True}
        process = subprocess.Popen(command, **options)
    url = f"http://127.0.0.1:{port}"
    for _ in range(240):
        try:
            urlopen(f"{url}/api/status?token=t").close()
            break
        except OSError:
            assert process.poll() is None, (base / "server.log").read_text()
            time.sleep(0.25)
    yield url
    os.killpg(process.pid, signal.SIGKILL)  # its kernels see it go


def up_to_last_player(nb):
    """Return nb without what follows the last cell that shows a player."""
    last = max(k for k, cell in enumerate(nb.cells) if PLAYER in cell.source)
    return nbformat.from_dict({**nb, "cells": nb.cells[: last + 1]})


KERNEL = (
    "window.jupyterapp?.shell.currentWidget?.context?.sessionContext?.session?.kernel"
)
RUN_ALL = """() => {
    window.ran = 0
    const end = ok => { window.ran = ok ? "well" : "badly" }
    jupyterapp.commands.execute("notebook:run-all-cells").then(end, () => end(false))
}"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["00_start_here", "01_which_feature_dies_first"])
def test_players_work_in_a_browser(name, browser, executed, site, server):
    nb = up_to_last_player(BOOKS[name])
    nb.metadata = run.kernel()
    nbformat.write(nb, site[0] / "repo" / "notebooks" / f"player-{name}.ipynb")
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    wrong = []
    page.on("pageerror", lambda error: wrong.append(f"page error: {error}"))
    page.on("request", lambda sent: wrong.append(sent.url) if leaves(sent) else None)
    page.goto(f"{server}/doc/tree/notebooks/player-{name}.ipynb?token=t")
    page.wait_for_function(f"{KERNEL}?.status == 'idle'", timeout=60_000)

    # before anything is run: not modified, the committed pictures, no broken widget
    dirty = "jupyterapp.shell.currentWidget.context.model.dirty"
    opened = (
        f"async () => {{ await {KERNEL}.info; await {KERNEL}.spec; return {dirty} }}"
    )
    assert page.evaluate(opened) is False
    images = page.locator(".jp-OutputArea-output img")
    assert images.count() == sum(len(pictures(cell)) for cell in code(nb)) > 0
    for image in images.all():
        assert image.evaluate("img => img.complete && img.naturalWidth > 50")
    text = page.locator(".jp-Notebook").inner_text().lower()
    for broken in ("vbox(", "model not found", "displaying widget", "loading widget"):
        assert broken not in text

    # after: the keyboard moves each slider, and another picture is seen each time
    page.evaluate(RUN_ALL)
    page.wait_for_function("window.ran", timeout=400_000)
    assert page.evaluate("window.ran") == "well", "a cell raised an error"
    slider = page.get_by_role("slider")
    players = page.locator(".jp-OutputArea-output").filter(has=slider)
    assert players.count() == sum(PLAYER in cell.source for cell in code(nb))
    for output in players.all():
        slider = output.get_by_role("slider")
        image, caption = (
            output.locator(kind).filter(visible=True)
            for kind in ("img.widget-image", ".widget-html-content")
        )
        before = look(image, caption)
        slider.focus()
        for key in ("ArrowRight", "End", "Home"):
            slider.press(key)
            for _ in range(50):
                now = look(image, caption)
                if now[0] != before[0] and now[1] != before[1]:
                    break
                page.wait_for_timeout(100)
            else:
                raise AssertionError(f"{key} moves nothing at {before[1]!r}")
            before = now
    page.evaluate("jupyterapp.shell.currentWidget.context.sessionContext.shutdown()")
    page.locator(".jp-RenderedMarkdown a[href*='/files/superminddpm.py']").first.click()
    path = "jupyterapp.shell.currentWidget?.context?.path"
    page.wait_for_function(f"{path} == 'superminddpm.py'", timeout=30_000)
    assert not wrong
    page.close()


def look(image, caption):
    """Return what is seen of a frame: its pixels and its caption."""
    image.evaluate("img => img.decode()")  # wait until it is there
    return image.screenshot(), caption.inner_text()


def leaves(sent):
    """Return whether a request goes anywhere but to this machine."""
    url = urlsplit(sent.url)
    return url.scheme in ("http", "https", "ws", "wss") and url.hostname != "127.0.0.1"


@pytest.mark.slow
@each
def test_another_run_agrees_and_the_solutions_are_right(name, executed):
    done = executed[name].result()
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


# ---- Way-finding ---------------------------------------------------------------------
@each
def test_the_line_below_a_title_is_as_run_py_writes_it(name):
    line = BOOKS[name].cells[0].source.split("\n\n")[1]
    path = ROOT / "notebooks" / f"{name}.ipynb"
    assert line == run.way(path), "python notebooks/run.py --links"


def test_a_new_notebook_enters_the_lines_of_its_neighbours(tmp_path):
    def write(name):
        cell = nbformat.v4.new_markdown_cell("# A title\n\nText.\n\nMore.", id="c00")
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / name)

    def linked():
        paths = sorted(tmp_path.glob("*.ipynb"))
        [run.link(path) for path in paths for _ in range(2)]  # the second: no change
        return [nbformat.read(path, 4).cells[0].source for path in paths]

    write("00_a.ipynb")
    write("02_c.ipynb")
    first, last = linked()
    assert first == (
        "# A title\n\n[glossary](glossary.md) · [next](02_c.ipynb)\n\nText.\n\nMore."
    )
    write("01_b.ipynb")
    start = "[contents](00_a.ipynb) · [glossary](glossary.md)"
    first, new, last = linked()
    assert first.split("\n\n")[1:] == [
        "[glossary](glossary.md) · [next](01_b.ipynb)",
        "Text.",
        "More.",
    ]
    assert f"\n\n[previous](00_a.ipynb) · {start} · [next](02_c.ipynb)\n\nT" in new
    assert last == f"# A title\n\n[previous](01_b.ipynb) · {start}\n\nText.\n\nMore."


def test_the_glossary_has_each_term_that_is_linked():
    """In alphabetical order; its own links open, too."""
    text = (ROOT / "notebooks" / "glossary.md").read_text()
    anchors = re.findall(r'^<a id="([^"]+)"></a>\*\*', text, re.M)
    terms = re.findall(r"</a>\*\*([^*]+)\*\*", text)
    assert len(set(anchors)) == len(anchors) == len(terms) > 40
    plain = [term.lower().replace("é", "e") for term in terms]
    assert plain == sorted(plain)
    targets = re.findall(r"\]\(([^)]+)\)", text)
    targets += [link for nb in BOOKS.values() for link in links(nb)]
    for target in targets:
        file, _, term = target.partition("#")
        if file in ("", "glossary.md"):
            assert not term or term in anchors, target
        elif not file.startswith("https://"):
            assert (ROOT / "notebooks" / file).is_file(), target


def test_a_title_alone_gets_its_line_once(tmp_path):
    path = tmp_path / "00_a.ipynb"
    cell = nbformat.v4.new_markdown_cell("# A title", id="c00")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    for _ in range(2):
        run.link(path)
        text = nbformat.read(path, 4).cells[0].source
        assert text == "# A title\n\n[glossary](glossary.md)"


def test_notebooks_are_chosen_by_how_their_names_begin(monkeypatch, capsys):
    done = []
    monkeypatch.setattr(run, "run", lambda path: done.append(path.name) or 0)
    monkeypatch.setattr(run, "link", lambda path: None)

    def call(*words):
        done.clear()
        monkeypatch.setattr(sys, "argv", ["notebooks/run.py", *words])
        run.main()
        return [name[:2] for name in done]

    names = [path.name for path in PATHS]
    assert call() == [name[:2] for name in names] and call("--links") == []
    assert call("02", "00") == ["00", "02"] and call(names[3]) == ["03"]
    for words, wrong in ((("03", "99"), "99"), (("/x",), "/x"), (("--al",), "--al")):
        with pytest.raises(SystemExit, match=f"run.py: no .* begins with {wrong}$"):
            call(*words)
        assert not done
    capsys.readouterr()
    for words in (["--help"], ["-h"], ["--clear"], ["03", "--clear", "x"]):
        assert call(*words) == []
        assert capsys.readouterr().out.strip() == run.__doc__.strip()


# ---- A copy for a class --------------------------------------------------------------
def test_a_copy_for_a_class_has_no_outputs(tmp_path, monkeypatch):
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    monkeypatch.setattr(sys, "argv", ["run.py", "--clear", "class"])
    run.main()
    copies = sorted(tmp_path.glob("class/notebooks/*.ipynb"))
    assert [path.name for path in copies] == [path.name for path in PATHS]
    for path, nb in zip(copies, BOOKS.values(), strict=True):
        cells = nbformat.read(path, 4).cells
        assert [cell.source for cell in cells] == [cell.source for cell in nb.cells]
        for cell in code(nbformat.from_dict({"cells": cells})):
            assert cell.outputs == [] and cell.execution_count is None
        for link in links(nb):
            file = path.parent / link.split("#")[0]
            assert link.startswith("https://") or file.is_file(), link
    for folder in ("class", ROOT / "class"):  # never over a copy, never into itself
        monkeypatch.setattr(sys, "argv", ["run.py", "--clear", str(folder)])
        with pytest.raises(SystemExit, match="new folder"):
            run.main()


@pytest.mark.slow
def test_a_copy_for_a_class_finds_its_own_scripts_and_answers(tmp_path):
    run.copy_for_class(tmp_path / "class")
    notebooks = tmp_path / "class" / "notebooks"
    first = code(BOOKS["00_start_here"])[0].source
    source = f"{first}\ncheck(1, '00.5')\nprint(ROOT)"
    env = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", source]
    options = {"cwd": notebooks, "env": env, "capture_output": True, "text": True}
    done = subprocess.run(command, check=True, **options)
    said, root = done.stdout.splitlines()
    assert said.startswith("Not yet: ") and root == str(tmp_path / "class")
