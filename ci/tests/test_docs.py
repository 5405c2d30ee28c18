"""The docs page, built with warnings as errors, and read in a real browser."""

import functools
import http.server
import re
import shutil
import threading

import pytest
import requests
from pygments.lexers import get_lexer_for_filename
from selenium import webdriver
from selenium.webdriver.common.by import By

from ci.common import ROOT, run
from ci.tools import record

pytestmark = pytest.mark.section("The repository")
# At least so many headings, and more blocks of code and links within the page than that
PAGES = {"README": 25, "notebook": 25, "beyond_chat": 6, "next_steps": 8}
needs_chromium = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="Chromium isn't installed: apt-get install chromium chromium-driver",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The address of the built site."""
    folder = tmp_path_factory.mktemp("docs")
    build = ["sphinx-build", "-W", "--keep-going", "-q", "-c", "ci/docs", "-d", str(folder / "doctrees"), "."]
    result = run(*build, str(folder / "html"))
    assert result.returncode == 0, result.stdout
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder / "html")
    handler.log_message = lambda *args: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture(params=PAGES)
def page(request, site, browser):
    """A page of the site, loaded at the width of a desk; its name is page.name."""
    browser.set_window_size(1280, 900)
    browser.get(f"{site}/{request.param}.html")
    browser.name_of_page = request.param
    return browser


@needs_chromium
def test_page_loads_without_an_error(page, site):
    # The badges come from another host, which needs a network. Chromium asks for a favicon by itself.
    errors = [entry["message"] for entry in page.get_log("browser") if entry["level"] == "SEVERE"]
    assert not [message for message in errors if not re.search(r"img\.shields\.io|/favicon\.ico", message)]
    images = page.execute_script("return [...document.images].map(i => [i.src, i.complete && i.naturalWidth])")
    own = {source: width for source, width in images if source.startswith(site)}
    assert all(own.values()) and (own or page.name_of_page in ("beyond_chat", "next_steps")), own


@needs_chromium
def test_contents_are_complete_and_anchors_resolve(page):
    headings = page.execute_script(
        "return [...document.querySelectorAll('article h2, article h3')].map(h => h.innerText)"
    )
    contents = page.execute_script("return [...document.querySelectorAll('.page-toc a')].map(a => a.innerText)")
    headings = [heading.rstrip("#").strip() for heading in headings]
    assert len(headings) >= PAGES[page.name_of_page] and [text.strip() for text in contents] == headings
    anchors = page.execute_script("return [...document.querySelectorAll('a[href^=\"#\"]')].map(a => a.hash.slice(1))")
    broken = [a for a in anchors if a and not page.find_elements(By.ID, a)]
    assert len(anchors) > PAGES[page.name_of_page] and not broken, f"Links to anchors that aren't there: {broken}"


@needs_chromium
def test_menu_leads_to_each_page(page, site):
    links = page.execute_script(
        "return [...document.querySelectorAll('.navbar-header-items__center a')].map(a => a.href)"
    )
    names = ["notebook", "beyond_chat", "next_steps", "TROUBLESHOOTING", "benchmarks/README", "SECURITY"]
    assert [link.rstrip("#") for link in links] == [f"{site}/{name}.html" for name in names]
    assert all(requests.get(link, timeout=10).ok for link in links)


@needs_chromium
def test_code_is_highlighted_and_can_be_copied(page):
    blocks = page.execute_script(
        "return [...document.querySelectorAll('div.highlight pre')].map(p =>"
        " [p.closest('[class*=highlight-]').className, p.innerText, p.querySelectorAll('span[class]').length,"
        "  p.parentElement.querySelectorAll('.copybtn').length])"
    )
    assert len(blocks) > PAGES[page.name_of_page]
    for kind, text, spans, buttons in blocks:
        language = re.search(r"highlight-([\w-]+)", kind)[1]
        if language in {"text", "myst-ansi"}:  # What a run printed
            assert not buttons and text.startswith(
                ("# H200, random weights,", "# Two H200s, random ", "# The stand-in on ", "(anyscale ", "s3://")
            ), text
            continue
        assert language in {"python", "ipython3", "bash", "yaml", "docker", "dockerfile"}, f"{language}: {text[:80]}"
        if file := re.match(r"%%writefile (\S+)", text):
            assert language == get_lexer_for_filename(file[1]).aliases[0], f"{language}: {text[:80]}"
        assert buttons == 1 and spans > 0, f"{language}, {spans} highlighted words, {buttons} copy buttons: {text[:80]}"


@needs_chromium
@pytest.mark.parametrize("page", ["README", "notebook"], indirect=True)
def test_figures_and_outputs_of_a_run_are_shown(page):
    """The same on both pages of the tutorial: in the README as text, under the notebook's cells as their outputs."""
    images = page.execute_script("return [...document.querySelectorAll('article img')].map(i => [i.alt, i.width])")
    figures = [alt for alt, width in images if width > 300]
    assert len(figures) == 5 and set(figures[1:]) == set(record.FIGURES.values()), images
    text = page.execute_script("return document.querySelector('article').innerText")
    sweep, _ = record.outputs(record.read_records()["h200"], "sweep")
    for said in ("the first token", "2 + 2 = 4.", "KV cache size: ", *map(str.strip, sweep.splitlines())):
        assert said in text, said


@needs_chromium
def test_page_can_be_read_on_a_telephone(page):
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        page.refresh()
        wide = page.execute_script(
            "return [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > 390 &&"
            " ![...function*(){for (let p = e.parentElement; p; p = p.parentElement) yield p}()].some(p =>"
            " ['auto', 'scroll', 'hidden'].includes(getComputedStyle(p).overflowX)))"
            ".map(e => e.outerHTML.slice(0, 100))"
        )
        width = page.execute_script("return document.documentElement.scrollWidth")
        assert width <= 390, f"{width} pixels, because of {wide}"
        (ROOT / "build").mkdir(exist_ok=True)
        page.save_screenshot(str(ROOT / "build" / f"{page.name_of_page}-390.png"))
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    page.set_window_size(1280, 2400)
    page.refresh()
    page.save_screenshot(str(ROOT / "build" / f"{page.name_of_page}-1280.png"))
