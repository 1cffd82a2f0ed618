"""The built-in page: a chat with the precision of each token, also for those who cannot see colours or hold a mouse."""

from __future__ import annotations

import re
import shutil
import time
from contextlib import contextmanager

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")


@contextmanager
def slowed(server):
    """The server's model takes its time, so that there is something to stop."""
    turn = server.engine._turn
    server.engine._turn = lambda: (time.sleep(0.01), turn())
    yield
    server.engine._turn = turn


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as run:
        browser = run.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, server):
    pages = []

    def open_one(**options):
        page = browser.new_page(**options)
        pages.append(page)
        page.goto(server.url)
        playwright.expect(page).to_have_title(re.compile("^tiny"))
        return page

    yield open_one
    for page in pages:
        page.close()


def ask(page, text="Hello", schedule="8@0,4@5,2@12"):
    """An answer in full, by keyboard alone."""
    page.locator("summary").focus()
    page.keyboard.press("Enter")
    page.locator("#schedule").fill(schedule)
    page.locator("#text").focus()
    page.keyboard.type(text)
    page.keyboard.press("Enter")
    page.locator("#strip .b2").nth(5).wait_for(state="attached")
    page.wait_for_selector("#send:visible")


def test_a_chat(open_page, server):
    page, problems = open_page(), []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.reload()
    playwright.expect(page).to_have_title(re.compile("^tiny"))
    page.locator("summary").click()
    page.locator("#schedule").fill("8@0,4@5,2@30")
    page.locator("#text").fill("Hello <b>you</b>")
    with slowed(server):
        page.locator("#send").click()
        page.locator("#strip .b2").nth(20).wait_for(state="attached")
        page.locator("#stop").click()
    page.wait_for_selector("#send:visible")
    assert page.locator("#strip .b8").count() == 6
    assert page.locator("#strip .b4").count() == 25
    assert "6 at 8 bits, 25 at 4 bits" in page.locator("#account").inner_text()
    assert page.locator("#turns li").count() == 2
    assert page.locator("#turns li").first.inner_text() == "Hello <b>you</b>"
    assert problems == []
    assert server.idle().running == 0
    page.locator("#schedule").fill("2@0,4@9")
    page.locator("#text").fill("Again")
    page.keyboard.press("Enter")
    page.wait_for_selector("li.error")
    assert "may only fall" in page.locator("li.error").inner_text()


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 320])
def test_nothing_that_axe_knows_of_is_in_anybodys_way(colours, width, open_page):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    page = open_page(color_scheme=colours, viewport={"width": width, "height": 800})
    assert axe.Axe().run(page).response["violations"] == []
    ask(page)
    found = axe.Axe().run(page).response["violations"]
    assert [(one["id"], [node["target"] for node in one["nodes"]]) for one in found] == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"


def test_the_strip_says_in_words_what_it_shows_in_colours(open_page):
    page = open_page()
    ask(page)
    words = page.locator("#strip").get_attribute("aria-label")
    assert words == page.locator("#account").inner_text()
    assert "6 at 8 bits, 7 at 4 bits" in words
    colours = page.evaluate(
        "[...new Set([...document.querySelectorAll('#strip span')].map(e => getComputedStyle(e).backgroundColor))]"
    )
    assert len(colours) == 3


def test_a_strangers_script_does_not_run(open_page, server):
    page = open_page()
    blocked = []
    page.on(
        "console", lambda message: blocked.append(message.text) if "Content Security Policy" in message.text else None
    )
    page.evaluate("""() => {
        const script = document.createElement('script'); script.textContent = 'window.stranger = 1'; document.body.append(script);
        const image = document.createElement('img'); image.src = 'http://192.0.2.1/x.png'; document.body.append(image);
    }""")
    page.wait_for_timeout(200)
    assert page.evaluate("window.stranger") is None
    assert len(blocked) >= 2
    policy = page.request.get(server.url).headers["content-security-policy"]
    assert "unsafe" not in policy
