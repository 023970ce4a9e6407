"""A page to play with: a frozen model's answers beside those with adapters, on your pictures, with a box to steer by.

    pip install -e ".[demo]"
    python examples/app.py                                            # the demo model; trains two adapters, once
    python examples/app.py --model llava-hf/llava-1.5-7b-hf --adapter mine=runs/finetune_vqa/adapter

Choose a picture, ask, drag a box, move an adapter's strength or switch it off: both answers stream, and what was edited
is marked orange, on the picture and in the prompt. The page listens on this machine alone, sends nothing anywhere, and
loads nothing from anywhere.
"""

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before gradio is imported, which reads them.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import gradio as gr  # pyright: ignore[reportMissingImports]
from app_look import CANVAS_CSS, CANVAS_HTML, CANVAS_JS, CSS, card, how_edited, safe, scene, tokens
from app_model import MAX_QUESTION, MAX_STRENGTH, Edits, Playground, Seen, check_question, check_strengths, read_box
from app_pictures import MAX_BYTES, PictureRefusedError, decode_picture
from app_train import demo_adapters
from common import ASSETS, load_base
from gradio.themes import Default  # pyright: ignore[reportMissingImports]
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

DEMO_MODEL = ASSETS / "demo-llava"
DEMO_DATA = ASSETS / "demo-vqa"
NUM_PICTURES = 8


@dataclass(frozen=True, eq=False)
class Shown:
    """The picture that a visitor has before them; pictures are never changed, so visitors may share one."""

    picture: Image.Image
    seen: Seen

    def __deepcopy__(self, memo: Any) -> "Shown":
        """Gradio copies the state that a page starts with for each visitor."""
        return self


def main() -> None:
    """Load the model and its adapters, and serve the page until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO_MODEL), help="a folder or a name on the hub")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=FOLDER", help="may be repeated")
    parser.add_argument("--output", default="runs/app", help="where the demo's own adapters are kept")
    parser.add_argument("--host", default="127.0.0.1", help="any other address lets the network in")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args()
    adapters = parse_adapters(args.adapter)
    if not adapters and Path(args.model).resolve() != DEMO_MODEL:
        parser.error("give at least one `--adapter NAME=FOLDER`; only the demo model has adapters of its own")
    model = load_base(AutoModelForImageTextToText, args.model)
    processor = AutoProcessor.from_pretrained(args.model)
    adapters = adapters or demo_adapters(model, processor, Path(args.output))
    try:
        play = Playground(model, processor, adapters, args.max_new_tokens)
    except ValueError as error:
        parser.error(str(error))
    page = make_page(play, Path(args.model).name)
    print(f"http://{args.host}:{args.port}", flush=True)
    page.launch(
        server_name=args.host,
        server_port=args.port,
        share=False,
        quiet=True,
        max_file_size=MAX_BYTES,
        state_session_capacity=200,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        css=CSS,
        theme=Default(
            primary_hue="orange",
            neutral_hue="slate",
            font=["system-ui", "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
        ),
    )


def parse_adapters(given: Sequence[str]) -> dict[str, Path]:
    """Read `NAME=FOLDER`s. Raises SystemExit for another form, or a name given twice."""
    adapters: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder) or name in adapters:
            raise SystemExit(f"--adapter (={text}) must be NAME=FOLDER, each name once")
        adapters[name] = Path(folder)
    return adapters


# What the page does ----------------------------------------------------------------------------------------------


class Handlers:
    """What happens on the page's events; holds nothing of any visitor."""

    def __init__(self, play: Playground) -> None:
        """Keep the model, and the demo's pictures with their questions."""
        self.play = play
        pictures = demo_pictures(NUM_PICTURES)
        self.demo = [Shown(picture, play.see(picture)) for picture, _ in pictures]
        self.questions = [questions for _, questions in pictures]

    def choose(self, event: gr.SelectData) -> tuple[Any, ...]:
        """Show one of the demo's pictures."""
        return *self._show(self.demo[event.index]), gr.Dataset(samples=[[q] for q in self.questions[event.index]])

    def upload(self, path: str | None, shown: Shown) -> tuple[Any, ...]:
        """Show a visitor's picture, or say why it is not taken and keep the one before."""
        if path is None:
            return shown, gr.skip(), "", gr.skip(), gr.skip(), gr.skip()
        file = Path(path)
        try:
            picture = decode_picture(file.read_bytes() if file.stat().st_size <= MAX_BYTES else bytes(MAX_BYTES + 1))
            return self._show(Shown(picture, self.play.see(picture)))
        except PictureRefusedError as error:
            return shown, gr.skip(), _notice(str(error)), gr.skip(), gr.skip(), gr.skip()
        finally:
            file.unlink(missing_ok=True)

    def _show(self, shown: Shown) -> tuple[Any, ...]:
        canvas = gr.HTML(value=[], scene=scene(shown.seen))  # pyright: ignore[reportArgumentType]
        return shown, canvas, "", card("base", state="waiting"), card("edited", state="waiting"), ""

    def ask(self, shown: Shown, question: str, box: Any, *controls: Any) -> Iterator[tuple[Any, ...]]:
        """Stream the base's answer, then the edited one, then show where it was edited."""
        switches = dict(zip(self.play.names, zip(controls[::2], controls[1::2], strict=True), strict=True))
        chosen = {name: float(strength) for name, (on, strength) in switches.items() if on}
        try:
            place = read_box(box, shown.seen)
            check_question(question)
            check_strengths(chosen)
        except ValueError as error:
            yield gr.skip(), card("base", state="waiting"), card("edited", str(error), state="error"), ""
            return
        waiting = [name for name in chosen if place is None and self.play.needs_box(name)]
        strengths = {name: strength for name, strength in chosen.items() if name not in waiting}
        how = how_edited(strengths, waiting, place)
        base = ""
        wait = card("edited", how=how, state="waiting")
        try:
            yield gr.HTML(scene=scene(shown.seen)), card("base", state="streaming"), wait, ""
            text = ""
            for text in self.play.answer(shown.picture, question, {}):
                yield gr.skip(), card("base", text, state="streaming"), wait, gr.skip()
            base, edited, edits = card("base", text, "no edits"), "", Edits()
            for edited in self.play.answer(shown.picture, question, strengths, place, edits):
                yield gr.skip(), base, card("edited", edited, how, "streaming"), gr.skip()
            yield gr.HTML(scene=scene(shown.seen, edits)), base, card("edited", edited, how), tokens(edits)
        except ValueError as error:
            yield gr.skip(), base or card("base", state="waiting"), card("edited", str(error), how, "error"), ""


def demo_pictures(num: int) -> list[tuple[Image.Image, list[str]]]:
    """Return pictures of the demo's test set with several objects, and some questions that both tasks ask of each."""
    code, base = _questions("code"), _questions("base")
    chosen = [image for image, questions in code.items() if len(questions) > 1 and image in base][:num]
    folder = DEMO_DATA / "images" / "test"
    return [
        (
            decode_picture((folder / f"DEMO_test_{image:012d}.png").read_bytes()),
            [*code[image][:2], *base[image][:2], "describe the image"],
        )
        for image in chosen
    ]


def _questions(task: str) -> dict[int, list[str]]:
    asked: dict[int, list[str]] = {}
    for row in json.loads((DEMO_DATA / task / "test_questions.json").read_text())["questions"]:
        asked.setdefault(row["image_id"], []).append(row["question"])
    return asked


def _notice(text: str) -> str:
    return f'<p class="notice" role="alert">{safe(text)}</p>' if text else ""


# How it is laid out ----------------------------------------------------------------------------------------------


def make_page(play: Playground, model_name: str) -> gr.Blocks:
    """Lay the page out, and say which event does what."""
    handlers = Handlers(play)
    first = handlers.demo[0]
    with gr.Blocks(title="vlreft", analytics_enabled=False, delete_cache=(600, 600)) as page:
        shown = gr.State(first, time_to_live=3600)
        gr.HTML(
            f"<h1>vlreft</h1><p>The frozen {safe(model_name)} beside itself with adapters: small edits of a few hidden "
            "states. Orange is where they act.</p>",
            elem_id="title",
        )
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=320):
                canvas = gr.HTML(
                    value=[],  # pyright: ignore[reportArgumentType]
                    scene=scene(first.seen),
                    html_template=CANVAS_HTML,
                    css_template=CANVAS_CSS,
                    js_on_load=CANVAS_JS,
                    elem_id="canvas",
                )
                pictures = gr.Gallery(
                    [one.picture for one in handlers.demo],
                    columns=NUM_PICTURES,
                    rows=1,
                    height="auto",
                    show_label=False,
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    format="png",
                    elem_id="pictures",
                )
                file = gr.UploadButton("upload a picture", size="sm", elem_id="upload")
                notice = gr.HTML("", elem_id="notice")
            with gr.Column(scale=7, min_width=420):
                with gr.Row(equal_height=True):
                    question = gr.Textbox(
                        handlers.questions[0][0],
                        show_label=False,
                        placeholder="a question about the picture",
                        max_length=MAX_QUESTION,
                        max_lines=3,
                        container=False,
                        scale=6,
                        elem_id="question",
                    )
                    go = gr.Button("ask", variant="primary", scale=1, min_width=90, elem_id="ask")
                samples = gr.Dataset(
                    components=["textbox"],
                    samples=[[q] for q in handlers.questions[0]],
                    label="questions about this picture",
                    elem_id="questions",
                )
                with gr.Row(equal_height=True):
                    base = gr.HTML(card("base", state="waiting"), elem_id="base")
                    edited = gr.HTML(card("edited", state="waiting"), elem_id="edited")
                controls = _controls(play)
                words = gr.HTML("", elem_id="words")
        # One answer at a time, whoever asks: see `app_model`. The rest waits in line.
        one = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "hidden"}
        around = [shown, canvas, notice, base, edited, words]
        pictures.select(handlers.choose, None, [*around, samples], api_visibility="private", **one)
        file.upload(handlers.upload, [file, shown], around, api_visibility="private", **one)
        samples.click(lambda row: row[0], samples, question, api_visibility="private", queue=False)
        asking = {"inputs": [shown, question, canvas, *controls], "outputs": [canvas, base, edited, words], **one}
        gr.on([go.click, question.submit], handlers.ask, api_name="ask", **asking)
    return page.queue(max_size=200, default_concurrency_limit=1)


def _controls(play: Playground) -> list[Any]:
    """Make a switch and a strength for each adapter, in turns."""
    controls: list[Any] = []
    with gr.Group():
        for name in play.names:
            with gr.Row(equal_height=True):
                controls += [
                    gr.Checkbox(
                        True, label=f"adapter {name}", info=play.describe(name), elem_id=f"on-{name}", min_width=180
                    ),
                    gr.Slider(0, MAX_STRENGTH, 1, step=0.05, label="strength", elem_id=f"strength-{name}"),
                ]
    return controls


if __name__ == "__main__":
    main()
