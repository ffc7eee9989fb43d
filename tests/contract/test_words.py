"""Words that the glossary forbids appear in no page, printed text, docstring or comment."""

import ast
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEVER = {
    r"stands? (?:no more|in the repository|here|twice)|standing(?!:)|stand no more": "is loaded; is listed twice",
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
KEYS = {"standing"}  # a JSON key on which scripts depend


def written(path):
    """Yield (line, text) of every string and comment of a module, except JSON keys."""
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and text not in KEYS:
            yield node.lineno, text


@pytest.mark.slow
@pytest.mark.parametrize("never", NEVER, ids=NEVER.values())
def test_forbidden_words_are_not_used(never):
    word = re.compile(rf"\b(?:{never})\b", re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in PAGES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if word.search(line)
    ]
    for folder in ("client/src", "trainer/src", "exporter/src"):
        for path in (ROOT / folder).rglob("*.py"):
            found += [f"{path.name}:{number}: {text}" for number, text in written(path) if word.search(text)]
    assert found == []
