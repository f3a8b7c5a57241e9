"""The page at `/` in a real browser: two models side by side, streamed, with a key, errors, both colour schemes, narrow."""

import shutil

import httpx
import pytest

from support import serving
from support.serving import Twin, make_adapter, running, wait_until

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver (apt-get install chromium-driver)"
)
TOKENS = 24


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    base = serving.folder(folder / "base")
    twin = Twin(base)
    make_adapter(twin.model, folder / "adapter", 1)
    with running(base, folder, keys=["secret"]) as server:
        server.service.store.load("demo", folder / "adapter")
        yield server, twin, folder / "adapter"


@pytest.fixture(scope="module")
def browser(place):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-proxy-server"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_window_size(1200, 800)
    yield driver
    driver.quit()


def find(browser, css):
    return browser.find_elements("css selector", css)


def texts(browser, css):
    return [element.text for element in find(browser, css)]


def put(browser, css, value):
    """Set a field as a user would have: the value, and the event that a change fires."""
    script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('change'))"
    browser.execute_script(script, find(browser, css)[0], value)


def say(browser, text):
    find(browser, "#message")[0].send_keys(text)
    find(browser, "#send")[0].click()


def raw(browser, css):
    return browser.execute_script("return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", css)


def test_the_page(place, browser):
    server, twin, adapter = place
    browser.get(server.url)
    wait_until(lambda: texts(browser, "#trouble") != [""])
    assert "valid key" in texts(browser, "#trouble")[0]

    put(browser, "#key", "secret")
    wait_until(lambda: len(find(browser, "option")) == 4)
    assert texts(browser, "option") == ["tiny (base)", "demo"] * 2
    assert raw(browser, "#trouble") == [""]
    assert [select.get_property("value") for select in find(browser, "select")] == ["tiny", "demo"]

    put(browser, "#longest", TOKENS)
    browser.execute_script("""
        window.seen = [];
        const watch = new MutationObserver((list) => list.forEach((m) => window.seen.push(m.target.textContent)));
        watch.observe(document.querySelectorAll(".talk")[1], { subtree: true, childList: true, characterData: true });
    """)
    say(browser, "Hello there")
    wait_until(lambda: len(find(browser, ".note")) == 2)
    assert raw(browser, ".assistant") == [twin.chat("Hello there", TOKENS), twin.chat("Hello there", TOKENS, adapter)]
    assert texts(browser, ".user") == ["Hello there"] * 2
    assert len(set(browser.execute_script("return window.seen"))) > 5  # it came bit by bit
    assert all(f"{TOKENS} tokens in" in note or "tokens" in note for note in texts(browser, ".note"))

    say(browser, "<img src=x onerror=alert(1)> more")
    wait_until(lambda: len(find(browser, ".note")) == 4)
    assert texts(browser, ".user")[1] == "<img src=x onerror=alert(1)> more"
    assert find(browser, "img") == []

    put(browser, "#longest", 100000)
    say(browser, "and this?")
    wait_until(lambda: len(find(browser, ".talk .error")) == 2)
    assert "context is 256 tokens" in texts(browser, ".talk .error")[0]

    put(browser, "#longest", 200)
    find(browser, "#clear")[0].click()
    assert raw(browser, ".talk") == ["", ""]
    find(browser, "#both")[0].click()
    say(browser, "Go")
    wait_until(lambda: raw(browser, ".assistant") not in ([], [""]))
    find(browser, "#stop")[0].click()
    wait_until(lambda: "stopped" in texts(browser, ".note") or "tokens" in "".join(texts(browser, ".note")))
    wait_until(lambda: server.service.admission.taken == 0)
    assert len(find(browser, ".user")) == 1  # one side only

    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert all(name.startswith((server.url, "data:")) for name in loaded)
    severe = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert all("401" in message or "400" in message for message in severe), severe  # no script, no policy was broken


def test_it_fits_narrow_screens_and_both_schemes(place, browser):
    browser.get(place[0].url)
    grounds = set()
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        grounds.add(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2
    for width in (360, 1200):
        metrics = {"width": width, "height": 700, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert find(browser, "#send")[0].rect["y"] + find(browser, "#send")[0].rect["height"] <= 700


def test_nothing_but_its_own_script_may_run(place):
    response = httpx.get(place[0].url)
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert policy.count("sha256-") == 2
    assert "http" not in policy
    assert response.text.count("<script>") == response.text.count("<style>") == 1
