"""The page in a real browser: Debian's chromium, driven by playwright (pip install -e '.[app,browser]')."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nanoip2p.editing.recipes import read_recipe
from nanoip2p.images import open_image

pytest.importorskip("gradio", reason="the page needs pip install -e '.[app]'")
playwright = pytest.importorskip("playwright.sync_api", reason="this needs pip install -e '.[browser]'")
CHROMIUM = shutil.which("chromium")
if not CHROMIUM:
    pytest.skip("browser tests need chromium (apt-get install chromium)", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "weights/nano-ip2p/examples"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
         "--disable-component-update", "--disable-quic", "--no-first-run"]
SECONDS = 60  # this machine may be busy


def serve(*words):
    """A running page: (process, address)."""
    process = subprocess.Popen(
        [sys.executable, "-m", "nanoip2p.app", "--port", "0", "--no-browser", *words], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # not ignored
    lines = []
    for line in process.stdout:
        lines.append(line)
        if match := re.match(r"open (http://\S+) in a browser", line):
            return process, match[1].rstrip("/")
    raise AssertionError("".join(lines))


def close(process):
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    return process.returncode, rest


@pytest.fixture(scope="module")
def server():
    process, address = serve()
    yield address
    code, said = close(process)
    assert code == 130 and said.endswith("the page is closed\n") and "Traceback" not in said


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def tab(browser, server):
    """Opens tabs. Each fails the test if it asked another server for anything."""
    asked, contexts = [], []

    def open_tab(width=1280, height=1300):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}))
        page = contexts[-1].new_page()
        page.set_default_timeout(SECONDS * 1000)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(server)
        page.wait_for_selector("#edit")
        page.wait_for_selector("#picture input[type=file]", state="attached")
        return page

    yield open_tab
    for context in contexts:
        context.close()
    assert not [url for url in asked if not url.startswith((server, "data:", "blob:"))]


def give(page, path):
    page.set_input_files("#picture input[type=file]", path)
    page.wait_for_selector("#picture img")
    playwright.expect(page.locator("#edit")).to_be_enabled(timeout=SECONDS * 1000)


def say(page, text):
    page.fill("#instruction input, #instruction textarea", text)


def fill(page, key, value):
    page.fill(f"#{key} input[type=number], #{key} input", str(value))
    page.keyboard.press("Tab")


def wait_for_results(page, n):
    playwright.expect(page.locator("#history img")).to_have_count(n, timeout=SECONDS * 1000)
    page.wait_for_function("!document.querySelector('#status progress')")


def download(page, button="#download"):
    with page.expect_download() as waiting:
        page.click(button)
    return waiting.value


def reopen(page, path):
    with page.expect_file_chooser() as chooser:
        page.click("#open")
    chooser.value.set_files(path)


def toast(page):
    return page.locator(".toast-body").first.inner_text()


def test_edit_continue_and_undo(tab, tmp_path):
    page = tab()
    give(page, EXAMPLES / "house.png")
    say(page, "make it night")
    page.evaluate("""() => { window.bars = []; new MutationObserver(() => {
        if (document.querySelector("#status progress")) bars.push(document.querySelector("#status").innerText)
    }).observe(document.body, {subtree: true, childList: true, characterData: true}) }""")
    page.click("#edit")
    wait_for_results(page, 1)  # the edit may end before a busy browser is asked for its bar
    assert any(re.search(r"\d+ of 20, \d+ s left", bar) for bar in page.evaluate("bars"))
    file = download(page)
    assert file.suggested_filename == "house-edited.png"
    file.save_as(tmp_path / "night.png")
    night, house = open_image(tmp_path / "night.png"), open_image(EXAMPLES / "house.png")
    assert night.size == house.size and night.tobytes() != house.tobytes()
    recipe = read_recipe(tmp_path / "night.png")
    assert recipe["edit"] == ["make it night"] and recipe["input"] == ["house.png"] and recipe["steps"] == 20
    assert "mask" not in recipe and not page.is_visible("#mask")

    page.click("#picture button[title='Remove Image']")
    playwright.expect(page.locator("#edit")).to_be_disabled(timeout=SECONDS * 1000)
    page.click("#continue")
    playwright.expect(page.locator("#edit")).to_be_enabled(timeout=SECONDS * 1000)
    say(page, "turn the house blue")
    page.wait_for_timeout(1000)
    page.click("#edit")
    wait_for_results(page, 2)
    download(page).save_as(tmp_path / "both.png")
    assert read_recipe(tmp_path / "both.png")["input"] == [file.suggested_filename]
    page.click("#undo")
    wait_for_results(page, 1)
    download(page).save_as(tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "night.png").read_bytes()
    page.click("#undo")
    wait_for_results(page, 0)
    page.click("#undo")
    assert "nothing to undo" in toast(page)


def test_a_click_shows_an_earlier_result(tab, tmp_path):
    page = tab()
    give(page, EXAMPLES / "house.png")
    say(page, "make it night")
    fill(page, "seed", 42)  # a seed that was typed is kept
    fill(page, "steps", 2)
    fill(page, "n", 3)
    page.click("#edit")
    wait_for_results(page, 3)
    for number in (1, 2, 0):
        page.locator("#history button:has(img)").nth(number).click()
        page.wait_for_timeout(1000)
        download(page).save_as(tmp_path / "some.png")
        assert read_recipe(tmp_path / "some.png")["seed"] == 42 + number
    page.locator("#history button:has(img)").nth(1).click()
    page.wait_for_timeout(1000)
    page.click("#continue")
    page.wait_for_timeout(1000)
    fill(page, "n", 1)
    page.click("#edit")
    wait_for_results(page, 4)
    download(page).save_as(tmp_path / "some.png")
    assert read_recipe(tmp_path / "some.png")["input"] == ["house-edited-2.png"]


def test_a_mask_keeps_what_is_not_painted(tab, tmp_path):
    page = tab()
    give(page, EXAMPLES / "house.png")
    page.get_by_text("Edit only a part").click()
    page.wait_for_timeout(3000)  # the editor draws its canvas
    box = page.locator("#paint canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] * 0.4
    page.mouse.move(x - 50, y)
    page.mouse.down()
    for step in range(6):
        page.mouse.move(x - 50 + 20 * step, y)
    page.mouse.up()
    page.wait_for_timeout(1000)
    say(page, "make it night")
    fill(page, "steps", 4)
    page.click("#edit")
    wait_for_results(page, 1)
    download(page).save_as(tmp_path / "night.png")
    download(page, "#mask").save_as(tmp_path / "mask.png")
    night, mask = open_image(tmp_path / "night.png"), Image.open(tmp_path / "mask.png")
    assert read_recipe(tmp_path / "night.png")["mask"] == "house-edited-mask.png"
    left, top, right, bottom = mask.getbbox()
    assert mask.mode == "L" and 0.2 < (left + right) / 2 / mask.width < 0.8
    assert bottom - top < mask.height / 2
    house = open_image(EXAMPLES / "house.png")
    far = (0, round(bottom / mask.height * 64) + 16, 64, 64)  # four times the blur's radius away
    assert far[1] < 60 and night.crop(far).tobytes() == house.crop(far).tobytes()
    assert night.tobytes() != house.tobytes()
    page.click("#undo")  # the paint stays
    wait_for_results(page, 0)
    page.click("#edit")
    wait_for_results(page, 1)
    assert page.is_visible("#mask")


def test_stop_and_two_tabs_at_once(tab):
    first, second = tab(), tab()
    for page, name in ((first, "house"), (second, "car")):
        give(page, EXAMPLES / f"{name}.png")
        say(page, "make it night")
    fill(first, "steps", 200)
    fill(first, "n", 8)
    fill(first, "cfg_image", 1.5)  # three branches: this takes longer than a slow browser needs to press Stop
    first.click("#edit")
    first.wait_for_selector("#status progress")
    second.click("#edit")
    second.get_by_text(re.compile(r"queue: 1/1")).first.wait_for()  # its place in the queue, and its length
    began = time.monotonic()
    first.click("#stop")
    playwright.expect(first.locator("#status")).to_have_text("Stopped.", timeout=SECONDS * 1000)
    wait_for_results(second, 1)
    assert time.monotonic() - began < SECONDS
    assert first.locator("#history img").count() == 0
    fill(first, "steps", 2)
    first.click("#edit")  # it works as before
    wait_for_results(first, 8)


def test_stop_while_waiting(tab):
    first, second = tab(), tab()
    for page in (first, second):
        give(page, EXAMPLES / "house.png")
        say(page, "make it night")
        fill(page, "steps", 200)
    fill(first, "n", 8)
    fill(first, "cfg_image", 1.5)  # longer than a slow browser needs to press Stop in the other tab
    first.click("#edit")
    first.wait_for_selector("#status progress")
    second.click("#edit")
    second.get_by_text(re.compile(r"queue: 1/1")).first.wait_for()
    second.click("#stop")
    playwright.expect(second.locator("#status")).to_have_text("Stopped.", timeout=SECONDS * 1000)
    shown = first.inner_text("#status")
    playwright.expect(first.locator("#status")).not_to_have_text(shown)  # the other edit goes on
    first.click("#stop")
    playwright.expect(first.locator("#status")).to_have_text("Stopped.", timeout=SECONDS * 1000)
    second.wait_for_timeout(2000)
    assert second.locator("#history img").count() == 0 and second.inner_text("#status") == "Stopped."


@pytest.mark.parametrize("content", [b"no picture", b"", (EXAMPLES / "house.png").read_bytes()[:200]])
def test_bad_files_are_one_line(tab, tmp_path, content):
    page = tab()
    (tmp_path / "bad.png").write_bytes(content)
    page.set_input_files("#picture input[type=file]", tmp_path / "bad.png")
    page.wait_for_selector(".toast-body")
    assert re.search(r"\bbad\.png cannot be used: ", toast(page)) and "/tmp" not in toast(page)
    reopen(page, EXAMPLES / "house.png")
    page.get_by_text("house.png has no recipe of an edit").wait_for()
    say(page, "make it night")
    playwright.expect(page.locator("#edit")).to_be_disabled()
    page.keyboard.press("Enter")
    page.get_by_text("There is no picture yet").wait_for()


def test_with_the_keyboard_only(tab):
    page = tab()
    give(page, EXAMPLES / "balloon.png")  # a file dialog is the browser's own
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.closest('[id]')?.id"))
        if page.evaluate("!!document.activeElement.closest('#instruction')"):
            break
    page.keyboard.type("make it night")
    page.keyboard.press("Enter")
    wait_for_results(page, 1)
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.closest('[id]')?.id"))
    assert {"edit", "stop", "continue", "undo", "die"} <= set(reached), reached
    page.locator("#undo").focus()
    page.keyboard.press("Enter")
    wait_for_results(page, 0)


def test_on_a_phone(tab):
    page = tab(375, 800)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    give(page, EXAMPLES / "house.png")
    say(page, "make it night")
    page.click("#edit")
    wait_for_results(page, 1)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375


def test_settings_come_back_and_make_the_same_picture(tab, tmp_path):
    page = tab()
    give(page, EXAMPLES / "house.png")
    say(page, "make it night")
    fill(page, "steps", 3)
    fill(page, "n", 2)
    page.click("#edit")
    wait_for_results(page, 2)
    download(page).save_as(tmp_path / "night.png")
    other = tab()
    give(other, EXAMPLES / "house.png")
    reopen(other, tmp_path / "night.png")
    words = other.locator("#instruction textarea, #instruction input")
    playwright.expect(words).to_have_value("make it night")
    assert other.input_value("#steps input[type=number]") == "3"
    other.click("#edit")
    wait_for_results(other, 1)
    download(other).save_as(tmp_path / "again.png")
    one, two = (np.asarray(open_image(tmp_path / f"{name}.png")).astype(int) for name in ("again", "night"))
    assert np.abs(one - two).max() <= 1  # rounding: two pictures were in the first batch
    assert read_recipe(tmp_path / "again.png")["seed"] == read_recipe(tmp_path / "night.png")["seed"]


def test_sweep(tab):
    page = tab()
    give(page, EXAMPLES / "house.png")
    say(page, "make it night")
    fill(page, "steps", 1)
    page.get_by_role("tab", name="Sweep").click()
    page.click("#sweep")
    playwright.expect(page.locator("#cells img")).to_have_count(25, timeout=SECONDS * 1000)
    page.wait_for_timeout(1000)
    page.locator("#cells button:has(img)").last.click()
    playwright.expect(page.locator("#cfg_image input[type=number]")).to_have_value("1.5")
    page.locator("#cells button:has(img)").first.click()
    playwright.expect(page.locator("#cfg_text input[type=number]")).to_have_value("0.8")
    assert page.input_value("#cfg_image input[type=number]") == "0.5"


def fetch(address):
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            return answer.status, answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.headers


def test_only_its_own_files_are_served(server, tmp_path):
    code, headers = fetch(server)
    assert code == 200 and "default-src 'self'" in headers["Content-Security-Policy"]
    (tmp_path / "a.txt").write_text("a")
    for path in (tmp_path / "a.txt", ROOT / "README.md", EXAMPLES / "house.png", "/etc/hostname"):
        assert fetch(f"{server}/gradio_api/file={path}")[0] == 403
    assert fetch(f"{server}/gradio_api/file={server}/config")[0] == 404  # it fetches nothing itself


@pytest.mark.parametrize("path", [EXAMPLES / "house.png", "/etc/hostname", "/no/such/file.png"])
def test_only_uploads_are_read(server, path):
    """Whoever names a file of the server in place of an upload learns nothing about it."""
    config = json.loads(urllib.request.urlopen(f"{server}/config", timeout=60).read())
    picture = next(part["id"] for part in config["components"] if part["props"].get("elem_id") == "picture")
    take = next(call["id"] for call in config["dependencies"] if [picture, "upload"] in call["targets"])
    upload = {"path": str(path), "orig_name": "x.png", "url": None}
    body = {"fn_index": take, "data": [None, upload], "session_hash": "somebody"}
    urllib.request.urlopen(urllib.request.Request(
        f"{server}/gradio_api/queue/join", json.dumps(body).encode(), {"Content-Type": "application/json"}))
    answer, lines = urllib.request.urlopen(f"{server}/gradio_api/queue/data?session_hash=somebody"), []
    while not lines or "process_completed" not in lines[-1]:
        lines.append(answer.readline().decode())
    assert "This file was not uploaded here" in "".join(lines) and "background" not in "".join(lines)


def test_large_uploads_are_refused(server):
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n%s\r\n--x--\r\n'
    for size, code in ((1000, 200), (51 * 2**20, 413)):
        request = urllib.request.Request(f"{server}/gradio_api/upload", part % bytes(size),
                                         {"Content-Type": "multipart/form-data; boundary=x"})
        assert fetch(request)[0] == code


def test_only_this_machine_can_connect(server):
    assert server.startswith("http://127.0.0.1:")


def test_a_name_and_a_password():
    process, address = serve("--auth", "anna:se:cret")
    try:
        assert fetch(f"{address}/config")[0] == 401
    finally:
        assert close(process)[0] == 130


def test_listening_is_said_in_words():
    process, _ = serve("--listen")
    line = process.stdout.readline()
    assert close(process) == (130, "the page is closed\n")
    assert "every machine" in line and "--auth" in line
