"""How the page looks: the canvas on which a box is dragged, the cards of the answers, colours; no gradio in here."""

import base64
import html
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

from app_model import Edits, Seen

CANVAS_HTML = """
<canvas width="448" height="448" aria-label="the picture; drag a box on it"></canvas>
<div class="below"><span class="say"></span><button type="button" class="clear">clear</button>
<label class="marks"><input type="checkbox" class="show" checked> edited patches</label></div>
"""

CANVAS_CSS = """
canvas { width: 100%; border-radius: 10px; cursor: crosshair; touch-action: none; display: block;
         border: 1px solid var(--border-color-primary); }
.below { display: flex; gap: 10px; align-items: center; min-height: 30px; margin-top: 6px; font-size: 13px;
         white-space: nowrap; color: var(--quiet); }
.say { flex: 1; }
.clear { text-decoration: underline; cursor: pointer; background: none; border: none; color: inherit;
         font-size: inherit; }
.marks { display: flex; gap: 5px; align-items: center; cursor: pointer; }
.marks input { accent-color: #f97316; }
"""

# `props.value` is the box, [left, top, right, bottom] in pixels of the picture as the model gets it, or []; the box is
# all that the browser sends. `props.scene` is what the server says: the picture, its patches, where edits were made.
CANVAS_JS = """
const canvas = element.querySelector('canvas'), ink = canvas.getContext('2d');
const say = element.querySelector('.say'), clear = element.querySelector('.clear');
const show = element.querySelector('.show'), marks = element.querySelector('.marks');
const image = new Image();
let start = null, dragged = null;

function draw() {
    const scene = props.scene, box = dragged || props.value || [];
    const scale = canvas.width / scene.width;
    ink.imageSmoothingEnabled = scene.width > 200;
    ink.clearRect(0, 0, canvas.width, canvas.height);
    if (image.complete && image.naturalWidth) ink.drawImage(image, 0, 0, canvas.width, canvas.height);
    const patches = scene.patches || [], most = Math.max(0, ...patches);
    const w = canvas.width / scene.cols, h = canvas.height / scene.rows;
    if (show.checked) patches.forEach((share, at) => {
        if (!share) return;
        const x = (at % scene.cols) * w, y = Math.floor(at / scene.cols) * h;
        ink.fillStyle = `rgba(249, 115, 22, ${0.12 + 0.4 * share / most})`;
        ink.fillRect(x, y, w, h);
        ink.strokeStyle = 'rgba(249, 115, 22, 0.9)';
        ink.lineWidth = 1;
        ink.strokeRect(x + 0.5, y + 0.5, w - 1, h - 1);
    });
    if (box.length === 4) {
        const sides = [box[0], box[1], box[2] - box[0], box[3] - box[1]].map(side => side * scale);
        ink.lineWidth = 5; ink.strokeStyle = 'rgba(255, 255, 255, 0.9)'; ink.strokeRect(...sides);
        ink.lineWidth = 2.5; ink.strokeStyle = '#2563eb'; ink.strokeRect(...sides);
    }
    clear.style.display = (props.value || []).length ? '' : 'none';
    marks.style.display = most ? '' : 'none';
    say.textContent = scene.why_not || (box.length === 4 ?
        `box ${box.join(', ')}` :
        'drag a box to steer a region');
}

function load() {
    canvas.width = Math.max(448, props.scene.width);
    canvas.height = Math.round(canvas.width * props.scene.height / props.scene.width);
    if (image.src === props.scene.src) draw();
    else image.src = props.scene.src;
}

function pixel(event) {
    const place = canvas.getBoundingClientRect(), scene = props.scene;
    const x = (event.clientX - place.left) / place.width * scene.width;
    const y = (event.clientY - place.top) / place.height * scene.height;
    return [Math.min(Math.max(x, 0), scene.width), Math.min(Math.max(y, 0), scene.height)];
}

function put(box) { props.value = box; trigger('input'); draw(); }

canvas.addEventListener('pointerdown', event => {
    if (props.scene.why_not) return;
    start = pixel(event);
    canvas.setPointerCapture(event.pointerId);
});
canvas.addEventListener('pointermove', event => {
    if (!start) return;
    const end = pixel(event);
    dragged = [Math.min(start[0], end[0]), Math.min(start[1], end[1])].map(Math.floor)
        .concat([Math.max(start[0], end[0]), Math.max(start[1], end[1])].map(Math.ceil));
    draw();
});
canvas.addEventListener('pointerup', () => {
    const box = dragged;
    start = dragged = null;
    if (box && box[2] - box[0] >= 2 && box[3] - box[1] >= 2) put(box);
    else draw();
});
canvas.addEventListener('pointercancel', () => { start = dragged = null; draw(); });
clear.addEventListener('click', () => put([]));
show.addEventListener('change', draw);
image.addEventListener('load', draw);
watch(['scene', 'value'], load);
load();
"""

CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto; --quiet: color-mix(in srgb, var(--body-text-color)
                    68%, transparent); }
#title h1 { font-size: 24px; margin: 0 0 2px; }
#title p, .small { color: var(--quiet); font-size: 13.5px; margin: 0; }
#title, #base, #edited, #words, #canvas, #notice { padding: 0; }
#title > *, #base > *, #edited > *, #words > *, #canvas > *, #notice > * { padding: 0; }
#pictures, #pictures div { height: auto !important; min-height: 0 !important; max-height: none; overflow: hidden; }
#pictures .grid-container { grid-template: none / repeat(8, 1fr) !important; gap: 5px;
                             grid-auto-rows: auto !important; }
#pictures .thumbnail-item { min-width: 0; width: 100%; height: auto; aspect-ratio: 1; }
#pictures img { image-rendering: pixelated; }
.card { border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 12px 16px; min-height: 128px;
        background: var(--block-background-fill); display: flex; flex-direction: column; gap: 6px; }
.card .who { font-size: 13px; font-weight: 600; color: var(--quiet); }
.card .text { font-size: 21px; line-height: 1.35; flex: 1; overflow-wrap: anywhere; white-space: pre-wrap; }
.card .how { font-size: 12.5px; color: var(--quiet); }
.card.edited { border-left: 5px solid #f97316; }
.card.base { border-left: 5px solid #94a3b8; }
.card.error .text { font-size: 15px; color: #dc2626; }
.card[data-state=streaming] .text::after { content: "▍"; color: #f97316; }
.tokens { line-height: 2.1; font-family: var(--font-mono); font-size: 13px; }
.tokens span { padding: 3px 6px; margin-right: 3px; border-radius: 5px; border: 1px solid var(--border-color-primary);
               white-space: pre-wrap; }
.notice { color: #dc2626; font-size: 14px; }
footer { display: none !important; }
"""


def safe(text: str) -> str:
    """Escape a text from a visitor or a model for HTML, and for the templates that gradio fills in the browser."""
    escaped = html.escape(text)
    return escaped.replace("{", "&#123;").replace("}", "&#125;").replace("$", "&#36;").replace("`", "&#96;")


def scene(seen: Seen, edits: Edits | None = None) -> dict[str, Any]:
    """Return what the canvas draws."""
    file = BytesIO()
    seen.picture.save(file, "PNG")
    return {
        "src": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}",
        "width": seen.picture.width,
        "height": seen.picture.height,
        "rows": seen.rows,
        "cols": seen.cols,
        "why_not": seen.why_not,
        "patches": [round(share, 5) for share in edits.patches] if edits is not None else [],
    }


def card(kind: str, text: str = "", how: str = "", state: str = "done") -> str:
    """Return an answer's card; `kind` is "base" or "edited", `state` "waiting", "streaming", "done" or "error"."""
    who = {"base": "frozen base", "edited": "with adapters"}[kind]
    return (
        f'<div class="card {kind} {state}" data-state="{state}"><div class="who">{who}</div>'
        f'<div class="text">{safe(text)}</div><div class="how">{safe(how)}</div></div>'
    )


def how_edited(strengths: Mapping[str, float], needing_box: Sequence[str], box: Sequence[int] | None) -> str:
    """Say which adapters act, and which of those switched on do not because there is no box."""
    acting = ", ".join(f"{name} at {strength:g}" for name, strength in strengths.items())
    line = f"{acting}{f', box {list(box)}' if box and acting else ''}" if acting else "no adapter acts"
    waiting = " and ".join(needing_box)
    return f"{line}; {waiting} edits inside a box: drag one on the picture" if waiting else line


def tokens(edits: Edits) -> str:
    """Return the prompt's tokens, those edited in orange, the more the larger the edit."""
    most = max((share for _, share in edits.words), default=0.0)
    spans = []
    for text, share in edits.words:
        alpha = 0.15 + 0.5 * share / most if share else 0.0
        style = f' class="on" style="background: rgba(249, 115, 22, {alpha:.2f})" title="{share:.3f}"' if share else ""
        spans.append(f"<span{style}>{safe(text)}</span>")
    largest = max([most, *edits.patches], default=0.0)
    line = f"the largest edit is {largest:.2f} of its hidden state's length" if largest else "nothing was edited"
    head = '<p class="small">the prompt as the model reads it</p>'
    return f'{head}<div class="tokens">{" ".join(spans)}</div><p class="small">{line}</p>'
