"""Build the course as a web site, which needs neither a kernel nor the network.

    python notebooks/site.py        all of it, into the folder site/
    python notebooks/site.py 00 14  the same, but only these notebooks are executed

It takes as long as to run the notebooks. Players move only in those that are executed
here; the others show what they were stored with. Begin at site/index.html, which is
README.md. What a page links to becomes a page as well, at the same place as in the
repository: notebooks and Markdown as text, programs in colour; pictures and HTML are
copied. Formulas become MathML, which browsers typeset by themselves. How a page looks
is in site.html.j2.

In a workflow of GitHub (GITHUB_REPOSITORY is set) each lesson has links that open its
copy without outputs on Colab and on Binder; run.py says where that copy comes from.
"""

import os
import re
import shutil
import sys
from pathlib import Path

import nbformat
import run
from math_core import LatexToMathML
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments.formatters import HtmlFormatter

HERE = Path(__file__).parent.resolve()
ROOT = HERE.parent
COPIED = {".html", ".png", ".gif", ".webp", ".svg", ".jpg"}
MATHML = LatexToMathML()  # raises an error at a command that it does not know


class Renderer(IPythonRenderer):
    """Markdown as HTML, with formulas as MathML and anchors named as on GitHub."""

    def heading(self, text, level, **_):
        name = re.sub(r"<.*?>|[^\w\s-]", "", text).lower().replace(" ", "-")
        return f'<h{level} id="{name}">{text}</h{level}>\n'

    def inline_math(self, body):
        return MATHML.convert_with_local_state(body, displaystyle=False)

    def block_math(self, body):
        formula = MATHML.convert_with_local_state(body, displaystyle=True)
        return f'<span class="formula">{formula}</span>'


EXPORTER = HTMLExporter(
    template_name="classic",  # where site.html.j2 finds its parent
    template_file=str(HERE / "site.html.j2"),
    filters={"markdown2html": MarkdownWithMath(Renderer(escape=False)).render},
    exclude_input_prompt=True,
    exclude_output_prompt=True,
)


def address(path):
    """Return where in the site the file at path of the repository stands."""
    if path == ROOT / "README.md":
        return Path("index.html")
    path = path.relative_to(ROOT)
    if path.suffix in (".ipynb", ".md"):
        return path.with_suffix(".html")
    return path if path.suffix in COPIED else path.with_name(f"{path.name}.html")


def read(path, execute):
    """Return the file at path as a notebook: itself, or its text in a single cell."""
    if path.suffix == ".ipynb":
        env = os.environ | {"PLAYERS": "html"}  # for show.py
        nb = run.execute(path, env) if execute else nbformat.read(path, 4)
        line = f"\n\n{run.way(path)}"  # its links stand on top of the page instead
        nb.cells[0].source = nb.cells[0].source.replace(line, "", 1)
        return nb
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".md":
        language = "python" if path.suffix == ".py" else "text"
        text = f"# {path.name}\n\n~~~~~~{language}\n{text}\n~~~~~~"
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])


def page(path, lessons, execute):
    """Return the file at path as a page, and the files of ours that it links to."""
    nb = read(path, execute)
    k = lessons.index(path) if path in lessons else None
    repository = os.environ.get("GITHUB_REPOSITORY")
    colours = {"light": "default", "dark": "github-dark"}
    resources = {
        "title": re.search(r"^# (.*)", nb.cells[0].source, re.M)[1],
        "name": path.name,
        "root": os.path.relpath(ROOT, path.parent),
        "before": lessons[k - 1] if k else None,
        "after": lessons[k + 1] if k is not None and k + 1 < len(lessons) else None,
        "repository": repository if path in lessons else None,
        "colours": {
            theme: HtmlFormatter(style=style).get_style_defs(".highlight")
            for theme, style in colours.items()
        },
    }
    html, _ = EXPORTER.from_notebook_node(nb, resources)
    here, linked = address(path).parent, []

    def follow(match):
        file = (path.parent / match[2]).resolve()
        if file.is_dir():
            return ""  # there is no page for a folder, so its name stays bare text
        if not file.is_file():
            return match[0]
        linked.append(file)
        link = Path(os.path.relpath(address(file), here)).as_posix()
        return f'{match[1]}="{link}{match[3]}"'

    html = re.sub(r'\b(href|src)="([^"#:]+)(#[^"]*|)"', follow, html)
    return html, linked


def build(out, names):
    """Write the site to the folder out; execute notebooks whose names begin so."""
    lessons = sorted(HERE.glob("[0-9]*.ipynb"))
    files = [ROOT / "README.md", *lessons]
    for path in files:  # which grows: each page adds what it links to
        target = out / address(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in COPIED:
            shutil.copy(path, target)
            continue
        execute = path in lessons and path.name.startswith(tuple(names))
        html, linked = page(path, lessons, execute)
        target.write_text(html, encoding="utf-8")
        files += [file for file in dict.fromkeys(linked) if file not in files]
        if execute:
            print(f"{path.name:32} {target.stat().st_size / 1e3:6.0f} kB", flush=True)
    print(f"{len(files)} files, begin at {out / 'index.html'}")


def main():
    names = sys.argv[1:] or [""]
    if {"-h", "--help"} & {*names}:
        return print(__doc__.strip())
    run.choose(names)
    build(ROOT / "site", names)


if __name__ == "__main__":
    main()
