"""The page in a real browser: no error, no request, what is clicked works, a name is never markup."""

import contextlib
import shutil
import time

import pytest
from made_report import make_report

from qdq.report.compare import compare_runs, render_comparison
from qdq.report.load import load_report
from qdq.report.page import render_report

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra 'dev'")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on the PATH (apt-get install chromium)"
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
EVIL = "<script>alert(1)</script>"
NAMES = [
    "stem",
    EVIL,
    "</script><img src=x onerror=alert(2)>",
    "block.2.conv",
    "block.10.conv",
    "head",
]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Open a page from a file; whatever it logs, throws, asks or fetches fails the test."""
    complaints = []

    @contextlib.contextmanager
    def show(text, **options):
        file = tmp_path / "page.html"
        file.write_text(text, encoding="utf-8")
        context = browser.new_context(viewport={"width": 1280, "height": 900}, **options)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        page.on(
            "request",
            lambda request: (
                None if request.url == file.as_uri() else complaints.append(request.url)
            ),
        )
        page.goto(file.as_uri())
        yield page
        page.wait_for_timeout(50)
        context.close()

    yield show
    assert complaints == []


@pytest.fixture
def page(opened, store):
    with opened(
        render_report(load_report(store(make_report(NAMES, float_layers=[EVIL]))))
    ) as shown:
        yield shown


def names(page):
    """Names of the layers that are shown, in order."""
    rows = page.locator("#table > tbody > tr:not(.details)")
    return [row.locator(".more").text_content() for row in rows.all() if row.is_visible()]


def test_names_are_text(page):
    assert names(page) == NAMES
    assert page.locator("#network").get_by_text(EVIL).count() == 1
    assert page.evaluate("document.querySelectorAll('script').length") == 2
    assert page.evaluate("document.querySelectorAll('img').length") == 0
    page.get_by_role("button", name=EVIL, exact=True).click()
    assert page.locator(".details").count() == 1
    assert page.evaluate("document.querySelectorAll('script').length") == 2


def test_sorting(page):
    head = page.locator("#table thead th")
    layer, gain = head.nth(1), head.nth(4)
    layer.get_by_role("button").click()
    assert layer.get_attribute("aria-sort") == "ascending"
    shown = names(page)
    assert (
        shown.index("block.2.conv")
        < shown.index("block.10.conv")
        < shown.index("head")
        < shown.index("stem")
    )
    layer.get_by_role("button").click()
    assert (layer.get_attribute("aria-sort"), names(page)) == ("descending", shown[::-1])
    gain.get_by_role("button").click()
    assert layer.get_attribute("aria-sort") == "none"
    assert names(page) == NAMES[::-1]  # gains of the made report fall from layer to layer


def test_unknown_values_come_last_in_both_directions(opened, store):
    report = make_report(["a", "b", "c"])
    report["layers"][1]["sensitivity"] = None
    report["layers"][1]["unknown"] = {"sensitivity": "pinned layers are not measured"}
    with opened(render_report(load_report(store(report)))) as page:
        button = page.locator("#table thead th").nth(4).get_by_role("button")
        button.click()
        assert names(page) == ["c", "a", "b"]
        button.click()
        assert names(page) == ["a", "c", "b"]
        note = page.locator("#layer-1 abbr").first
        assert note.get_attribute("title") == "pinned layers are not measured"


def test_filtering(page):
    status = page.locator("#shown")
    assert status.text_content() == "6 of 6 layers"
    page.locator("#find").fill("block CONV")
    assert names(page) == ["block.2.conv", "block.10.conv"]
    assert status.text_content() == "2 of 6 layers"
    page.locator("#find").fill("")
    page.locator("#precision").select_option("float")
    assert names(page) == [EVIL]
    page.locator("#precision").select_option("")
    page.locator("#kind").select_option("Conv2d")
    assert names(page) == NAMES


def test_details_by_keyboard_and_with_their_layer(page):
    button = page.get_by_role("button", name="block.2.conv", exact=True)
    button.focus()
    page.keyboard.press("Enter")
    assert button.get_attribute("aria-expanded") == "true"
    details = page.locator(".details")
    text = details.text_content()
    for words in (
        "Conv2d is in the map (R-CONV-2)",
        "entropy",
        "moving_average",
        "block.2.conv/Conv_myl0_3",
        "Clipped",
    ):
        assert words in text
    assert details.locator("svg path").count() == 1 + 9
    page.locator("#table thead th").first.get_by_role("button").click()  # by number, downwards
    following = page.evaluate("document.querySelector('.details').previousElementSibling.id")
    assert following == "layer-3"
    page.locator("#find").fill("head")
    assert not details.is_visible()
    page.locator("#find").fill("")
    button.click()
    assert details.count() == 0


def test_the_network_leads_to_the_layer(page):
    page.locator("#network a").nth(4).click()
    page.locator("#layer-4 + .details").wait_for()
    assert page.url.endswith("#layer-4")
    assert page.locator("#layer-4 + .details").count() == 1


def test_a_link_shows_a_layer_that_was_filtered_out_and_opens_one_that_was_closed(page):
    link = page.locator("#network a").nth(4)
    page.locator("#find").fill("head")
    link.click()
    page.locator("#layer-4 + .details").wait_for()  # the page opens it when it hears of the address
    assert page.locator("#shown").text_content() == "2 of 6 layers"
    page.locator("#layer-4 .more").click()
    assert page.locator("#layer-4 + .details").count() == 0
    link.click()  # the address is that of the layer already
    page.locator("#layer-4 + .details").wait_for()
    assert page.locator("#layer-4 + .details").count() == 1


def test_names_that_are_numbers_are_sorted_as_text(opened, store):
    with opened(
        render_report(load_report(store(make_report(["b", "10", "9", "1e3", "a"]))))
    ) as page:
        page.locator("#table thead th").nth(1).get_by_role("button").click()
        assert names(page) == ["1e3", "9", "10", "a", "b"]


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_itself_never_scrolls_sideways(opened, store, width, scheme):
    long = [
        f"model.backbone.features.stage{n}.block{n}.expand_convolution_with_a_long_name"
        for n in range(12)
    ]
    with opened(render_report(load_report(store(make_report(long)))), color_scheme=scheme) as page:
        page.set_viewport_size({"width": width, "height": 800})
        page.locator(".more").first.click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        lightness = page.evaluate(
            "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]"
        )
        assert (lightness > 128) == (scheme == "light")


def test_without_javascript_the_numbers_are_there(opened, store):
    with opened(
        render_report(load_report(store(make_report(NAMES)))), java_script_enabled=False
    ) as page:
        assert page.locator("#table > tbody > tr").count() == len(NAMES)
        assert "need JavaScript" in page.locator("noscript p").inner_text()
        assert not page.locator("#controls").is_visible()


def test_a_comparison(opened, store):
    first, second = make_report(NAMES), make_report(NAMES, float_layers=[EVIL, "head"])
    text = render_comparison(compare_runs([store(first, "one"), store(second, "two")]))
    with opened(text) as page:
        heads = page.locator("#table > tbody th")
        assert heads.all_text_contents() == [EVIL, "head"]
        page.locator("#table thead th").nth(1).get_by_role("button").click()
        page.locator("#find").fill("head")
        assert page.locator("#shown").text_content() == "1 of 2 layers"


def test_300_layers(opened, store, record_property):
    layers = [f"features.stage{n // 30}.block{n}.expand_convolution" for n in range(300)]
    text = render_report(load_report(store(make_report(layers, float_layers=layers[:4]))))
    assert len(text.encode()) <= 3_000_000
    began = time.perf_counter()
    with opened(text) as page:
        assert len(names(page)) == 300
        seconds = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd / 1000")
        print(
            f"300 layers: {len(text.encode()) / 1e6:.2f} MB, loaded in {seconds:.2f} s, "
            f"all rows read after {time.perf_counter() - began:.1f} s"
        )
        record_property("seconds", seconds)
