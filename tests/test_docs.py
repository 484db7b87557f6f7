"""The documentation is a program too: every block of Python in docs/ and README.md runs, and does what the page says.

How a page is read:

* The blocks of one page share a namespace, in order. `<!-- fresh -->` before a block starts a new one: what follows is
  a program that stands alone.
* An `output` block (or a `text` block with `<!-- output -->` before it) is what the Python block above it prints,
  exactly.
* `<!-- raises: TypeError: some words -->` before a block: it must fail so, with those words in the message.
* A block whose first line is `# from kernel/core/loop.py` is a quotation. It does not run; it must stand in that file,
  whatever its indentation. A line `...` stands for lines left out.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import itertools
import re
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from leftovers import idle_workers_leave, resource_tracker_leaves

import kernel

__all__ = ["idle_workers_leave", "resource_tracker_leaves"]

ROOT = Path(__file__).parent.parent
QUOTATION = "# from "
LANGUAGES = {"", "python", "output", "text", "sh", "bash", "console", "toml", "json", "diff", "c"}


@dataclass
class Block:
    """One fenced block: its language, its first line's number, its text, and the comment right before it."""

    language: str
    line: int
    text: str
    mark: str
    output: str | None = None  # of a Python block: what it must print

    @property
    def quotes(self) -> str | None:
        """The file a quotation is from."""
        first = self.text.partition("\n")[0]
        return first.removeprefix(QUOTATION).strip() if first.startswith(QUOTATION) else None

    @property
    def raises(self) -> tuple[str, str] | None:
        """The name of the exception that the block must end with, and words of its message."""
        if not self.mark.startswith("raises:"):
            return None
        name, _, words = self.mark.removeprefix("raises:").partition(":")
        return name.strip(), words.strip()


@dataclass
class Page:
    path: Path
    blocks: list[Block] = field(default_factory=list)
    headings: set[str] = field(default_factory=set)
    links: list[tuple[int, str]] = field(default_factory=list)
    namespace: dict[str, Any] = field(default_factory=dict)
    done: int = 0  # so many programs were executed

    @property
    def programs(self) -> list[Block]:
        return [block for block in self.blocks if block.language == "python" and block.quotes is None]

    @property
    def quotations(self) -> list[Block]:
        return [block for block in self.blocks if block.language == "python" and block.quotes is not None]

    def run(self, index: int) -> None:
        """Execute program `index`, and first those before it that no test has executed yet."""
        programs = self.programs
        for program in programs[self.done : index + 1]:
            self.done += 1
            self._execute(program)

    def _execute(self, block: Block) -> None:
        if block.mark == "fresh" or not self.namespace:
            self.namespace = {"__name__": "__main__"}
        # The empty lines make tracebacks point into the page.
        code = compile("\n" * (block.line - 1) + block.text, str(self.path), "exec", dont_inherit=True)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            if block.raises is None:
                exec(code, self.namespace)
            else:
                must_raise(block.raises, code, self.namespace)
        if block.output is not None:
            assert printed.getvalue().rstrip() == block.output.rstrip()


def must_raise(expected: tuple[str, str], code: types.CodeType, namespace: dict[str, Any]) -> None:
    name, words = expected
    try:
        exec(code, namespace)
    except BaseException as error:
        raised = error
    else:
        pytest.fail(f"should have raised {name}, but ran through")
    assert type(raised).__name__ == name, f"raised {raised!r}"
    assert words in str(raised), f"raised {raised!r}"


def parse(path: Path, text: str) -> Page:
    """Take a page of Markdown apart."""
    page = Page(path)
    lines = enumerate(text.splitlines(), start=1)
    mark = ""
    for number, line in lines:
        fence = re.match(r"(\s*)(`{3,}|~{3,})\s*(\S*)", line)
        if fence:
            page.blocks.append(read_block(number, fence, lines, mark))
            mark = ""
        elif comment := re.fullmatch(r"\s*<!--\s*(.*?)\s*-->\s*", line):
            mark = comment[1]
        elif line.strip():
            mark = ""
            read_prose(page, number, line)
    attach_outputs(page)
    return page


def read_block(number: int, fence: re.Match[str], lines: Iterator[tuple[int, str]], mark: str) -> Block:
    content: list[str] = []
    for _, line in lines:
        if line.strip().startswith(fence[2]) and not line.strip().strip("`~"):
            return Block(fence[3], number + 1, textwrap.dedent("\n".join(content)), mark)
        content.append(line)
    raise AssertionError(f"the block that begins in line {number} is never closed")


def read_prose(page: Page, number: int, line: str) -> None:
    if heading := re.match(r"#{1,6}\s+(.*)", line):
        page.headings.add(slug(heading[1]))
    plain = re.sub(r"`[^`]*`", "", line)
    targets = re.findall(r"\]\(([^)\s]+)[^)]*\)", plain)
    targets += re.findall(r"^\s*\[[^\]]+\]:\s*(\S+)", plain)
    targets += re.findall(r"""(?:href|src)=["']([^"']+)["']""", plain)
    page.links += [(number, target) for target in targets]


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def attach_outputs(page: Page) -> None:
    last: Block | None = None
    for block in page.blocks:
        if block.language == "output" or (block.language == "text" and block.mark == "output"):
            assert last is not None, f"line {block.line}: an output block without a Python block above it"
            assert last.output is None, f"line {block.line}: a second output block for one Python block"
            last.output = block.text
        elif block.language == "python" and block.quotes is None:
            last = block
        else:
            last = None


def normal(text: str) -> list[str]:
    """The lines of a piece of source, without indentation and empty lines."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def find_quotation(quotation: str, source: str) -> str | None:
    """The first part of `quotation` that does not stand in `source`, in order; None if all of it does."""
    lines, start = normal(source), 0
    for part in re.split(r"(?m)^\s*\.\.\.\s*$", quotation):
        wanted = normal(part)
        for at in range(start, len(lines) - len(wanted) + 1):
            if lines[at : at + len(wanted)] == wanted:
                start = at + len(wanted)
                break
        else:
            return part
    return None


def load() -> dict[str, Page]:
    paths = sorted((ROOT / "docs").glob("**/*.md"))
    if (ROOT / "README.md").exists():
        paths.append(ROOT / "README.md")
    return {str(path.relative_to(ROOT)): parse(path, path.read_text()) for path in paths}


PAGES = load()
PROGRAMS = [(name, i) for name, page in PAGES.items() for i in range(len(page.programs))]
QUOTATIONS = [(name, i) for name, page in PAGES.items() for i in range(len(page.quotations))]


# ---- the pages -----------------------------------------------------------------------------------------


def test_the_pages_are_found() -> None:
    assert {"docs/index.md", "docs/traps.md", "docs/readiness.md", "docs/coming-from-trio.md"} <= set(PAGES)
    assert QUOTATIONS


@pytest.mark.usefixtures("idle_workers_leave", "resource_tracker_leaves")
@pytest.mark.parametrize(
    ("name", "index"), PROGRAMS, ids=[f"{name}:{PAGES[name].programs[i].line}" for name, i in PROGRAMS]
)
def test_program_does_what_its_page_says(name: str, index: int) -> None:
    PAGES[name].run(index)


@pytest.mark.parametrize(
    ("name", "index"), QUOTATIONS, ids=[f"{name}:{PAGES[name].quotations[i].line}" for name, i in QUOTATIONS]
)
def test_quotation_stands_in_the_source(name: str, index: int) -> None:
    block = PAGES[name].quotations[index]
    assert block.quotes is not None
    missing = find_quotation(block.text.partition("\n")[2], (ROOT / block.quotes).read_text())
    assert missing is None, f"not in {block.quotes}:\n{missing}"


@pytest.mark.parametrize("name", PAGES)
def test_every_block_has_a_language_that_is_known(name: str) -> None:
    # A block marked `py` or `pycon` would be shown as Python and never run.
    assert {block.language for block in PAGES[name].blocks} <= LANGUAGES


@pytest.mark.parametrize("name", PAGES)
def test_every_mark_is_spelled_right(name: str) -> None:
    marks = [(b.line, b.mark) for b in PAGES[name].blocks if b.mark not in ("", "fresh", "output") and not b.raises]
    assert not marks


@pytest.mark.parametrize("name", PAGES)
def test_every_relative_link_resolves(name: str) -> None:
    page = PAGES[name]
    broken = [f"line {line}: {target}" for line, target in page.links if not resolves(page, target)]
    assert not broken


def resolves(page: Page, target: str) -> bool:
    if re.match(r"[a-z]+:", target):
        return True
    file, _, anchor = target.partition("#")
    if not file:
        return anchor in page.headings
    path = (page.path.parent / file).resolve()
    if not path.exists():
        return False
    return not anchor or path.suffix != ".md" or anchor in parse(path, path.read_text()).headings


# ---- the names -----------------------------------------------------------------------------------------

NAMES = [(module, name) for module in (kernel, kernel.lowlevel, kernel.testing) for name in module.__all__]


@pytest.mark.parametrize(("module", "name"), NAMES, ids=[f"{module.__name__}.{name}" for module, name in NAMES])
def test_public_name_has_a_docstring(module: types.ModuleType, name: str) -> None:
    thing = getattr(module, name)
    if inspect.isclass(thing) or inspect.isroutine(thing) or inspect.ismodule(thing):
        assert thing.__doc__
    elif type(thing).__module__.startswith("kernel"):
        assert type(thing).__doc__
    else:  # a constant: its docstring is the string that follows it in the source
        assert name in documented_constants()


def documented_constants() -> set[str]:
    found = set()
    for path in (ROOT / "kernel").glob("**/*.py"):
        body = ast.parse(path.read_text()).body
        for before, after in itertools.pairwise(body):
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if is_text and isinstance(before, ast.Assign | ast.AnnAssign):
                targets = before.targets if isinstance(before, ast.Assign) else [before.target]
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


# ---- the checker itself --------------------------------------------------------------------------------


def page_of(text: str) -> Page:
    return parse(ROOT / "docs" / "made-up.md", text)


def test_a_program_that_prints_something_else_is_found() -> None:
    page = page_of("```python\nprint(1)\n```\nprints\n```output\n2\n```\n")
    with pytest.raises(AssertionError):
        page.run(0)


def test_a_program_that_should_fail_and_does_not_is_found() -> None:
    with pytest.raises(pytest.fail.Exception, match="ran through"):
        page_of("<!-- raises: ValueError -->\n```python\nint('1')\n```\n").run(0)


def test_a_program_that_fails_otherwise_is_found() -> None:
    with pytest.raises(AssertionError, match="ValueError"):
        page_of("<!-- raises: TypeError -->\n```python\nint('x')\n```\n").run(0)
    with pytest.raises(AssertionError, match="invalid literal"):
        page_of("<!-- raises: ValueError: something else -->\n\n```python\nint('x')\n```\n").run(0)


def test_programs_share_a_namespace_until_one_is_fresh() -> None:
    page = page_of("```python\na = 1\n```\n```python\nb = a\n```\n<!-- fresh -->\n```python\nb\n```\n")
    page.run(1)  # and, unasked, the one before it
    with pytest.raises(NameError):
        page.run(2)


def test_a_quotation_is_compared_line_by_line_and_in_order() -> None:
    source = "def f():\n    a = 1\n\n    b = 2\n    c = 3\n"
    assert find_quotation("a = 1\nb = 2\n", source) is None
    assert find_quotation("def f():\n    ...\n    c = 3\n", source) is None
    assert find_quotation("a = 1\nc = 3\n", source) is not None
    assert find_quotation("c = 3\n...\na = 1\n", source) is not None


def test_a_broken_link_is_found() -> None:
    page = page_of(
        "# Some page\n[a](index.md) [b](missing.md) [c](#some-page) [d](#other) `[e](x.md)` [f](https://x.y)\n"
    )
    assert [target for _, target in page.links if not resolves(page, target)] == ["missing.md", "#other"]


def test_a_block_that_is_never_closed_is_found() -> None:
    with pytest.raises(AssertionError, match="never closed"):
        page_of("```python\na = 1\n")
