"""The toy in a browser tab: its numbers are those of toy.py, and its controls work.

JavaScript computes in float64, and in float32 rounding alone changes a run of toy.py by
more than the tolerance here. So toy.py, too, is run in float64.
"""

import base64
import importlib.util
import re
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from scipy.stats import kstest

PAGE = (ROOT / "notebooks" / "toy.html").as_uri()
STEPS = 200  # of a run; all births are in it, and the last quarter with a falling rate
HELD = 256  # samples held out at each noise level

pytestmark = pytest.mark.slow


@pytest.fixture
def page(browser):
    """The page on a small screen. It must log nothing and request nothing else."""
    page, wrong = browser.new_page(viewport={"width": 1100, "height": 800}), []
    page.on("pageerror", lambda error: wrong.append(f"page error: {error}"))
    page.on("console", lambda said: wrong.append(f"console: {said.text}"))
    page.on("request", lambda sent: wrong.append(sent.url) if sent.url != PAGE else 0)
    page.goto(PAGE)
    yield page
    page.close()
    assert not [line for line in wrong if not line.startswith("data:")]


# ---- The numbers ---------------------------------------------------------------------
@pytest.fixture(scope="module")
def lab():
    """A copy of toy.py that computes in float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        spec = importlib.util.spec_from_file_location("lab", ROOT / "notebooks/toy.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "lab", module)  # where its dataclasses are looked up
        spec.loader.exec_module(module)
        yield module
        torch.set_default_dtype(torch.float32)


def bits(toy, xt, t, eps):
    """Return the bits z of x_t, (..., 4)."""
    return ((xt - (1 - toy.alphabar(t))[..., None].sqrt() * eps) @ toy.M[:, :4]).sign()


@pytest.fixture(scope="module")
def given(lab):
    """What toy.py draws for a run of seed 0, whatever the arm, and for its measures."""
    toy = lab.Toy()
    steps = [step[1:] for step in lab.batches("uniform", toy, [0], STEPS)]
    t, xt, eps = (torch.cat(part) for part in zip(*steps, strict=True))
    probes = [lab.probe(toy, t, HELD, 0, 4, i) for i, t in enumerate(lab.GRID)]
    held_xt, held_t, held_eps = (torch.cat(part) for part in zip(*probes, strict=True))
    chance = [torch.rand(128, generator=lab.rng(0, 3, stage)) for stage in range(5)]
    arrays = {
        "M": toy.M,
        "rows": lab.fresh(0, 128, toy.d),
        "u": (t - lab.TMIN) / (1 - lab.TMIN),
        "z": bits(toy, xt, t, eps),
        "eps": eps,
        "chance": torch.stack(chance),
        "heldZ": bits(toy, held_xt, held_t, held_eps),
        "heldEps": held_eps,
        "noise": torch.randn(64, toy.d, generator=lab.rng(0, 6)),
    }
    return {
        name: base64.b64encode(array.numpy().astype("<f8").tobytes()).decode()
        for name, array in arrays.items()
    }


def trained_by(lab, toy, arm):
    """Return what toy.train and the measures of toy.py make of it."""
    batches, losses = lab.batches(arm.density, toy, [0], STEPS), []

    def watch(step, nets):
        if step < STEPS:
            _, t, xt, eps = next(batches)
            losses.append((nets(xt, t) - eps).square().mean())

    start = lab.Nets([0])
    if arm.regrow:
        start.mask[:, lab.n_active(128)[0] :] = 0
    watch(0, start)
    nets = lab.train(arm, toy, [0], steps=STEPS, watch=watch)
    risk = lab.excess(nets, toy, n=HELD)
    return {
        "losses": torch.stack(losses),
        "captured": lab.captured(risk, toy)[0],
        "risk": risk[0],
        "birth": nets.birth[0],
        "floor": toy.mmse(lab.GRID)[:, :2],
        "samples": (lab.generate(nets, toy, n=64, steps=20) @ toy.M)[0],
        "rows": nets.rows[0].flatten(),
        "b2": nets.b2[0, 0],
    }


RUN = """({ given, n, options }) => {
    const list = {}
    for (const name in given) {
        const bytes = Uint8Array.from(atob(given[name]), char => char.charCodeAt(0))
        list[name] = new Float64Array(bytes.buffer)
    }
    const part = (name, i, size) => list[name].subarray(i * size, (i + 1) * size)
    const draw = step => ({ u: part("u", step, 128), z: part("z", step, 128 * 4),
                            eps: part("eps", step, 128 * 12) })
    const probes = Array.from({ length: 25 }, (_, i) =>
        ({ z: part("heldZ", i, n * 4), eps: part("heldEps", i, n * 12) }))
    const chance = stage => part("chance", stage, 128)
    return toy.run(options.steps, { ...list, draw, probes, chance, ...options })
}"""


@pytest.mark.parametrize(
    ("density", "regrow", "a1", "a2"),
    [
        ("uniform", "", 3.0, 1.0),
        ("uniform", "", 1.5, 2.5),
        ("curriculum", "", 3.0, 1.0),
        ("reversed", "", 3.0, 1.0),
        ("shuffled", "", 3.0, 1.0),
        ("curriculum", "gradient", 3.0, 1.0),
        ("curriculum", "random", 3.0, 1.0),
    ],
)
def test_the_page_trains_as_toy_py_does(page, lab, given, density, regrow, a1, a2):
    """Losses, captured fractions, floor, births, samples, weights; 200 steps, 1e-5."""
    toy = lab.Toy(a1, a2)
    want = trained_by(lab, toy, lab.Arm(density, regrow))
    options = {"density": density, "regrow": regrow, "a1": a1, "a2": a2, "steps": STEPS}
    got = page.evaluate(RUN, {"given": given, "n": HELD, "options": options})
    assert len(got["losses"]) == STEPS and got["step"] == STEPS
    assert len(set(got["birth"])) == (5 if regrow else 1)
    for name, value in want.items():
        np.testing.assert_allclose(
            got[name], value.numpy(), rtol=0, atol=1e-5, err_msg=name
        )


# ---- The controls --------------------------------------------------------------------
def seen(page):
    """Return the step that is looked at, its curves, dots and needles."""
    step = re.match(r"Step (\d+) of 3000", page.locator("#said").inner_text())[1]
    curves = ["#loss0", "#loss1", "#gap0", "#gap1", "#dots"]
    shown = [page.locator(curve).get_attribute("d") for curve in curves]
    needles = [page.locator(f"#needle{j}").get_attribute("transform") for j in (0, 1)]
    return int(step), [*shown, *needles]


def trains_until(page, step):
    """Wait until the run has passed a step."""
    for _ in range(1800):
        if page.evaluate("run.at") > step:
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"step {step} is not reached")


def test_it_trains_pauses_and_goes_back_in_time(page):
    button, slider = page.locator("#start"), page.locator("#time")
    first = seen(page)
    assert first[0] == 0 and button.inner_text() == "Start"
    button.press("Enter")
    trains_until(page, 150)
    assert button.inner_text() == "Pause"
    button.press("Space")
    last = seen(page)
    page.wait_for_timeout(300)
    assert seen(page) == last and button.inner_text() == "Start"
    moved = [a != b for a, b in zip(first[1], last[1], strict=True)]
    assert last[0] > 100 and all(moved[:-1])  # the needle of M2 rests until later
    assert "Step" in page.get_by_role("status").inner_text()

    slider.press("Home")
    assert seen(page) == first and slider.get_attribute("aria-valuetext") == "step 0"
    slider.press("End")
    assert seen(page) == last
    slider.press("ArrowLeft")
    assert first[0] < seen(page)[0] < last[0]
    slider.press("Home")
    button.click()
    trains_until(page, last[0] + 50)
    assert seen(page) == first, "who looks back must stay there"
    slider.press("End")
    assert seen(page)[0] > last[0]


def test_the_coarse_feature_is_captured_first_and_the_run_comes_to_an_end(page):
    page.locator("#start").click()
    trains_until(page, 2999)
    assert page.locator("#start").inner_text() == "Run again"
    looks = page.evaluate("looks.map(look => [look.step, ...look.captured])")
    steps, coarse, fine = np.array(looks).T
    assert steps[0] == 0 and steps[-1] == 3000 and (np.diff(steps) <= 100).all()
    assert steps[coarse > 0.5][0] * 2 < steps[fine > 0.5][0]  # as in lesson 04
    assert coarse[-1] > 0.9 and fine[-1] > 0.8  # in toy.txt 0.97 and 0.89
    said = [page.locator(f"#F{j}").inner_text() for j in (0, 1)]
    assert said == [f"{100 * part:.0f} %" for part in (coarse[-1], fine[-1])]
    assert not page.locator("#history .before").count()
    page.get_by_label("reversed").check()
    assert page.locator("#history .before").count() == 2  # the run before, dotted
    assert "uniform" in page.locator("#said").inner_text()
    assert page.locator("#start").inner_text() == "Start" and seen(page)[0] == 0


def test_each_switch_starts_a_new_run_of_its_own(page):
    asked = set()
    groups = {"density": "uniform curriculum reversed shuffled".split()}
    groups["regrow"] = ["", "gradient", "random"]
    for name, values in groups.items():
        page.locator(f"[name={name}][value='{values[0]}']").focus()
        for value in [*values[1:], values[0]]:
            page.keyboard.press("ArrowDown")
            assert page.evaluate(f"[run.{name}, run.at, looks.length]") == [value, 0, 1]
            asked.add(page.locator("#ask").inner_text())
            on = page.locator("#channels").get_attribute("aria-label")
            n = 26 if value in ("gradient", "random") else 128
            assert on == f"{n} of 128 channels are on"
    assert len(asked) == 6
    for stage, low in enumerate((0.8, 0.6, 0.4, 0.2, 0.01)):
        for density, ends in {
            "uniform": (0.01, 1),
            "curriculum": (low, 1),
            "reversed": (0.01, 1.01 - low),
            "shuffled": (0.01, 1),
        }.items():
            blocks = page.evaluate(f"blocks('{density}', {stage}, 3000)")
            assert (blocks[0][0], blocks[-1][1]) == pytest.approx(ends)
            assert sum(p * (high - low) for low, high, p in blocks) == pytest.approx(1)


AMPLITUDES = """() => { // of the bits in the cleanest data, of which there is 0.97
    const sum = [0, 0], { xt } = run.held[0]
    for (let i = 0; i < xt.length; i += 12) {
        const y = run.rotate(xt, i)
        for (let j = 0; j < 4; j++) sum[j < 2 ? 0 : 1] += Math.abs(y[j])
    }
    return sum.map(total => total / xt.length * 6 / Math.sqrt(0.97))
}"""


def test_the_amplitudes_and_the_seed_change_the_data(page):
    floors = [page.locator(f"#floor{j}") for j in (0, 1)]
    before = [floor.get_attribute("d") for floor in floors]
    assert page.evaluate(AMPLITUDES) == pytest.approx([3, 1], abs=0.05)
    page.get_by_label("fine amplitude").press("ArrowRight")
    assert page.evaluate(AMPLITUDES) == pytest.approx([3, 1.25], abs=0.05)
    after = [floor.get_attribute("d") for floor in floors]
    assert after[0] == before[0] and after[1] != before[1]
    page.get_by_label("coarse amplitude").press("ArrowLeft")
    assert page.evaluate(AMPLITUDES) == pytest.approx([2.75, 1.25], abs=0.05)
    rings = page.locator("#rings circle").first
    assert [rings.get_attribute(at) for at in ("cx", "cy")] == ["2.75", "1.25"]
    page.get_by_label("fine amplitude").press("End")
    assert "no weaker than" in page.locator("#ask").inner_text()

    old = page.evaluate("[run.M, run.rows, run.draw(0).eps].map(x => x[0])")
    page.get_by_role("button", name="New seed").click()
    new = page.evaluate("[run.M, run.rows, run.draw(0).eps].map(x => x[0])")
    assert not set(old) & set(new) and "seed 1" in page.locator("#said").inner_text()


def test_the_pages_own_random_numbers_are_what_they_should_be(page):
    M = np.array(page.evaluate("[...randomness(3).M]")).reshape(12, 12)
    np.testing.assert_allclose(M @ M.T, np.eye(12), atol=1e-12)
    draw = "draw(2000, rng(1, 2, 3))"
    draws = page.evaluate(f"Object.values({draw}).map(x => [...x])")
    for values, cdf in zip(draws, ("uniform", None, "norm"), strict=True):
        if cdf:
            assert kstest(values, cdf).pvalue > 1e-3
        else:
            assert set(values) == {-1, 1} and abs(np.mean(values)) < 0.05
    again = page.evaluate(f"Object.values({draw}).map(x => [...x])")
    assert again == draws


# ---- The look ------------------------------------------------------------------------
def luminance(colour):
    """Return the relative luminance of rgb(r, g, b), as WCAG 2.2 defines it."""
    rgb = np.array([int(x) for x in re.findall(r"\d+", colour)[:3]]) / 255
    rgb = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return rgb @ [0.2126, 0.7152, 0.0722]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_fits_is_legible_and_has_names_for_screen_readers(page, theme):
    page.emulate_media(color_scheme=theme)
    size = "[document.documentElement.scrollWidth, document.body.scrollHeight]"
    width, height = page.evaluate(size)
    assert width <= 1100 and height <= 800
    style = "(x, key) => getComputedStyle(x)[key]"
    card = page.locator("section").first.evaluate(style, "backgroundColor")
    body = page.locator("body").evaluate(style, "backgroundColor")
    assert (luminance(card) < 0.1) == (luminance(body) < 0.1) == (theme == "dark")
    for name, key in {
        "#said": "color",
        "header p": "color",
        "#F0": "color",
        "#F1": "color",
        "#history text": "fill",
        "#dots": "stroke",
    }.items():
        colour = page.locator(name).first.evaluate(style, key)
        dim, bright = sorted(map(luminance, (colour, card)))
        assert (bright + 0.05) / (dim + 0.05) > 4.5, name
    for name in ("Training step", "coarse amplitude", "fine amplitude"):
        assert page.get_by_role("slider", name=name).count() == 1
    assert page.get_by_role("meter", name="captured fraction").count() == 2
    for group, n in {"Order of the noise levels": 4, "Mask on the channels": 3}.items():
        radios = page.get_by_role("group", name=group).get_by_role("radio")
        assert radios.count() == n
    assert page.locator("svg").count() == page.locator("svg[aria-label]").count() == 7
    page.set_viewport_size({"width": 380, "height": 800})
    assert page.evaluate(size)[0] <= 380


def test_it_leads_back_to_the_course_where_there_is_a_site(page, browser, tmp_path):
    assert not page.get_by_role("link").count()  # beside toy.py there is none
    (tmp_path / "site" / "notebooks").mkdir(parents=True)
    copy = tmp_path / "site" / "notebooks" / "toy.html"
    copy.write_text((ROOT / "notebooks" / "toy.html").read_text())
    (tmp_path / "site" / "index.html").write_text("<h1>The course</h1>")
    other = browser.new_page()
    other.goto(copy.as_uri())
    other.get_by_role("link", name="course").click()
    assert other.get_by_role("heading").inner_text() == "The course"
    other.close()
