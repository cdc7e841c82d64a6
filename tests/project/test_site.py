"""The documentation site: it builds without a warning, names all that is public and loads nothing from elsewhere."""

import re
import zlib

import fnl_hf
from fnl_hf import commands, reports, training
from fnl_hf.commands import convert
from tests.conftest import ROOT


def test_every_public_name_is_in_the_reference(site):
    inventory = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    documented = {line.split()[0] for line in inventory.splitlines() if " py:" in line}
    public = {f"fnl_hf.{name}" for name in fnl_hf.__all__}
    for folder in (commands, reports, training):
        public |= {f"{folder.__name__}.{name}" for name in folder.__all__}
    own = [name for name, value in vars(convert).items() if getattr(value, "__module__", "") == convert.__name__]
    public |= {f"{convert.__name__}.{name}" for name in own if not name.startswith("_")}
    assert len(public) > 30 and public - documented == set()


def test_the_pages_load_nothing_from_the_network(site):
    pages, styles = sorted(site.rglob("*.html")), sorted(site.rglob("*.css"))
    assert {page.stem for page in pages} > {path.stem for path in (ROOT / "docs").glob("*.md")}
    loaded = r"""<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=["'](?:https?:)?//[^"']*"""
    imported = r"""(?:url\(|@import)\s*["']?(?:https?:)?//[^"')]*"""
    searched = [(page, loaded) for page in pages] + [(style, imported) for style in styles]
    found = [(file.name, request) for file, pattern in searched for request in re.findall(pattern, file.read_text())]
    assert found == []
