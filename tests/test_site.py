"""The web site: every link, formula and player of every page, in a real Chromium.

Two lessons are executed; the others show what they were stored with. To test a whole
site that was built before: SITE=site python -m pytest --all tests/test_site.py
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbclient
import nbformat
import pytest
import yaml
from conftest import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "notebooks"))
import show  # noqa: E402

SITE = runpy.run_path(str(ROOT / "notebooks" / "site.py"))  # `import site` is Python's
LESSONS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
EXECUTED = ["01", "11"]  # quick ones; players with figures, and with pictures

# What a reader sees, with all that is folded opened.
FACTS = """() => {
    document.querySelectorAll("details").forEach(part => { part.open = true })
    const all = kind => [...document.querySelectorAll(kind)]
    const text = document.querySelector("main").cloneNode(true)
    text.querySelectorAll("pre, code").forEach(part => part.remove())
    return {
        links: all("a[href], img[src], link[href]").map(part => part.href || part.src),
        way: all("nav a[rel]").map(part => part.rel + " " + part.href),
        ids: all("[id]").map(part => part.id),
        text: text.textContent,
        formulas: all("math").map(part => part.getBoundingClientRect().width),
        errors: all("merror").length,
        pictures: all("img").filter(part => !part.closest("[hidden]"))
            .map(part => part.naturalWidth),
        width: document.documentElement.scrollWidth,
    }
}"""

# The least contrast of a text with what is behind it, by the formula of WCAG 2.
CONTRAST = """() => {
    const rgb = color => color.match(/[\\d.]+/g).map(Number)
    const light = color => {
        const [r, g, b] = rgb(color).map(x => x / 255)
            .map(x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b
    }
    const behind = part => {
        const color = getComputedStyle(part).backgroundColor
        return rgb(color)[3] === 0 ? behind(part.parentElement) : color
    }
    let least = [21, ""]
    for (const part of document.body.querySelectorAll("*:not(script)")) {
        const own = [...part.childNodes].filter(node => node.nodeType === 3)
        if (!own.some(node => node.data.trim())) continue
        const pair = [light(getComputedStyle(part).color), light(behind(part))]
        const contrast = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05)
        if (contrast < least[0]) least = [contrast, part.textContent]
    }
    return [...least, light(getComputedStyle(document.documentElement).backgroundColor)]
}"""


def moved(player):
    """Return the picture and the caption at each value that the keyboard reaches."""
    slider, seen = player.get_by_role("slider"), []
    slider.press("Home")
    for _ in range(int(slider.get_attribute("max")) + 1):
        figure = player.locator("figure").filter(visible=True)  # fails if there are two
        picture, caption = figure.locator("img"), figure.inner_text()
        assert picture.evaluate("img => img.decode().then(() => img.naturalWidth)") > 50
        assert slider.evaluate("slider => slider.ariaValueText") == caption
        seen.append((picture.get_attribute("src"), caption))
        slider.press("ArrowRight")
    return seen


def played(page, player, start):
    """Return which frames are seen while the button plays, from a key, Home or End."""
    look = "[...player.querySelectorAll('figure')].findIndex(part => !part.hidden)"
    click = "player.querySelector('button').click()"
    player.get_by_role("slider").press(start)
    seen = [player.evaluate(f"player => {{ {click}; return {look} }}")]
    for _ in range(2):
        page.wait_for_timeout(500)
        seen.append(player.evaluate(f"player => {look}"))
    button = player.get_by_role("button")
    if button.inner_text() == "⏸":  # else it has come to the end
        button.click()
    return seen


def visit(browser, out):
    """Return {page: what Chromium sees there}, for all pages below out."""
    seen = {}
    page, wrong = browser.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text))
    page.on("request", lambda sent: wrong.append(sent.url))
    for path in sorted(out.rglob("*.html")):
        wrong.clear()
        page.set_viewport_size({"width": 1100, "height": 800})
        page.goto(path.as_uri())
        if path.name == "toy.html":  # has tests of its own
            seen[path] = {"links": [], "ids": [], "wrong": [*wrong]}
            continue
        players = page.locator(".player").all()
        ways = [(one, key) for one in players[:1] for key in ("Home", "End")]
        seen[path] = {"played": [played(page, *way) for way in ways]}
        seen[path]["players"] = [moved(one) for one in players]
        seen[path] |= page.evaluate(FACTS)
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            seen[path][scheme] = page.evaluate(CONTRAST)
        page.set_viewport_size({"width": 390, "height": 800})
        seen[path]["narrow"] = page.evaluate("document.body.scrollWidth")
        seen[path]["wrong"] = [*wrong]
    page.close()
    return seen


@pytest.fixture(scope="module")
def seen(browser, tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    if "SITE" in os.environ:
        out = ROOT / os.environ["SITE"]
    else:
        SITE["build"](out, EXECUTED)
    return visit(browser, out)


def lessons(seen):
    """Return {path of a notebook: what is seen on its page}."""
    pages = {path.stem: facts for path, facts in seen.items()}
    return {path: pages[path.stem] for path in LESSONS}


@pytest.mark.slow
def test_every_link_opens_within_the_site(seen):
    inside = {path.as_uri(): facts["ids"] for path, facts in seen.items()}
    out = min(seen, key=lambda path: len(path.parts)).parent
    for path, facts in seen.items():
        for link in facts["links"]:
            file, _, term = link.partition("#")
            if file.startswith("file:"):
                assert Path(unquote(urlsplit(file).path)).is_file(), (path, link)
                assert file.startswith(out.as_uri()), (path, link)
                assert not term or unquote(term) in inside[file], (path, link)
            else:
                assert file.startswith(("https://", "data:")), (path, link)
    pages = [facts["way"] for facts in lessons(seen).values()]
    stems = {path.stem: path.as_uri() for path in seen}
    for k, way in enumerate(pages):  # at the top and at the bottom
        before = [f"prev {stems[path.stem]}" for path in LESSONS[:k][-1:]]
        after = [f"next {stems[path.stem]}" for path in LESSONS[k + 1 :][:1]]
        assert way == 2 * (before + after), LESSONS[k]


@pytest.mark.slow
def test_no_page_asks_for_anything_outside_or_logs_an_error(seen):
    out = min(seen, key=lambda path: len(path.parts)).parent
    for path, facts in seen.items():
        mine = (out.as_uri(), "data:")
        assert not [x for x in facts["wrong"] if not x.startswith(mine)], path
        assert all(width > 0 for width in facts.get("pictures", [])), path


@pytest.mark.slow
def test_every_formula_is_typeset(seen):
    """As many as a regular expression finds in the source, and none is left raw."""
    for path, facts in seen.items():
        assert not re.search(r"[$\\]", facts.get("text", "")), path
        assert not facts.get("errors"), path
        assert all(width > 0 for width in facts.get("formulas", [])), path
    for path, facts in lessons(seen).items():
        cells = nbformat.read(path, 4).cells
        outputs = [out for cell in cells for out in cell.get("outputs", [])]
        texts = [cell.source for cell in cells if cell.cell_type == "markdown"]
        texts += [out.get("data", {}).get("text/markdown", "") for out in outputs]
        text = re.sub(r"```.*?```|`[^`]*`", "", "\n\n".join(texts), flags=re.S)
        formulas = re.findall(r"\$\$.+?\$\$|\$[^$]+\$", text, re.S)
        assert len(facts["formulas"]) == len(formulas), path


@pytest.mark.slow
def test_every_player_moves(seen):
    """The keyboard reaches another picture and another caption at each value."""
    for path, facts in lessons(seen).items():
        if "SITE" in os.environ or path.name.startswith(tuple(EXECUTED)):
            cells = nbformat.read(path, 4).cells
            code = [cell.source for cell in cells if cell.cell_type == "code"]
            assert len(facts["players"]) == sum("player(" in cell for cell in code) > 0
            for frames in facts["players"]:
                for part in zip(*frames, strict=True):  # pictures, captions
                    assert len(set(part)) == len(frames) > 1, path
            for first, second, third in facts["played"]:
                assert 0 == first < second < third, path


@pytest.mark.slow
def test_a_player_needs_nothing_but_its_own_output(browser, monkeypatch):
    """As on Colab: no page of ours around it; what moves one moves no other."""
    shown = []
    monkeypatch.setattr(show, "display", shown.append)
    monkeypatch.setenv("PLAYERS", "html")
    for colours in (("red", "green", "blue"), ("black", "white")):
        frames = [Image.new("RGB", (60, 60), colour) for colour in colours]
        show.player(frames, range(len(frames)), "t", colours)
    page = browser.new_page()
    page.set_content("".join(one.data for one in shown))
    first, second = page.locator(".player").all()
    before = second.inner_html()
    assert [caption[-5:].strip() for _, caption in moved(first)] == [
        "red",
        "green",
        "blue",
    ]
    for start in ("Home", "End"):
        assert played(page, first, start) == [0, 1, 2]
    assert second.inner_html() == before
    assert len(moved(second)) == 2
    page.close()


@pytest.mark.slow
def test_every_page_can_be_read_on_a_dark_or_narrow_screen(seen):
    for path, facts in seen.items():
        if "light" in facts:
            assert facts["width"] <= 1100 and facts["narrow"] <= 390, path
            for scheme in ("light", "dark"):
                contrast, text, _ = facts[scheme]
                assert contrast >= 4.5, (path, scheme, text)
            assert facts["dark"][2] < 0.05 and facts["light"][2] > 0.9


def test_every_formula_is_known_to_the_converter():
    """It raises an error at a command that it cannot typeset."""
    render = SITE["EXPORTER"].filters["markdown2html"]
    for path in [*LESSONS, *ROOT.glob("*.md"), *ROOT.glob("notebooks/*.md")]:
        for cell in SITE["read"](path, execute=False).cells:
            if cell.cell_type == "markdown":
                render(cell.source)
    with pytest.raises(Exception, match="Unknown command"):
        render(r"$\unknown$")


def test_names_that_no_notebook_has_are_refused_and_help_builds_nothing(
    monkeypatch, capsys
):
    built, main = [], SITE["main"]
    monkeypatch.setitem(main.__globals__, "build", lambda *way: built.append(way))
    for words in ([], ["00", LESSONS[2].name]):
        monkeypatch.setattr(sys, "argv", ["notebooks/site.py", *words])
        main()
        assert built.pop() == (ROOT / "site", words or [""])
    for words, wrong in ((["03", "99"], "99"), (["/x"], "/x")):
        monkeypatch.setattr(sys, "argv", ["notebooks/site.py", *words])
        with pytest.raises(SystemExit, match=f"site.py: no .* begins with {wrong}$"):
            main()
    monkeypatch.setattr(sys, "argv", ["notebooks/site.py", "--help"])
    main()
    assert capsys.readouterr().out.strip() == SITE["__doc__"].strip() and not built


def test_the_workflow_runs_the_commands_of_the_documents():
    """Those of the README, of .ci/run and of site.py, with GitHub's own actions."""
    workflow = ROOT / ".github" / "workflows" / "course.yml"
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    files = (ROOT / "README.md", ROOT / ".ci" / "run")
    text = "".join(file.read_text() for file in files) + SITE["__doc__"]
    known = [re.split(r"\s+#|  ", line.strip())[0] for line in text.splitlines()]
    commands = [step["run"] for step in steps if "run" in step and "if" not in step]
    assert "python -m pytest" in commands and set(commands) <= set(known)
    used = [step["uses"] for step in steps if "uses" in step]
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", action) for action in used)
    (upload,) = [step for step in steps if "upload" in step.get("uses", "")]
    assert upload["with"]["path"] == "site"


@pytest.mark.slow
def test_the_workflow_makes_a_copy_that_runs_on_colab(tmp_path, monkeypatch):
    """Its own commands, with a folder as GitHub, and a module named as Colab has it."""
    workflow = yaml.safe_load((ROOT / ".github/workflows/course.yml").read_text())
    (script,) = [x["run"] for x in workflow["jobs"]["build"]["steps"] if "if" in x]
    hub, work = tmp_path / "hub" / "some" / "course", tmp_path / "work"
    settings = {
        "GITHUB_REPOSITORY": "some/course",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{tmp_path / 'hub'}/.insteadOf",
        "GIT_CONFIG_VALUE_0": "https://github.com/",
        "PIP_NO_INDEX": "1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    skip = shutil.ignore_patterns(".*", "runs", "data", "site", "__pycache__")
    shutil.copytree(ROOT, work, ignore=skip)
    (work / ".gitignore").write_text("never in the copy\n")
    for command in (f"git init --quiet --bare {hub}", f"git init --quiet {work}"):
        subprocess.run(command.split(), check=True)
    start = (
        f"git remote add origin https://github.com/some/course\ngit add --all\n{script}"
    )
    subprocess.run(["bash", "-ec", start], cwd=work, check=True, capture_output=True)

    subprocess.run(["git", "clone", "-qb", "class", hub, tmp_path / "seen"], check=True)
    assert not (tmp_path / "seen" / ".gitignore").exists()
    for path in LESSONS:
        nb = nbformat.read(tmp_path / "seen" / path.relative_to(ROOT), 4)
        assert not any(cell.get("outputs") for cell in nb.cells)
        fetch, imports = [cell for cell in nb.cells if cell.cell_type == "code"][:2]
        assert "some/course course\n" in fetch.source
    there = tmp_path / "content"  # where a notebook begins on Colab
    there.mkdir()
    for module, cells in {"here": [fetch], "google.colab": [fetch, imports]}.items():
        assert not [*there.iterdir()]  # it fetches nothing on other machines
        fake = nbformat.v4.new_code_cell(f"import sys\nsys.modules[{module!r}] = sys")
        nb.cells = [fake, *cells]
        options = {"resources": {"metadata": {"path": str(there)}}}
        nbclient.NotebookClient(nb, kernel_name="python3", **options).execute()


def test_a_lesson_has_links_to_colab_and_binder_where_its_repository_is_known(
    monkeypatch,
):
    def links():
        html, _ = SITE["page"](LESSONS[1], LESSONS, execute=False)
        return re.findall(r'"(https://[^"]*(?:colab|binder)[^"]*)"', html)

    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    assert links() == []
    monkeypatch.setenv("GITHUB_REPOSITORY", "some/course")
    file = f"notebooks/{LESSONS[1].name}"
    assert links() == 2 * [  # at the top and at the bottom
        f"https://colab.research.google.com/github/some/course/blob/class/{file}",
        f"https://mybinder.org/v2/gh/some/course/class?labpath={file}",
    ]
