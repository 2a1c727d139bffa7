"""The pages name files, links and rooms that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mobius_train"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
# Paths of this repository; those that end in a variable part are not checked.
NAMED = re.compile(
    r"(?<![\w./-])((?:mobius_train|configs|tools|docs|slurm|tests|benchmarks|ds_configs|assets)/[\w./-]*[\w/])(?![\w{<*…])"
)
# Files of the package, named without it.
IN_PACKAGE = re.compile(r"`((?:assembly|checkpoint|data|diffusion|encoders|engine|models|tasks|plan)/[\w/]+\.py)`")


def broken_links(text: str, folder: Path) -> list[str]:
    """Relative links of a page in `folder` that lead nowhere."""
    links = [link.partition("#")[0] for link in LINK.findall(text) if "://" not in link and not link.startswith("#")]
    return [link for link in links if not (folder / link).exists()]


def missing_paths(text: str) -> list[str]:
    """Paths that a page names and that do not exist."""
    # A record need not have been written.
    paths = [ROOT / name for name in NAMED.findall(re.sub(r"--record \S+", "", text))]
    paths += [PACKAGE / name for name in IN_PACKAGE.findall(text)]
    return [str(path.relative_to(ROOT)) for path in paths if not path.exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page.read_text(encoding="utf-8"), page.parent) == []


# The change log names files that are gone.
@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_paths_exist(page: Path) -> None:
    assert missing_paths(page.read_text(encoding="utf-8")) == []


def test_a_path_or_link_to_nothing_is_found() -> None:
    text = "see [this](nowhere.md), [that](README.md), `tools/nothing.py`, `models/nothing.py` and `configs/emoji.yaml`"
    assert broken_links(text, ROOT) == ["nowhere.md"]
    assert missing_paths(text) == ["tools/nothing.py", "mobius_train/models/nothing.py"]


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"({page.name})" not in index] == ["README.md"]


def rooms_from_the_top() -> list[str]:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text.partition("| room | contents |")[2].partition("\n\n")[0]
    return re.findall(r"^\| `([\w.]+)` \|", table, re.MULTILINE)


def room_of(parts: list[str]) -> str:
    return parts[1] if (PACKAGE / parts[1]).is_dir() else f"{parts[1]}.py"


def imports() -> set[tuple[str, str, str]]:
    """(importing room, imported room, place) of every import between rooms, those inside functions too."""
    edges = set()
    for path in PACKAGE.rglob("*.py"):
        relative = path.relative_to(ROOT)
        if relative.parts == ("mobius_train", "__init__.py"):
            continue
        importing = room_of(list(relative.with_suffix("").parts))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                parts = name.split(".")
                if parts[0] == "mobius_train" and len(parts) > 1 and room_of(parts) != importing:
                    edges.add((importing, room_of(parts), str(relative)))
    return edges


def test_the_page_names_every_room() -> None:
    rooms = {
        room_of(list(path.relative_to(ROOT).with_suffix("").parts))
        for path in PACKAGE.iterdir()
        if path.name not in ("__init__.py", "__pycache__", "py.typed")
    }
    assert sorted(rooms_from_the_top()) == sorted(rooms)


def test_imports_point_down_only() -> None:
    rank = {room: number for number, room in enumerate(rooms_from_the_top())}
    edges = imports()
    assert len(edges) > 100, "the control: imports are found"
    assert [edge for edge in sorted(edges) if rank[edge[0]] >= rank[edge[1]]] == []


def test_the_drawing_has_every_arrow_of_the_code() -> None:
    drawing = (ROOT / "docs" / "images" / "rooms.svg").read_text(encoding="utf-8")
    arrows = re.findall(r'data-from="([\w.]+)" data-to="([\w.]+)"', drawing)
    drawn = {room for arrow in arrows for room in arrow}
    edges = {(importing, imported) for importing, imported, _ in imports()}
    assert [arrow for arrow in arrows if arrow not in edges] == []
    implied = {room: {imported for importing, imported in arrows if importing == room} for room in drawn}
    for room in reversed(rooms_from_the_top()):
        for imported in list(implied.get(room, ())):
            implied[room] |= implied[imported]
    assert [edge for edge in sorted(edges) if edge[0] in drawn and edge[1] in drawn - implied[edge[0]]] == []
    # The others are the ground.
    assert [edge for edge in sorted(edges) if edge[0] not in drawn and edge[1] in drawn] == []
    assert [room for room in rooms_from_the_top() if "." not in room and room not in drawing] == []


def test_the_examples_of_backbones_are_the_tested_ones() -> None:
    page = (ROOT / "docs" / "add-a-backbone.md").read_text(encoding="utf-8")
    sources = [ROOT / "tests" / "helpers" / "toy_backbone.py", *sorted((PACKAGE / "models" / "pixart").glob("*.py"))]
    tested = [source.read_text(encoding="utf-8") for source in sources]
    blocks = re.findall(r"```python\n(.*?)\n```", page, re.DOTALL)
    assert len(blocks) == 9
    assert [block.splitlines()[0] for block in blocks if not any(block in text for text in tested)] == []
