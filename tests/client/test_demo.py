"""The demo page in a real Chromium, against a real Triton and against a server that misbehaves."""

import re
import shutil
from itertools import pairwise

import pytest
from PIL import Image

from clipweld.client import ZeroShotClassifier

FLAGS = (
    "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
    "disable-component-update", "disable-sync", "window-size=1180,900",
)  # fmt: skip
HAND_OVER = """
const [name, kind, size, how] = arguments;
const data = new DataTransfer();
data.items.add(new File([new Uint8Array(size)], name, { type: kind }));
const event = how === "paste" ? new ClipboardEvent("paste", { clipboardData: data, bubbles: true })
                              : new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true });
document.body.dispatchEvent(event);
"""


class Page:
    """The page in the browser: what users do, and what they see."""

    def __init__(self, driver, url: str) -> None:
        self.driver = driver
        driver.get(url)

    def find(self, selector):
        return self.driver.find_elements("css selector", selector)

    def texts(self, selector):
        """Return the texts of the visible elements."""
        return [element.text for element in self.find(selector) if element.is_displayed()]

    def text(self, selector):
        return " ".join(self.texts(selector))

    def until(self, condition):
        """Wait until a condition holds."""
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.wait import WebDriverWait

        wait = WebDriverWait(self.driver, 20, 0.05, [StaleElementReferenceException])
        return wait.until(lambda _: condition())

    def choose(self, path):
        """Choose an image file."""
        self.find("#file")[0].send_keys(str(path))

    def pick(self, selector):
        self.find(selector)[0].click()

    def own_labels(self, text, ask=False):
        from selenium.webdriver import Keys

        self.pick("input[value=labels]")
        self.find("#labels")[0].clear()
        self.find("#labels")[0].send_keys(text, *([Keys.CONTROL, Keys.ENTER] if ask else []))

    def answered(self, *versions):
        """Wait for answers by these versions: [(best label, [(label, percentage)], milliseconds)]."""
        names = [f"version {version}" for version in versions]
        self.until(
            lambda: self.texts(".answer > header > span") == names and len(self.texts(".latency b")) == len(versions)
        )
        return [self._card(card) for card in self.find(".answer")]

    def error(self):
        """Wait for an error."""
        return self.until(lambda: self.text("#error"))

    def nothing_was_wrong(self):
        """Return whether no script failed and nothing violated the Content-Security-Policy."""
        return self.driver.get_log("browser") == []

    @staticmethod
    def _card(card):
        rows = [row.text.split("\n") for row in card.find_elements("css selector", "li")]
        best = card.find_element("css selector", ".best").text
        return best, [tuple(row) for row in rows], float(card.find_element("css selector", ".latency b").text)


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    """A headless Chromium with an empty profile."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (browser and driver):
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield started
    started.quit()


@pytest.fixture
def see(chromium, open_page):
    """A function that opens the page of a server and waits until the page shows the served versions."""

    def see(url):
        chromium.get_log("browser")
        page = Page(chromium, open_page(url))
        page.until(lambda: "version" in page.text("#served"))
        return page

    yield see
    chromium.get("about:blank")  # leave the page before its server stops


@pytest.fixture
def photo(picture, tmp_path):
    Image.fromarray(picture).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def shown(url, version, image, **asked):
    """Return what the page should show for a version's answer."""
    with ZeroShotClassifier(url, version=version) as clip:
        (answer,) = clip.classify([image.read_bytes()], top_k=5, **asked)
    return [(found.label, f"{100 * found.probability:.1f}%") for found in answer.predictions]


@pytest.mark.slow
def test_learned_task_on_a_real_triton(see, server, digits, tmp_path):
    test = digits.load("test")
    seven = tmp_path / "seven.png"
    test[list(test.labels).index(7)][0].save(seven)
    with ZeroShotClassifier(server.url) as clip:
        (task,) = clip.tasks()
    page = see(server.url)
    assert page.texts("#served span")[1:] == ["version 1: the base", "version 2: has learned digits"]
    assert page.text("#class-names") == ", ".join(task.class_names)
    assert page.texts("#accuracy-bars .number") == [f"{task.accuracy_before:.1f}%", f"{task.accuracy_after:.1f}%"]
    page.choose(seven)
    answers = page.answered(1, 2)
    prompts = {"labels": task.class_names, "templates": task.templates}
    for version, (best, rows, latency_ms) in zip((1, 2), answers, strict=True):
        assert rows == shown(server.url, version, seven, **prompts)
        assert best == rows[0][0]
        assert 0 < latency_ms < 10_000
    for bar, (_, percentage) in zip(page.find("li .bar"), answers[0][1] + answers[1][1], strict=True):
        filled = bar.find_element("css selector", "i").value_of_css_property("width").removesuffix("px")
        assert float(filled) / bar.size["width"] == pytest.approx(float(percentage.removesuffix("%")) / 100, abs=0.01)
    assert page.texts(".answer > p.small")[0].startswith("5 more labels: ")
    assert page.text("#error") == ""
    assert page.nothing_was_wrong()


@pytest.mark.slow
def test_own_labels_on_a_real_triton(see, server, photo):
    page = see(server.url)
    page.own_labels("cat, <b>dog</b>, cat,,", ask=True)  # there is no image yet
    assert page.error() == "Choose an image first."
    page.choose(photo)
    answers = page.answered(1, 2)
    for version, (_, rows, _) in zip((1, 2), answers, strict=True):
        assert rows == shown(server.url, version, photo, labels=["cat", "<b>dog</b>"])
    assert page.texts("#error") == page.texts("#accuracy") == page.texts("#task") == []
    assert page.nothing_was_wrong()


def test_changing_task_or_labels_classifies_the_image_again(see, fake, photo):
    page = see(fake.url)
    page.choose(photo)
    assert {name for name, _ in page.answered(1, 2)[0][1]} == {"zero", "one", "two"}
    page.own_labels("cat, dog")
    page.pick("#ask")
    page.until(lambda: {name for name, _ in page.answered(1, 2)[0][1]} == {"cat", "dog"})
    page.pick("input[value=task]")
    page.until(lambda: {name for name, _ in page.answered(1, 2)[0][1]} == {"zero", "one", "two"})
    assert page.texts("#accuracy-bars .number") == ["45.2%", "not measured"]


def test_labels_can_be_separated_by_line_breaks(see, fake, photo):
    page = see(fake.url)
    page.choose(photo)
    page.answered(1, 2)
    page.own_labels('cat\n\n dog, bird\n"salt, ""pepper"""\n')  # Enter starts a new line and sends no request
    assert page.find("#labels")[0].get_property("value").count("\n") == 4
    assert page.text("#labels-hint").startswith("Commas or lines between them; Ctrl+Enter asks.")
    assert {name for name, _ in page.answered(1, 2)[0][1]} == {"zero", "one", "two"}
    page.own_labels('cat\n\n dog, bird\n"salt, ""pepper"""\n', ask=True)
    page.until(lambda: {name for name, _ in page.answered(1, 2)[0][1]} == {"cat", "dog", "bird", 'salt, "pepper"'})
    assert page.nothing_was_wrong()


def test_each_request_is_answered_by_the_newest_version_at_that_time(see, fake, photo):
    page = see(fake.url)
    page.choose(photo)
    page.answered(1, 2)
    fake.cards[3] = fake.card(3)
    fake.cards[3]["tasks"].append({**fake.cards[3]["tasks"][0], "name": "shapes"})
    del fake.cards[2]
    page.pick("#ask")
    page.answered(1, 3)
    assert page.texts("#served span")[-1] == "version 3: has learned digits, shapes"
    assert page.texts("#task option") == ["digits (3 classes)", "shapes (3 classes)"]
    assert page.find("#task")[0].get_property("value") == "digits"


def test_a_notice_says_when_only_the_base_is_served(see, fake, photo):
    del fake.cards[2]
    page = see(fake.url)
    assert page.text("#notice").startswith("Only version 1, the base, is served")
    assert not page.find("input[value=task]")[0].is_enabled()
    page.choose(photo)
    page.own_labels("cat, dog", ask=True)
    page.answered(1)


def test_a_notice_says_when_the_base_is_not_served(see, fake, photo):
    del fake.cards[1]
    page = see(fake.url)
    assert page.text("#notice") == "The base, version 1, is not served: version 2 answers alone."
    page.choose(photo)
    page.answered(2)


@pytest.mark.parametrize("how", ["paste", "drop"])
def test_an_image_can_be_pasted_or_dropped(see, fake, how):
    page = see(fake.url)
    page.driver.execute_script(HAND_OVER, "broken.png", "image/png", 100, how)
    assert (
        page.error()
        == "This file (100 bytes) is no image; expected AVIF, BMP, GIF, JPEG, JPEG2000, PNG, PPM, TIFF, WEBP"
    )
    assert page.text("#file-name") == "broken.png"


def test_too_large_an_image_is_refused_without_being_sent(see, fake):
    page = see(fake.url)
    page.driver.execute_script(HAND_OVER, "large.png", "image/png", 20_000_001, "drop")
    assert page.error() == "large.png has 20.0 MB; at most 20 MB are taken."
    assert page.nothing_was_wrong()


def test_an_error_disappears_with_the_next_answer(see, fake, photo, tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    page = see(fake.url)
    page.choose(photo)
    page.answered(1, 2)
    page.choose(tmp_path / "notes.txt")
    assert (
        page.error() == "This file (8 bytes) is no image; expected AVIF, BMP, GIF, JPEG, JPEG2000, PNG, PPM, TIFF, WEBP"
    )
    assert page.texts(".latency") == []  # the answer for the previous image is removed
    page.choose(photo)
    page.answered(1, 2)
    assert page.text("#error") == ""


def test_the_page_recovers_when_the_server_comes_back(chromium, open_page, fake, photo):
    fake.stop()
    page = Page(chromium, open_page(fake.url))
    assert page.error() == f"No server at {fake.url}: connection refused; start one with: exporter serve"
    back = type(fake)(port=int(fake.url.split(":")[1]))
    try:
        page.until(lambda: "version 2" in page.text("#served"))
        assert page.text("#error") == ""
        page.choose(photo)
        page.answered(1, 2)
    finally:
        back.stop()
    page.pick("#ask")
    assert page.error().startswith(f"No server at {fake.url}: ")
    chromium.get("about:blank")


def test_the_page_reports_that_its_program_has_ended(see, fake, photo):
    page = see(fake.url)
    page.driver.execute_script("window.fetch = () => Promise.reject(new TypeError('Failed to fetch'))")
    page.choose(photo)
    assert page.error() == "The program behind this page has ended; start it again with: client demo"


def test_the_keyboard_reaches_every_control_in_order(see, fake):
    from selenium.webdriver import ActionChains, Keys

    page = see(fake.url)
    reached = []
    for _ in range(4):
        ActionChains(page.driver).send_keys(Keys.TAB).perform()
        reached.append(page.driver.execute_script("return document.activeElement.id || document.activeElement.value"))
    assert reached == ["file", "task", "task", "ask"]  # a radio button by its value, a list by its id
    ActionChains(page.driver).send_keys(Keys.ENTER).perform()
    assert page.error() == "Choose an image first."


def test_a_narrow_window_needs_no_horizontal_scrolling(see, fake, photo):
    page = see(fake.url)
    narrow = {"width": 320, "height": 700, "deviceScaleFactor": 1, "mobile": False}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", narrow)
    try:
        page.choose(photo)
        page.own_labels(f"{'endless' * 20}, dog", ask=True)
        page.until(lambda: "endless" in page.text("li"))
        root = page.find("html")[0]
        assert root.get_property("scrollWidth") == root.get_property("clientWidth")
        tops = [card.location["y"] for card in page.find(".answer")]
        assert all(one < other for one, other in pairwise(tops))
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_contrasts_with_its_background(see, fake, photo, scheme):
    """Text has a contrast of at least 4.5 to 1, as WCAG 2 requires."""
    fake.cards[2]["tasks"][0]["accuracy"]["after"] = 90.0
    page = see(fake.url)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    page.choose(photo)
    page.answered(1, 2)
    grounds = page.driver.execute_script(
        "return ['#served', '.answer .number', '.best', '#ask', '#class-names', 'fieldset span', '#accuracy .gain']"
        ".map(s => { let e = document.querySelector(s), ink = getComputedStyle(e).color;"
        " while (getComputedStyle(e).backgroundColor === 'rgba(0, 0, 0, 0)') e = e.parentElement;"
        " return [s, ink, getComputedStyle(e).backgroundColor]; })"
    )
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    for selector, ink, ground in grounds:
        lighter, darker = sorted((luminance(ink), luminance(ground)), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, selector


def luminance(colour):
    """Relative luminance of "rgb(r, g, b)", as WCAG 2 defines it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
