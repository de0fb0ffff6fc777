"""The manual pages say what the code does: made parts, options, and every example in them."""

from __future__ import annotations

import re
import shutil
import subprocess

import documents
import pytest
from documents import ROOT

PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in documents.MANUALS}
PARTS = [(page, part) for page, text in PAGES.items() for part in documents.parts(text)]

# --- made parts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("page", "part"), PARTS)
def test_made_list_is_as_the_code_has_it(page, part):
    body = documents.parts(PAGES[page])[part]
    assert body == documents.make_list(part, body), f"run: python tests/documents.py --rewrite ({page})"


@pytest.mark.parametrize(("page", "part"), PARTS)
def test_every_entry_is_explained(page, part):
    entries = documents.entries(documents.parts(PAGES[page])[part])
    assert len(entries) > 1
    assert [word for word, meaning in entries.items() if not meaning.strip()] == []


def test_every_mark_is_a_list():
    for page, text in PAGES.items():
        opened = len(re.findall(r'^\.\\" made: ', text, re.MULTILINE))
        assert len(documents.parts(text)) == opened == text.count('\n.\\" end\n'), page


# --- form ---------------------------------------------------------------------------------------------------------


def said(*command):
    """What the command complains of."""
    ran = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    return (ran.stdout + ran.stderr).splitlines()


@pytest.mark.skipif(not shutil.which("mandoc"), reason="mandoc is not installed")
@pytest.mark.parametrize("page", PAGES)
def test_page_is_clean_before_mandoc(page):
    """Its style level too, save that it looks for the pages named in SEE ALSO among those installed."""
    complaints = said("mandoc", "-T", "lint", "-W", "style", ROOT / page)
    assert [line for line in complaints if "referenced manual not found" not in line] == []


@pytest.mark.skipif(not shutil.which("groff"), reason="groff is not installed")
@pytest.mark.parametrize("page", PAGES)
def test_page_is_clean_before_groff(page):
    """As `man --warnings` does it, at 80 columns."""
    assert said("groff", "-mandoc", "-Tutf8", "-rLL=78n", "-ww", "-z", ROOT / page) == []
