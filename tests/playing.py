"""What the tests of the page share: two adapters that are heard, the answers to expect, a visitor with a browser."""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from zoo import shake

import vlreft

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

from app_model import Playground
from app_pictures import decode_picture

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "assets" / "demo-llava"
DATA = ROOT / "assets" / "demo-vqa"
PICTURES = DATA / "images" / "test"
QUESTION = "what is the color of the circle ?"
PATIENCE = 60  # seconds, on a busy machine

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = [name for name in ("gradio", "selenium") if importlib.util.find_spec(name) is None]
MISSING += [] if CHROMIUM else ["chromium"]
MISSING += [] if DRIVER else ["chromedriver (apt-get install chromium-driver)"]


# The model -----------------------------------------------------------------------------------------------------------


def _make_adapter(model, folder, site, positions):
    item = vlreft.Intervention("loreft", site=site, layers="all", positions=positions, rank=4, scale=3.0)
    reft = shake(vlreft.attach(model, vlreft.ReftConfig(item)), 1)
    reft.save_pretrained(folder)
    reft.detach()
    return folder


def make_adapters(home):
    """Write down two adapters of the demo model that say something else than it; return their folders by name."""
    model = AutoModelForImageTextToText.from_pretrained(DEMO, dtype=torch.float32).eval()
    return {
        "words": _make_adapter(model, home / "words", "text", "prompt:l4"),
        "region": _make_adapter(model, home / "region", "vision", "patches:box"),
    }


def make_play(adapters):
    model = AutoModelForImageTextToText.from_pretrained(DEMO, dtype=torch.float32).eval()
    return Playground(model, AutoProcessor.from_pretrained(DEMO), adapters)


def picture_number(number):
    return decode_picture(sorted(PICTURES.iterdir())[number].read_bytes())


def direct(play, picture, question, strengths, box=None):
    """The answer that the model gives when it is called as the README does it, without the page's thread."""
    batch = play.collator.prompts([{"image": picture, "question": question}])
    scopes = [reft.scaled(strengths[n]) if n in strengths else reft.disabled() for n, reft in play.refts.items()]
    with scopes[0], scopes[1], play.refts["region"].boxes([box or (0, 0, 64, 64)]):
        generated = play.model.generate(**batch, max_new_tokens=64, do_sample=False)
    return play.collator.decode(generated, batch["input_ids"].shape[1])[0]


def shown_pictures():
    """The page's own choice of pictures, by asking the page's script without gradio's help."""
    rows = json.loads((DATA / "code" / "test_questions.json").read_text())["questions"]
    base = {row["image_id"] for row in json.loads((DATA / "base" / "test_questions.json").read_text())["questions"]}
    ids = [row["image_id"] for row in rows]
    chosen = [number for number in dict.fromkeys(ids) if ids.count(number) > 1 and number in base]
    return [decode_picture((PICTURES / f"DEMO_test_{number:012d}.png").read_bytes()) for number in chosen[:8]]


# The page ------------------------------------------------------------------------------------------------------------


def start_page(*options, script=("examples/app.py",)):
    """Start the page on a free port of this machine; return the process and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-u", *script, "--port", str(port), *options]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    address = f"http://127.0.0.1:{port}"
    for line in process.stdout:
        if line.strip() == address:
            return process, address
    raise AssertionError(f"the page ended with {process.wait()} before it was up")


def stop_page(process):
    process.terminate()
    process.wait(20)
    process.stdout.close()


class Visitor:
    """A person at a browser, with the few gestures that the page knows."""

    def __init__(self, address):
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1240,870"):
            options.add_argument(option)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        self.visit(address)

    def visit(self, address):
        self.driver.get(address)
        parts = ("#canvas canvas", "#question textarea", "#ask", "#base .card", "#edited .card", "input[type=file]")
        self.wait(lambda: all(self.driver.find_elements("css selector", part) for part in parts) and self.width() > 100)

    def find(self, css):
        return self.driver.find_element("css selector", css)

    def read(self, css):
        return self.driver.execute_script("return document.querySelector(arguments[0])?.textContent ?? ''", css)

    def wait(self, claim):
        end = time.monotonic() + PATIENCE
        while not claim():
            assert time.monotonic() < end, self.driver.find_element("css selector", "body").text
            time.sleep(0.05)

    def width(self):
        return self.driver.execute_script(
            "return document.querySelector('#canvas canvas')?.getBoundingClientRect().width ?? 0"
        )

    def state(self):
        script = "return document.querySelector('#edited .card')?.dataset.state ?? ''"
        return self.driver.execute_script(script)

    def choose(self, number):
        before, thumbnails = self.pixels(), ("css selector", "#pictures button.thumbnail-item")
        self.wait(lambda: len(self.driver.find_elements(*thumbnails)) == 8)
        self.driver.find_elements(*thumbnails)[number].click()
        self.wait(lambda: self.pixels() != before)

    def pixels(self):
        return self.driver.execute_script("return document.querySelector('#canvas canvas')?.toDataURL() ?? ''")

    def drag(self, box):
        """Drag a box; return it as the page understood it, in pixels of the picture."""
        from selenium.webdriver import ActionChains

        left, top, right, bottom = (side * self.width() / 64 for side in box)
        middle = self.width() / 2
        gesture = ActionChains(self.driver, duration=20)
        gesture.move_to_element_with_offset(self.find("#canvas canvas"), round(left - middle), round(top - middle))
        gesture.click_and_hold().move_by_offset(round(right - left), round(bottom - top)).release().perform()
        self.wait(lambda: "box" in self.read("#canvas .say") and "drag" not in self.read("#canvas .say"))
        return tuple(int(side) for side in re.findall(r"\d+", self.read("#canvas .say"))[:4])

    def type(self, css, text):
        from selenium.webdriver import Keys

        self.find(css).send_keys(Keys.CONTROL, "a")
        self.find(css).send_keys(text)

    def ask(self, question):
        """Ask; return the base's answer and the edited one."""
        self.type("#question textarea", question)
        self.driver.execute_script("document.querySelector('#edited .card').dataset.state = 'old'")
        self.find("#ask").click()
        self.wait(lambda: self.state() in ("done", "error"))
        return self.read("#base .text"), self.read("#edited .text")

    def strength(self, name, strength):
        from selenium.webdriver import Keys

        self.type(f"#strength-{name} input[type=number]", f"{strength}{Keys.TAB}")

    def switch(self, name):
        self.find(f"#on-{name} input").click()
