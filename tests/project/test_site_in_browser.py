"""The documentation site as its readers have it: links that lead somewhere, and what Chromium makes of the pages."""

from collections import Counter
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest

from tests.project.browser import CHROMIUM, Browser

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on the PATH")
PHONE = 390
# How far the page, and what it is about, reach to the right.
WIDTH = "Math.max(...['html', 'article'].map(each => document.querySelector(each)?.scrollWidth ?? 0))"
# Red, green and blue of a formula and of the page behind it.
COLORS = """[[document.querySelector('math'), 'color'], [document.body, 'backgroundColor']].map(
    ([node, property]) => getComputedStyle(node)[property].match(/\\d+/g).map(Number))"""
# Of each displayed formula: its width, and how far its first superscript is above the end of what it belongs to.
FORMULAS = """[...document.querySelectorAll('math[display=block]')].map(formula => {
    const script = formula.querySelector('msup, msubsup');
    const [whole, base, raised] = [formula, script.firstElementChild, script.lastElementChild].map(
        each => each.getBoundingClientRect());
    return [whole.width, base.bottom - raised.bottom];
})"""
FOUND = """new Promise(done => {
    const look = () => {
        const output = document.querySelector('#search-results');
        const links = [...output.querySelectorAll('li a')].map(link => link.getAttribute('href'));
        /finished|did not match/.test(output.innerText) ? done(links) : setTimeout(look, 50);
    };
    look();
})"""


class Page(HTMLParser):
    """What a page links to and loads, and the places in it that can be linked to."""

    def __init__(self, path):
        super().__init__()
        self.links, self.places = [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "id" or (name == "name" and tag == "a"):
                self.places.add(value)
            elif name in ("href", "src"):
                self.links.append(urlsplit(value))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


def test_every_link_within_the_site_leads_somewhere(site):
    pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    broken, counts = [], Counter()
    for path, page in pages.items():
        for link in page.links:
            counts[link.scheme] += 1
            if link.scheme or link.netloc:
                continue
            target = (path.parent / unquote(link.path)).resolve() if link.path else path
            if not target.is_file() or (link.fragment and unquote(link.fragment) not in pages[target].places):
                broken.append((path.name, link.geturl()))
    assert broken == [] and counts[""] > 500


@needs_chromium
def test_pages_load_without_a_complaint_and_fit_a_phone(site, browser):
    complaints, wide = {}, {}
    for path in sorted(site.rglob("*.html")):
        browser.open(path.as_uri(), PHONE)
        if (width := browser.evaluate(WIDTH)) > PHONE:
            wide[path.name] = width
        if browser.problems:
            complaints[path.name] = list(browser.problems)
    assert (complaints, wide) == ({}, {})


@needs_chromium
def test_formulas_are_laid_out(site, browser):
    """A browser without MathML would put a superscript on its letter's line."""
    browser.open(f"{site.as_uri()}/method.html")
    formulas = browser.evaluate(FORMULAS)
    assert len(formulas) >= 8 and all(width > 50 and raised > 1 for width, raised in formulas)
    assert browser.evaluate(r"document.querySelector('article').innerText.match(/\\[a-z]+|\$/g)") is None


@needs_chromium
def test_dark_pages_are_dark_and_light_ones_light(site, browser):
    brightness = {}
    for dark in (False, True):
        browser.open(f"{site.as_uri()}/method.html", dark=dark)
        brightness[dark] = [sum(color[:3]) / 3 for color in browser.evaluate(COLORS)]
    (ink, paper), (dark_ink, dark_paper) = brightness[False], brightness[True]
    assert ink < 60 and paper > 240 and dark_ink > 190 and dark_paper < 40


@needs_chromium
def test_the_search_finds_what_is_written(site, browser):
    browser.open(f"{site.as_uri()}/search.html?q=Frobenius")
    pages = {urlsplit(link).path for link in browser.evaluate(FOUND)}
    assert {"method.html", "optimizers.html"} <= pages and browser.problems == []
