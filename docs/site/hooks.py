"""What MkDocs is told beyond mkdocs.yml: pages that are made, and links that need not be written.

- The README is the first page, and the changelog and the licence are pages as well.
- Each table of public-api.md becomes a page with the docstrings of its names, in full.
- reference/a-z.md is an index of all errors, metrics, events and settings.
- A public name in code type is a link to what its docstring says.
- A link to an example leads to a page that shows it.
- A page that mkdocs.yml does not name is added to the section of its folder.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from tests.docs.public_names import PAGE, sections  # noqa: E402 - found in the path set above

FOLDERS = {"how-to": "Do", "reference": "Look up", "explanation": "Understand"}
API = "reference/api"
PLACES = {
    "Counters": "counter",
    "Observations": "observation",
    "Events": "event",
    "Policies": "policy",
    "Sources": "setting of sources",
}

FENCE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
PICTURE = re.compile(r"<picture>.*?</picture>", re.DOTALL)
FIRST_CELL = re.compile(r"\| ([^|]*`[^|]*) \|")
CODE = re.compile(r"`(\w+)`")

SECTIONS = sections(PAGE.read_text(encoding="utf-8"))
PUBLIC = {name: f"{each.package}.{name}" for each in SECTIONS for name in each.names}
MENTION = re.compile(rf"(?<![\[`\w])`({'|'.join(PUBLIC)})([.(][^`\n]*)?`(?![`\]])")


# What stands where -----------------------------------------------------------------------------


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    chapters = {title: pages for entry in config.nav for title, pages in entry.items()}
    listed = re.findall(r"\]\((\w+\.py)\)", (DOCS / "examples" / "README.md").read_text("utf-8"))
    chapters["Learn"] += [f"examples/{example}.md" for example in listed]
    for folder, title in FOLDERS.items():
        found = [path.relative_to(DOCS).as_posix() for path in (DOCS / folder).glob("*.md")]
        chapters[title] += sorted(set(found) - set(chapters[title]))
    chapters["Look up"].insert(1, {"Public API in full": list(api_pages())})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path, text in {**front_pages(), **api_pages(), **example_pages()}.items():
        files.append(File.generated(config, path, content=text))
    return files


# Pages that are made ---------------------------------------------------------------------------


def front_pages() -> dict[str, str]:
    readme = PICTURE.sub(both_pictures, (ROOT / "README.md").read_text(encoding="utf-8"))
    readme = readme.replace("](docs/", "](")
    readme = readme.replace("](CHANGELOG.md)", "](changelog.md)")
    readme = readme.replace("](LICENSE)", "](license.md)")
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    return {
        "index.md": f"---\nhide: [navigation]\n---\n{readme}",
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        "license.md": f"# Licence\n\n```text\n{licence}```\n",
        "reference/a-z.md": a_to_z(),
    }


def both_pictures(picture: re.Match[str]) -> str:
    """The picture for light and the one for dark, between which the switch of the theme decides."""
    said = dict(re.findall(r'(alt|src|srcset)="([^"]+)"', picture[0]))
    return "".join(
        f"![{said['alt']}]({said[which]}#only-{mode})"
        for which, mode in (("src", "light"), ("srcset", "dark"))
    ).replace("](docs/", "](")


def api_pages() -> dict[str, str]:
    """A page for each section of the public API."""
    made = {}
    for each in SECTIONS:
        words = re.sub(r"\]\((?!http)", "](../../", each.words)
        options = "\n    options: { show_bases: true }" if each.title == "Errors" else ""
        entries = "\n\n".join(f"::: {PUBLIC[name]}{options}" for name in each.names)
        made[f"{API}/{slug(each.title)}.md"] = f"# {each.title}\n\n{words}\n\n{entries}\n"
    return made


def programs() -> list[str]:
    found = sorted((DOCS / "examples").rglob("*.py"))
    return [path.relative_to(DOCS).as_posix() for path in found if path.name != "__init__.py"]


def example_pages() -> dict[str, str]:
    """A page for each program under docs/examples."""
    return {
        f"{path}.md": f"# {Path(path).name}\n\n```python\n{(DOCS / path).read_text('utf-8')}```\n"
        for path in programs()
    }


def a_to_z() -> str:
    """Every error, metric, event and setting, in the order of the alphabet."""
    errors = (DOCS / "reference" / "errors.md").read_text(encoding="utf-8")
    names = re.findall(r"^### (\w+)$", errors, re.MULTILINE)
    found = [(name, "error", f"errors.md#{name.lower()}") for name in names]
    for page in ("metrics.md", "settings.md"):
        cells = first_cells((DOCS / "reference" / page).read_text(encoding="utf-8"))
        found += [(name, kind, f"{page}#{anchor(kind, name)}") for kind, name in cells]
    letters: dict[str, list[str]] = {}
    for name, kind, target in sorted(found, key=lambda each: (each[0].lower(), each[1])):
        letters.setdefault(name[0].upper(), []).append(f"- [`{name}`]({target}), {kind}")
    parts = [f"## {letter}\n\n" + "\n".join(lines) for letter, lines in letters.items()]
    title = "# Errors, metrics, events and settings from A to Z"
    return "\n\n".join([title, *parts]) + "\n"


def first_cells(page: str) -> list[tuple[str, str]]:
    """The kind and the name of everything that the rows of the tables of a page are about."""
    return [each for line, section in rows(page) for each in about(line, section)]


def rows(page: str) -> Iterator[tuple[str, str]]:
    """Each line of a page with the title of its section."""
    section = ""
    for line in page.split("\n"):
        section = line[3:] if line.startswith("## ") else section
        yield line, section


def about(line: str, section: str) -> list[tuple[str, str]]:
    """The kind and the name of what one row is about; a policy brings its settings along."""
    if not (cell := FIRST_CELL.match(line)):
        return []
    names = CODE.findall(cell[1])
    found = [(PLACES.get(section, f"setting of {section}"), name) for name in names]
    if section == "Policies":
        settings = re.findall(r"`(\w+)(?:=[^`]*)?`", line[cell.end() :])
        found += [(f"setting of {names[0]}", setting) for setting in settings]
    return found


# Links that need not be written ----------------------------------------------------------------


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    path = page.file.src_uri
    if path in ("reference/metrics.md", "reference/settings.md"):
        markdown = with_anchors(markdown)
    if path.startswith((API, "examples/")) and path != "examples/README.md":
        return markdown
    parts: list[str] = []
    end = 0
    for fence in FENCE.finditer(markdown):
        parts += [with_links(markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, with_links(markdown[end:])])


def with_anchors(page: str) -> str:
    """The page with places to link to at the beginning of each row."""

    def marked(line: str, section: str) -> str:
        marks = [f'<a id="{anchor(kind, name)}"></a>' for kind, name in about(line, section)]
        return f"| {''.join(marks)}{line[2:]}" if marks else line

    return "\n".join(marked(line, section) for line, section in rows(page))


def with_links(text: str) -> str:
    """The text with links to pages of examples, and from public names to their docstrings."""
    text = re.sub(r"(\]\((?!http)[^)#\s]+\.py)\)", r"\1.md)", text)
    lines = text.split("\n")
    return "\n".join(line if line.startswith("#") else MENTION.sub(link, line) for line in lines)


def link(found: re.Match[str]) -> str:
    return f"[{found[0]}][{PUBLIC[found[1]]}]"


def anchor(kind: str, name: str) -> str:
    return f"{slug(kind)}-{name}".lower()


def slug(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")
