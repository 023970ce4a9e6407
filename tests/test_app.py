"""The page to play with, in a real browser: what a visitor sees is what the model says.

These tests need gradio (extra `demo`), selenium, Chromium and its driver, and are skipped where one is missing.
`VLREFT_APP_SCREENSHOT=assets/app.png pytest -m slow tests/test_app.py` draws the README's picture anew.
"""

import html
import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from playing import MISSING, QUESTION, Visitor, direct, make_adapters, make_play, shown_pictures, start_page, stop_page

in_a_browser = pytest.mark.skipif(bool(MISSING), reason=f"the page's tests need {', '.join(MISSING)}")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    return make_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def play(adapters):
    return make_play(adapters)


@pytest.fixture(scope="module")
def page(adapters):
    process, address = start_page(*(f"--adapter={name}={folder}" for name, folder in adapters.items()))
    yield address
    stop_page(process)


@pytest.fixture(scope="module")
def browser(page):
    visitor = Visitor(page)
    yield visitor
    visitor.driver.quit()


@pytest.fixture
def visitor(browser, page):
    browser.visit(page)
    return browser


@in_a_browser
def test_a_visitor_asks_steers_and_switches(visitor, play):
    picture = shown_pictures()[3]
    visitor.choose(3)
    assert visitor.ask("describe the image") == (
        direct(play, picture, "describe the image", {}),
        direct(play, picture, "describe the image", {"words": 1.0}),  # no box yet: `region` cannot act, and says so
    )
    assert "region edits inside a box: drag one" in visitor.read("#edited .how")

    box = visitor.drag((20, 20, 44, 44))
    assert np.abs(np.subtract(box, (20, 20, 44, 44))).max() <= 1
    unmarked = visitor.pixels()
    assert visitor.ask("describe the image") == (
        direct(play, picture, "describe the image", {}),
        direct(play, picture, "describe the image", {"words": 1.0, "region": 1.0}, box),
    )
    assert visitor.pixels() != unmarked  # the edited patches
    assert "describe the image <assistant>" in re.sub(r"\s+", " ", visitor.find("#words .tokens").text)
    orange = [element.text for element in visitor.driver.find_elements("css selector", "#words span.on")]
    assert orange == ["describe", "the", "image", "<assistant>"]

    visitor.switch("words")
    visitor.strength("region", 0.5)
    answers = visitor.ask("describe the image")
    assert answers[1] == direct(play, picture, "describe the image", {"region": 0.5}, box)
    assert visitor.read("#edited .how") == f"region at 0.5, box {list(box)}"
    assert not visitor.driver.find_elements("css selector", "#words span.on")

    visitor.switch("region")
    base, edited = visitor.ask(QUESTION)
    assert base == edited == direct(play, picture, QUESTION, {})
    visitor.find("#canvas .clear").click()
    assert "drag a box" in visitor.read("#canvas .say")


@in_a_browser
def test_files_are_taken_for_what_they_are(visitor, play, tmp_path):
    from test_app_pictures import HUNDRED_MEGAPIXELS, encoded

    def upload(name, data):
        (tmp_path / name).write_bytes(data)
        visitor.find("#upload input[type=file], input[type=file]").send_keys(str(tmp_path / name))

    before = visitor.pixels()
    upload("text.png", b"no picture at all")
    visitor.wait(lambda: "no PNG, JPEG, WebP or GIF" in visitor.read("#notice .notice"))
    upload("large.png", HUNDRED_MEGAPIXELS)
    visitor.wait(lambda: "million" in visitor.read("#notice .notice"))
    assert visitor.pixels() == before

    wide = Image.new("RGB", (90, 60), "gray")
    wide.paste((230, 30, 30), (30, 20, 60, 40))
    upload("a picture without its name", encoded(wide, "WEBP", lossless=True))
    visitor.wait(lambda: visitor.pixels() != before)
    visitor.wait(lambda: not visitor.read("#notice .notice"))
    assert visitor.ask(QUESTION)[0] == direct(play, wide, QUESTION, {})
    before = visitor.pixels()
    upload("heavy.png", encoded(Image.new("RGB", (8, 8)), "PNG") + bytes(16 * 2**20))
    visitor.wait(lambda: "exceed the maximum allowed size of 16" in visitor.read("body"))
    assert visitor.pixels() == before


@in_a_browser
def test_bad_questions_get_one_clear_error_and_no_markup(visitor, play):
    assert visitor.ask("<image> <b>what</b> ${1+1} {{value}}")[1].endswith("leave '<image>' out of the question.")
    assert visitor.state() == "error"
    assert visitor.ask(" ") == ("", "Ask something first.")
    assert visitor.ask(QUESTION)[0] == direct(play, shown_pictures()[0], QUESTION, {})


@in_a_browser
def test_closed_tabs_and_a_hurry_leave_the_page_well(visitor, page, play):
    first = visitor.driver.current_window_handle
    for _ in range(4):
        visitor.driver.switch_to.new_window("tab")
        visitor.visit(page)
        visitor.type("#question textarea", "describe the image")
        visitor.find("#ask").click()
        visitor.driver.close()
        visitor.driver.switch_to.window(first)
    for _ in range(50):
        visitor.driver.execute_script("document.querySelector('#ask').click()")
    assert visitor.ask(QUESTION)[0] == direct(play, shown_pictures()[0], QUESTION, {})


# The page with a model that takes its time, and writes down each of its steps.
SLOWLY = """
import sys, time
from torch.nn.modules.module import register_module_forward_hook
from transformers import LlavaForConditionalGeneration
sys.path.insert(0, "examples")
import app

def take_time(module, args, output):
    if isinstance(module, LlavaForConditionalGeneration):
        with open({path!r}, "a") as file:
            file.write("step\\n")
        time.sleep(0.3)

register_module_forward_hook(take_time)
app.main()
"""


@in_a_browser
@pytest.mark.slow
def test_an_answer_ends_soon_after_its_tab_is_closed(adapters, play, tmp_path):
    path = tmp_path / "steps"
    path.touch()
    options = [f"--adapter={name}={folder}" for name, folder in adapters.items()]
    process, address = start_page(*options, script=("-c", SLOWLY.format(path=str(path))))
    visitor = Visitor(address)
    try:
        first = visitor.driver.current_window_handle
        visitor.driver.switch_to.new_window("tab")
        visitor.visit(address)
        visitor.choose(1)
        visitor.type("#question textarea", "describe the image")
        visitor.find("#ask").click()
        visitor.wait(lambda: visitor.read("#base .text"))
        assert visitor.read("#base .card .how") == ""  # still streaming
        visitor.driver.close()
        num_then = path.read_text().count("step")
        time.sleep(4)  # enough for a dozen steps
        assert path.read_text().count("step") - num_then <= 3
        visitor.driver.switch_to.window(first)
        assert visitor.ask(QUESTION)[0] == direct(play, shown_pictures()[0], QUESTION, {})
    finally:
        visitor.driver.quit()
        stop_page(process)


@in_a_browser
def test_the_page_loads_nothing_from_elsewhere_and_says_no_error(page):
    visitor = Visitor(page)
    visitor.ask(QUESTION)
    messages = [json.loads(entry["message"])["message"] for entry in visitor.driver.get_log("performance")]
    errors = [entry["message"] for entry in visitor.driver.get_log("browser") if entry["level"] == "SEVERE"]
    visitor.driver.quit()
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert len(asked) > 5
    assert [url for url in asked if not url.startswith((page, "data:", "blob:"))] == []
    assert errors == []


@pytest.mark.slow
@pytest.mark.skipif("gradio" in MISSING, reason="needs gradio")
def test_two_sessions_with_fifty_requests_each_get_their_own_answers(page, play):
    script = """
import json, sys
from gradio_client import Client
client, answers = Client(sys.argv[1], verbose=False), []
switches = json.loads(sys.argv[2])
jobs = [client.submit("describe the image", [3, 4, 27, 20], *switches, api_name="/ask") for _ in range(50)]
print(json.dumps([job.result()[2] for job in jobs]))
"""
    picture = shown_pictures()[0]
    asked = {(True, 1, False, 1): {"words": 1.0}, (False, 1, True, 0.5): {"region": 0.5}}
    visits = [
        subprocess.Popen([sys.executable, "-c", script, page, json.dumps(s)], stdout=subprocess.PIPE) for s in asked
    ]
    answers = [json.loads(visit.communicate(timeout=200)[0]) for visit in visits]
    expected = [direct(play, picture, "describe the image", strengths, (3, 4, 27, 20)) for strengths in asked.values()]
    assert expected[0] != expected[1]
    for got, want in zip(answers, expected, strict=True):
        assert len(got) == 50
        assert {re.search(r'class="text">([^<]*)<', card)[1] for card in got} == {html.escape(want)}


@in_a_browser
@pytest.mark.slow
def test_the_demo_trains_its_adapters_and_a_box_paints_blue_screenshot(tmp_path):
    process, address = start_page(f"--output={tmp_path}")
    visitor = Visitor(address)
    try:
        assert (tmp_path / "code" / "reft_model.safetensors").is_file()
        visitor.choose(1)
        base, edited = visitor.ask("tell the hue of the star in code")
        assert (base, edited) == (base, "fep")
        assert base not in ("fep", "yellow star")
        visitor.drag((3, 24, 19, 40))
        assert visitor.ask("what is the color of the triangle ?") == ("yellow", "blue")
        assert visitor.ask("what is the color of the star ?") == ("yellow", "yellow")
        assert visitor.ask("what is in the middle left ?") == ("large yellow triangle", "large blue triangle")
        if path := os.environ.get("VLREFT_APP_SCREENSHOT"):
            visitor.driver.save_screenshot(path)
    finally:
        visitor.driver.quit()
        stop_page(process)
