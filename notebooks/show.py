"""What the notebooks share to show things: style, strips, curves, players, checks.

Whatever shows something returns None, so that a cell may end in it. A player holds all
its frames in the page: moving its slider asks neither the kernel nor the network.
"""

import base64
import html
import io
import math
import os
import runpy
from numbers import Number
from pathlib import Path

import ipywidgets as widgets
import matplotlib.pyplot as plt
import torch
from cycler import cycler
from IPython.display import HTML, Markdown, display
from matplotlib import get_data_path
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

# Okabe and Ito's colours, all of which the colour-blind can tell apart; on white, their
# yellow cannot be seen. Line styles differ as well, for prints in grey.
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000".split()
LINES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (3, 1)), "-"]

# Moves a player of html_player, the element around it.
MOVE = """<script>{
const player = document.currentScript.parentElement
const slider = player.querySelector("input"), button = player.querySelector("button")
let clock = 0
function show() {
  player.querySelectorAll("figure").forEach((figure, k) => {
    figure.hidden = k != slider.value
    if (!figure.hidden) slider.ariaValueText = figure.innerText
  })
}
function stop() { clearInterval(clock); clock = 0; button.textContent = "▶" }
function step() {
  slider.stepUp()
  show()
  if (slider.value == slider.max) stop()
}
slider.oninput = show
button.onclick = () => {
  if (clock) return stop()
  if (slider.value == slider.max) {
    slider.value = 0
    show()
  }
  button.textContent = "⏸"
  clock = setInterval(step, 400)
}
show()
}</script>"""


def style():
    """Set how figures look: on white also where the page is dark, 12 pt, told apart."""
    plt.rcParams.update(
        {
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
            "figure.figsize": (8, 3.8),
            "figure.dpi": 100,
            "figure.constrained_layout.use": True,
            "font.size": 12,
            "axes.prop_cycle": cycler(color=COLOURS) + cycler(linestyle=LINES),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "lines.linewidth": 2,
            "legend.frameon": False,
            "image.cmap": "cividis",
            "image.interpolation": "nearest",
        }
    )


def tiles(images, columns=8, side=48):
    """Return images (N, [C,] S, S) in [-1, 1] as one PIL picture, columns in a row.

    side: the least height of a tile in pixels; pixels are enlarged, not blurred.
    """
    images = torch.as_tensor(images).detach().float()
    if images.dim() == 3:
        images = images[:, None]
    scale = math.ceil(side / images.shape[-1])
    images = images.repeat_interleave(scale, -2).repeat_interleave(scale, -1)
    grid = make_grid((images + 1) / 2, columns, padding=2, pad_value=1)
    return to_pil_image(grid.clamp(0, 1))


def strip(rows, columns=(), title=""):
    """Show rows of images, {name: (N, [C,] S, S) in [-1, 1]}, with names of columns."""
    n = max(len(images) for images in rows.values())
    figure, axes = plt.subplots(len(rows), squeeze=False)
    pictures = [tiles(images, len(images)) for images in rows.values()]
    inch = 6.5 / max(n, 5)  # a tile's side
    figure.set_size_inches(8, inch * len(rows) + 0.35 * bool(columns) + 0.35)
    for ax, name, picture in zip(axes[:, 0], rows, pictures, strict=True):
        ax.imshow(picture, extent=(0, picture.width / picture.height, 0, 1))
        ax.set(yticks=[], xticks=[], xlim=(0, n))
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
        ax.grid(False)
        ax.spines[:].set_visible(False)
    if columns:
        side = max(picture.width for picture in pictures) / pictures[0].height / n
        axes[0, 0].set_xticks([(k + 0.5) * side for k in range(len(columns))], columns)
        axes[0, 0].tick_params(length=0, labeltop=True, labelbottom=False)
    figure.suptitle(title)
    plt.show()


def band(ax, x, y, label, **options):
    """Draw the mean of y (seeds, len(x)) over the seeds, and the range as a band."""
    y = torch.as_tensor(y)
    (line,) = ax.plot(x, y.mean(0), label=label, **options)
    ax.fill_between(
        x, y.amin(0), y.amax(0), color=line.get_color(), alpha=0.2, linewidth=0
    )


def plot_mask(birth_stage, birth_step, step):
    """Show when each channel was active in a run of step steps, the first-born below.

    birth_stage, birth_step: (C,) ints, the stage and the step in which a channel was
    born; stage -1: it was not.
    """
    stages, births = (torch.as_tensor(x).cpu() for x in (birth_stage, birth_step))
    last = int(stages.max())
    order = torch.where(stages < 0, last + 1, stages).argsort(stable=True)
    figure, ax = plt.subplots()
    for stage in [*range(last + 1), -1]:
        rows = (stages[order] == stage).nonzero().flatten()
        if len(rows):
            start = births[order][rows].clamp(min=0) if stage >= 0 else step
            born, color = "not born", "#dddddd"
            if stage >= 0:
                color = plt.colormaps["cividis"](stage / max(last, 1))
                born = f"born in stage {stage}"
            name = f"{born}: {len(rows)}"
            ax.barh(rows, step - start, left=start, color=color, label=name)
    ax.set(xlabel="step", ylabel="channel, by birth", xlim=(0, step))
    figure.legend(loc="outside right")
    plt.show()


def plot_norms(norms):
    """Show the norms of the filters, {layer: (filters,)}, sorted, a curve for each."""
    figure, ax = plt.subplots(figsize=(9, 4.5))
    for k, (layer, own) in enumerate(norms.items()):
        own = torch.as_tensor(own).detach().cpu().sort().values
        color, line = plt.colormaps["cividis"](k / len(norms)), ("-", "--", ":")[k % 3]
        share = torch.linspace(0, 1, len(own))
        ax.plot(share, own, color=color, linestyle=line, label=layer)
    ax.set(xlabel="share of a layer's filters, sorted", ylabel="norm of a filter")
    ax.set_ylim(0)
    figure.legend(loc="outside right", fontsize=9)
    plt.show()


def to_picture(frame):
    """Return a frame, a PIL picture or a matplotlib figure (then closed), as RGB."""
    if isinstance(frame, Figure):
        file = io.BytesIO()
        frame.savefig(file, format="png")
        plt.close(frame)
        frame = Image.open(file)
    return frame.convert("RGB")


def to_png(picture):
    """Return the bytes of a PIL picture as PNG with up to 256 colours."""
    file = io.BytesIO()
    picture.quantize(256).save(file, "png", optimize=True)
    return file.getvalue()


def contact_sheet(pictures, titles):
    """Return pictures, all of one size, side by side as one, each under its title."""
    width, height = pictures[0].size
    columns = len(pictures) if len(pictures) * width <= 1100 else 2
    scale = min(1, 1000 / (columns * width))
    width, height = round(width * scale), round(height * scale)
    font = ImageFont.truetype(get_data_path() + "/fonts/ttf/DejaVuSans.ttf", 14)
    line, gap = 22, 8
    rows = math.ceil(len(pictures) / columns)
    size = (columns * (width + gap), rows * (height + line + gap))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for k, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        x, y = k % columns * (width + gap), k // columns * (height + line + gap)
        draw.text((x + width / 2, y + line / 2), title, "black", font, anchor="mm")
        small = picture.resize((width, height), Image.Resampling.LANCZOS)
        sheet.paste(small if scale < 1 else picture, (x, y + line))
    return sheet


def html_player(pictures, titles, label, captions, start):
    """Show a player that needs neither a kernel nor ipywidgets."""
    figures = []
    for picture, title, caption in zip(pictures, titles, captions, strict=True):
        source = f"data:image/png;base64,{base64.b64encode(to_png(picture)).decode()}"
        title, hidden = html.escape(title), " hidden" * (len(figures) != start)
        text = f"<b>{title}</b> &nbsp; {html.escape(caption)}"
        image = f'<img src="{source}" alt="{title}">'
        figures.append(
            f"<figure{hidden}>{image}<figcaption>{text}</figcaption></figure>"
        )
    last = len(figures) - 1
    slider = f'<input type="range" max="{last}" value="{start}" autocomplete="off">'
    label = f"<label>{html.escape(label)} {slider}</label>"
    play = '<button type="button" title="play or stop">▶</button>'
    display(HTML(f'<div class="player">{play} {label}{"".join(figures)}{MOVE}</div>'))


def player(frames, values, label, captions, start=0):
    """Show frames behind a slider and a play button, a caption under each.

    frames: PIL pictures or matplotlib figures, all of one size; values: what the slider
    stands at, as short text; label: the name of what it moves; captions: a sentence for
    each frame; start: the first frame to be seen. A reader without a kernel sees four
    or five of the frames side by side: say in the text what they show.
    """
    pictures = [to_picture(frame) for frame in frames]
    if not len({picture.size for picture in pictures}) == 1 < len(pictures):
        raise ValueError("a player wants two or more frames, all of one size")
    titles = [f"{label} = {value}" for value in values]
    if os.environ.get("PLAYERS") == "html":  # site.py and Colab ask so
        return html_player(pictures, titles, label, captions, start)
    children = []
    for picture, title, caption in zip(pictures, titles, captions, strict=True):
        text = f"<b>{html.escape(title)}</b> &nbsp; {html.escape(caption)}"
        image = widgets.Image(value=to_png(picture), format="png")
        image.layout = {"max_width": "100%", "align_self": "flex-start"}
        children.append(widgets.VBox([image, widgets.HTML(text)]))
    last = len(children) - 1
    stack = widgets.Stack(children, selected_index=start)
    slider = widgets.IntSlider(start, 0, last, description=label, readout=False)
    slider.style.description_width = "initial"  # else long labels are cut
    slider.layout.width = "400px"
    play = widgets.Play(value=start, min=0, max=last, interval=400)
    widgets.jslink((play, "value"), (slider, "value"))
    widgets.jslink((slider, "value"), (stack, "selected_index"))
    bundle = widgets.VBox([widgets.HBox([play, slider]), stack])._repr_mimebundle_()
    n = len(pictures)
    if n > 5:
        n = 5 if 5 * pictures[0].width <= 1100 else 4
    shown = [round(k * last / (n - 1)) for k in range(n)]
    sheet = contact_sheet([pictures[k] for k in shown], [titles[k] for k in shown])
    bundle["image/png"] = base64.b64encode(to_png(sheet)).decode()
    bundle["text/plain"] = "Frames of a slider: " + ", ".join(titles[k] for k in shown)
    display(bundle, raw=True)


def table(head, *rows):
    """Show a table: its first column aligned to the left, the others to the right."""
    lines = [head, [":--"] + ["--:"] * (len(head) - 1), *rows]
    text = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
    display(Markdown(text))


def check(answer, exercise):
    """Print whether the answer to an exercise, say "10.1", is right.

    What is right stands out of sight, in the table ANSWERS of answers/10.py.
    """
    file = Path(__file__).parent / "answers" / f"{exercise[:2]}.py"
    judge(answer, **runpy.run_path(str(file))["ANSWERS"][exercise])


def judge(answer, want, hint, tol=0.01):
    """Print "Right.", "Not yet: ..." or "Not answered yet".

    want: the right number (met to within tol of it), text or bool; or else a function
    that gets the answer and returns whether it is right.
    """
    if answer is ...:
        print("Not answered yet")
        return
    try:
        if callable(want):
            right = bool(want(answer))
        elif isinstance(want, Number) and not isinstance(want, bool):
            right = abs(float(answer) - want) <= tol * (abs(want) or 1)
        else:
            if hasattr(answer, "item"):  # of numpy or torch
                answer = answer.item()
            right = type(answer) is type(want) and answer == want
    except Exception as error:  # a wrong answer must not stop the notebook
        right, hint = False, f"{type(error).__name__}: {error}"
    print("Right." if right else f"Not yet: {hint}")
