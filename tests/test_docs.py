"""The documents: their links lead somewhere, their pictures open, and the reward that they show how to write works."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def relative_links(text: str) -> list[str]:
    """Targets of links and images that are neither addresses nor anchors, without `#section`."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)\s]+)[^)]*\)", text) + re.findall(r"""(?:src|href)=["']([^"']+)["']""", text)
    return [target.split("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]


@pytest.mark.parametrize(
    ("document", "link"),
    [
        pytest.param(document, link, id=f"{document.relative_to(ROOT)}->{link}")
        for document in DOCUMENTS
        for link in dict.fromkeys(relative_links(document.read_text(encoding="utf-8")))
    ],
)
def test_a_relative_link_leads_to_a_file(document: Path, link: str) -> None:
    assert (document.parent / link).exists()


def test_the_reader_of_links_sees_links_and_images_and_no_code() -> None:
    text = '[![a](b.png)](c.md#d) <img src="e.svg"> [f](https://g.h) [i](#j)\n```\n[k](l)\n```\n[m](n.md "title")'
    assert relative_links(text) == ["b.png", "c.md", "n.md", "e.svg"]


@pytest.mark.parametrize("picture", sorted((ROOT / "docs").rglob("*.svg")), ids=lambda path: path.name)
def test_a_drawing_is_well_formed(picture: Path) -> None:
    assert ElementTree.parse(picture).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_the_reward_of_the_guide_passes_the_check_of_the_guide(capsys: pytest.CaptureFixture[str]) -> None:
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = guide.split("## Add a reward")[1].split("\n## ")[0]
    snippets = re.findall(r"^```python\n(.*?)^```", section, flags=re.DOTALL | re.MULTILINE)
    assert len(snippets) == 2
    names: dict[str, Any] = {}
    for snippet in snippets:
        exec(snippet, names)
    assert capsys.readouterr().out == "(1.0, 0.0)\n"
