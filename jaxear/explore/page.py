"""The explorer's page, in Gradio."""

from __future__ import annotations

import html
import json
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from jaxear.errors import UserError
from jaxear.explore.pictures import data_uri, gif, jpeg, png
from jaxear.explore.session import REACH, STEP, Ear, Explorer

CSS = Path(__file__).with_name("page.css")
FIRST = 8  # sliders in sight

# The picture is exchanged in place: an <img> that is made anew for each would flicker. "submit"
# says that it has come to rest: what follows then does not hold up a slider that is being dragged.
_EAR_TEMPLATE = '<img alt="" decoding="sync"><p role="status"></p>'
_EAR_SCRIPT = """
const show = () => {
  const {picture, name} = props.value;
  const image = element.querySelector("img"), caption = element.querySelector("p");
  image.src = picture;
  if (caption.textContent !== name) { caption.textContent = name; image.alt = name; }
};
show();
let timer;
watch("value", () => {
  show();
  clearTimeout(timer);
  timer = setTimeout(() => trigger("submit"), 150);
});
"""
_NEIGHBOURS_SCRIPT = """
element.addEventListener("click", event => {
  const button = event.target.closest("button[data-row]");
  if (button) trigger("click", {row: Number(button.dataset.row)});
});
"""
_SAVE_SCRIPT = """
file => {
  if (!file) return;
  const link = document.createElement("a");
  link.href = file.content; link.download = file.name;
  link.click();
}
"""


def build(explorer: Explorer) -> gr.Blocks:
    """The page of an explorer."""
    page = gr.Blocks(title="jaxear explorer", analytics_enabled=False, delete_cache=(600, 600))
    labels = explorer.labels
    mean = explorer.mean()
    # Without Gradio's queue: a request is answered at once, where the queue would take two, and
    # would sum up all its events in a table after each of them.
    once: dict[str, Any] = {
        "queue": False,
        "show_progress": "hidden",
        "api_visibility": "private",
    }
    # Of the events that come while one is being served, the browser sends the last.
    live: dict[str, Any] = once | {"trigger_mode": "always_last"}
    with page:
        ear = gr.State(mean)
        first, second = gr.State(mean), gr.State(explorer.from_run(0) if explorer.names else mean)
        gr.HTML(_headline(explorer), elem_id="head", js_on_load=None)
        with gr.Row(elem_id="columns"):
            with gr.Column(elem_id="left"):
                _heading("Start from")
                with gr.Row(elem_classes="pair"):
                    to_mean = gr.Button("Mean ear", size="sm", elem_id="to-mean")
                    to_random = gr.Button("Random ear", size="sm", elem_id="to-random")
                known = gr.Dropdown(
                    [(name, row) for row, name in enumerate(explorer.names)],
                    value=None,
                    label="An ear of the run",
                    visible=bool(explorer.names),
                    elem_id="known",
                )
                upload = gr.UploadButton(
                    "Upload a photograph", size="sm", file_types=["image"], elem_id="upload"
                )
                left_ear = gr.Checkbox(
                    label="It shows a left ear", elem_id="left-ear", container=False
                )
                message = gr.HTML("", elem_id="message", js_on_load=None)
                _heading("Morph")
                ends = gr.HTML(
                    _ends(explorer, first.value, second.value), elem_id="ends", js_on_load=None
                )
                with gr.Row(elem_classes="pair"):
                    set_first = gr.Button("This ear as A", size="sm", elem_id="set-a")
                    set_second = gr.Button("This ear as B", size="sm", elem_id="set-b")
                morph = _slider("From A to B", 0, 1, 0.01, elem_id="morph")
                _heading("Save")
                save_png = gr.Button("Picture (PNG)", size="sm", elem_id="save-png")
                animation = gr.Dropdown(
                    ["A to B and back", *(f"{label}, end to end" for label in labels)],
                    type="index",
                    value="A to B and back",
                    label="Animation",
                    elem_id="animation",
                )
                save_gif = gr.Button("Animation (GIF)", size="sm", elem_id="save-gif")
                file = gr.JSON(visible=False)
            with gr.Column(elem_id="middle"):
                with gr.Row(elem_id="stage"):
                    photo = gr.HTML("", elem_id="photo", js_on_load=None)
                    picture = gr.HTML(
                        _shown(explorer, mean, mean.shown),
                        html_template=_EAR_TEMPLATE,
                        js_on_load=_EAR_SCRIPT,
                        elem_id="ear",
                    )
                with gr.Row(elem_id="nearest", visible=bool(explorer.names)):
                    _heading("Nearest ears of the run")
                    metric = gr.Radio(
                        [("Euclid, in SD", "euclidean"), ("cosine", "cosine")],
                        value="euclidean",
                        label="Nearest by",
                        elem_id="metric",
                        container=False,
                    )
                neighbours = gr.HTML("", js_on_load=_NEIGHBOURS_SCRIPT, elem_id="neighbours")
            with gr.Column(elem_id="right"):
                _heading("Components, in SD")
                make = partial(_slider, minimum=-REACH, maximum=REACH, step=STEP, signed=True)
                sliders = [make(label) for label in labels[:FIRST]]
                if labels[FIRST:]:
                    with gr.Accordion("More components", open=False, elem_id="more"):
                        sliders += [make(label) for label in labels[FIRST:]]

        def show(new: Ear) -> dict[Any, Any]:
            """Everything that changes when another ear is started from."""
            return {
                ear: new,
                picture: _shown(explorer, new, new.shown),
                photo: _photo(explorer, new),
                message: "",
                **dict(zip(sliders, _set(new), strict=True)),
            }

        started = [ear, picture, photo, message, *sliders]

        def on_upload(path: str, is_left: bool) -> dict[Any, Any]:
            try:
                return show(explorer.from_photo(path, side="left" if is_left else "unknown"))
            except UserError as error:
                return {message: f'<p role="alert">{html.escape(str(error))}</p>'}
            finally:
                Path(path).unlink(missing_ok=True)  # a person's photograph is not kept

        def on_random() -> dict[Any, Any]:
            return show(explorer.random(np.random.default_rng()))

        def on_neighbour(event: gr.EventData) -> dict[Any, Any]:
            return show(explorer.from_run(int(event.row)))

        to_mean.click(lambda: show(explorer.mean()), None, started, **once)
        to_random.click(on_random, None, started, **once)
        known.input(lambda row: show(explorer.from_run(row)), known, started, **once)
        upload.upload(on_upload, [upload, left_ear], started, **once)
        neighbours.click(on_neighbour, None, started, **once)

        for slider in sliders:
            slider.input(
                lambda start, *values: _shown(explorer, start, values),
                [ear, *sliders], picture, **live,
            )  # fmt: skip

        def on_morph(a: Ear, b: Ear, share: float) -> list[Any]:
            new = explorer.morph(a, b, share)
            return [new, _shown(explorer, new, new.shown), *_set(new)]

        morph.input(on_morph, [first, second, morph], [ear, picture, *sliders], **live)

        def on_set(a: Ear, b: Ear, start: Ear, *values: float, end: str) -> list[Any]:
            new = explorer.settle(start, values)
            a, b = (new, b) if end == "A" else (a, new)
            return [a, b, _ends(explorer, a, b), 0 if end == "A" else 1]

        for button, end in ((set_first, "A"), (set_second, "B")):
            button.click(
                partial(on_set, end=end), [first, second, ear, *sliders],
                [first, second, ends, morph], **once,
            )  # fmt: skip

        def on_change(start: Ear, by: str, *values: float) -> str:
            return _neighbours(explorer, start, values, by)

        if explorer.names:
            gr.on(
                [picture.submit, metric.input, page.load],
                on_change, [ear, metric, *sliders], neighbours, **live,
            )  # fmt: skip

        def on_save_png(start: Ear, *values: float) -> dict[str, str]:
            image = explorer.picture(explorer.moved(start, values))
            content = png(image, _notes(explorer, start, values))
            return {"name": "ear.png", "content": data_uri(content, "image/png")}

        def on_save_gif(kind: int, a: Ear, b: Ear, start: Ear, *values: float) -> dict[str, str]:
            if kind == 0:
                name, frames = "morph", explorer.morph_frames(a, b)
            else:
                name, frames = f"pc{kind}", explorer.traversal(start, list(values), kind - 1)
            return {"name": f"{name}.gif", "content": data_uri(gif(frames), "image/gif")}

        save_png.click(on_save_png, [ear, *sliders], file, **once).then(
            None, file, None, js=_SAVE_SCRIPT, queue=False
        )
        save_gif.click(on_save_gif, [animation, first, second, ear, *sliders], file, **once).then(
            None, file, None, js=_SAVE_SCRIPT, queue=False
        )
    return page


def _heading(text: str) -> gr.HTML:
    return gr.HTML(f"<h2>{text}</h2>", js_on_load=None, elem_classes="heading")


def _slider(
    label: str, minimum: float, maximum: float, step: float, *, signed: bool = False, **options: Any
) -> gr.Slider:
    classes = ["slider", "component"] if signed else ["slider"]
    return gr.Slider(
        minimum, maximum, 0, step=step, label=label, buttons=[], elem_classes=classes, **options
    )


def _headline(explorer: Explorer) -> str:
    run = html.escape(str(explorer.model.run_dir))
    total = 100 * float(explorer.eigenears.explained_variance_ratio_.sum())
    where = "fitted just now to the training ears of" if explorer.fitted else "of"
    return (
        f"<h1>Eigenears</h1><p>{explorer.n_components} components {where} {run} explain "
        f"{total:.0f} % of the variance of the codes of {explorer.eigenears.n_samples_:,} ears</p>"
    )


def _shown(explorer: Explorer, ear: Ear, values: Any) -> dict[str, str]:
    code = explorer.moved(ear, values)
    moved = not np.array_equal(code, ear.code)
    image = jpeg(explorer.picture(code))
    name = f"{ear.name}, moved" if moved else ear.name
    return {"picture": data_uri(image, "image/jpeg"), "name": name[:1].upper() + name[1:]}


def _set(ear: Ear) -> list[Any]:
    """The sliders, set to an ear."""
    ends: dict[str, Any] = {"minimum": -ear.reach, "maximum": ear.reach}
    return [gr.Slider(value=round(float(value), 1), **ends) for value in ear.shown]


def _photo(explorer: Explorer, ear: Ear) -> str:
    if ear.photo is None:
        return ""
    source = data_uri(jpeg(ear.photo), "image/jpeg")
    return (
        f'<img src="{source}" alt="{html.escape(ear.name)}"><p>Photograph, as the model sees it</p>'
    )


def _ends(explorer: Explorer, a: Ear, b: Ear) -> str:
    figures = "".join(
        f'<figure><img src="{data_uri(jpeg(explorer.picture(end.code)), "image/jpeg")}" alt="">'
        f"<figcaption>{letter}: {html.escape(end.name)}</figcaption></figure>"
        for letter, end in (("A", a), ("B", b))
    )
    return f'<div class="pair">{figures}</div>'


def _neighbours(explorer: Explorer, ear: Ear, values: Any, metric: Any) -> str:
    code = explorer.moved(ear, values)
    but = ear.row if np.array_equal(code, ear.code) else None
    found = explorer.neighbours(code, metric, but=but)
    if not found:
        return (
            '<p class="note">The mean ear lies in no direction, so that no ear is near it by '
            "cosine. Move a slider, or take Euclid.</p>"
        )
    unit = " SD" if metric == "euclidean" else ""
    items = []
    for n in found:
        name = html.escape(n.name)
        source = data_uri(jpeg(explorer.thumbnail(n.row), quality=80, side=96), "image/jpeg")
        items.append(
            f'<li><button data-row="{n.row}" title="Start from {name}"><img src="{source}" alt="">'
            f"<span>{name}</span><span>{n.value:.2f}{unit}</span></button></li>"
        )
    return f"<ul>{''.join(items)}</ul>"


def _notes(explorer: Explorer, ear: Ear, values: Any) -> dict[str, str]:
    model = explorer.model
    scores = explorer.scores(explorer.moved(ear, values))
    return {
        "Software": "jaxear",
        "Title": ear.name,
        "Description": json.dumps(
            {
                "run": str(model.run_dir),
                "checkpoint": model.checkpoint,
                "scores_sd": [round(float(score), 3) for score in scores],
            }
        ),
    }
