"""Words that no user reads: the glossary's, which a reader has to look at twice."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEVER = {
    r"stands? (?:no more|in the repository|here|twice)|standing|stand no more": "is loaded, active; is listed twice",
    r"rest(?:s|ing) in": "is stored in",
    r"strangers?(?:'s)?": "untrusted",
    r"(?:is|are|be|been|was) told(?: of| to)?": "is reported, is passed to",
    r"spoilt": "corrupted",
    r"asked again": "retried",
    r"goes on where|go on where": "resumes",
    r"what it has learned|having learned": "learned tasks, the cost of adapters",
    r"nobody (?:has )?measured": "has not been measured",
}
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "deploy/**/*.md", "samples/*.md", "*/README.md", "client/src/**/*.html")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"
)
KEYS = {"standing"}  # of JSON, which scripts read


def printed(path):
    """(line, text) of every string of a module that is no docstring and no key."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, documented) and ast.get_docstring(node)
    }
    commands = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and any("command" in ast.unparse(mark) for mark in node.decorator_list)
    ]
    docstrings -= {id(node.body[0].value) for node in commands}  # these are help screens
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and id(node) not in docstrings and text not in KEYS:
            yield node.lineno, text


@pytest.mark.slow
@pytest.mark.parametrize("never", NEVER, ids=NEVER.values())
def test_no_word_of_the_glossary_s_is_left(never):
    word = re.compile(rf"\b(?:{never})\b", re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in PAGES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if word.search(line)
    ]
    for room in ("client", "trainer", "exporter"):
        for path in (ROOT / room / "src").rglob("*.py"):
            found += [f"{path.name}:{number}: {text}" for number, text in printed(path) if word.search(text)]
    assert found == []
