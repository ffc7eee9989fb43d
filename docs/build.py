"""Build the documentation site: stage the repository's pages, generate the reference, and run Zensical.

Dead links and pages that are missing from the navigation are errors. Staged pages keep their paths in the repository,
so links work both there and on the site. ``make docs`` runs this script.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
STAGE = ROOT / "build" / "docs"
SOURCE = "https://github.com/clipweld/clipweld/blob/main/"
PAGES = (
    "README.md", "RESULTS.md", "TRUST.md", "SECURITY.md", "CONTRIBUTING.md", "CODE_OF_CONDUCT.md", "CHANGELOG.md",
    "deploy/README.md", "samples/README.md", "trainer/src/clipweld/trainer/mini/LICENSES.md",
)  # fmt: skip
# The commands whose help is the reference; tests/test_site.py compares them with the help of the program itself.
COMMANDS = {
    "trainer": ("tasks", "fit", "sequence", "evaluate", "report", "bench"),
    "exporter": ("merge", "serve", "install-server", "versions", "verify", "promote", "rollback", "prune"),
    "client": ("classify", "bench", "tasks", "versions", "demo"),
}
CLIENT = "<!-- clipweld.client -->"  # replaced with the public names of the client
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)(#[^)\s]*)?\)")
MATH = re.compile(r"\$\$(.+?)\$\$|\$`(.+?)`\$", re.S)


def help_of(*command: str) -> str:
    """Return a command's help screen, 100 columns wide and without colours."""
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    program = str(Path(sys.executable).parent / command[0])
    done = subprocess.run(
        [program, *command[1:], "--help"], capture_output=True, text=True, check=True, env=environment
    )
    return "\n".join(line.rstrip() for line in done.stdout.splitlines()).strip("\n")


def commands_page(program: str) -> str:
    """Return the reference page of one program: its help and the help of each subcommand."""
    screens = [((program,), f"# {program}")] + [((program, name), f"## {program} {name}") for name in COMMANDS[program]]
    return "\n".join(f"{title}\n\n```text\n{help_of(*command)}\n```\n" for command, title in screens)


def client_page() -> str:
    """Return the reference of the client: every public name, in the order of ``__all__``, and its errors."""
    from clipweld import client

    errors = client.errors
    names = [f"::: clipweld.client.{name}\n" for name in client.__all__ if name != "errors"]
    tree = f"### Errors\n\n```text\n{errors.__doc__}```\n"
    kinds = [
        name for name, kind in vars(errors).items() if isinstance(kind, type) and kind.__module__ == errors.__name__
    ]
    options = "    options: {heading_level: 4, inherited_members: false}\n"
    return "\n".join([*names, tree, *(f"::: clipweld.client.errors.{name}\n{options}" for name in kinds)])


def schemas() -> dict[str, dict]:
    """Return the JSON Schemas of adapter metadata, cards and manifests, from the types that validate them."""
    from pydantic import TypeAdapter

    from clipweld.exporter.store.schemas import Card, Manifest
    from clipweld.trainer.adapters.adapter import SealedMetadata

    kinds = {"adapter": SealedMetadata, "card": Card, "manifest": Manifest}
    made = {}
    for name, kind in kinds.items():
        schema = json.dumps(TypeAdapter(kind).json_schema(), indent=2, ensure_ascii=False)
        # \z, the end of the text in our regular expressions, is $ in JSON Schema.
        made[name] = {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            **json.loads(schema.replace(r"\\z", "$"), object_hook=_closed),
            "title": f"clipweld {name}",
        }
    return made


def stage(folder: Path) -> None:
    """Empty a folder, and copy and generate all pages and pictures into it."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    shutil.copy(ROOT / "client/src/clipweld/client/page/icon.svg", folder / "docs" / "icon.svg")
    for page in PAGES:
        (folder / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / page, folder / page)
    reference = folder / "docs" / "reference"
    for program in COMMANDS:
        (reference / f"{program}.md").write_text(commands_page(program), encoding="utf-8")
    python = reference / "python.md"
    python.write_text(python.read_text(encoding="utf-8").replace(CLIENT, client_page()), encoding="utf-8")
    parts = [(reference / "formats.md").read_text(encoding="utf-8")]
    for name, schema in schemas().items():
        text = json.dumps(schema, indent=2, ensure_ascii=False)
        (reference / f"{name}.schema.json").write_text(text + "\n", encoding="utf-8")
        parts.append(f'??? note "{name}.schema.json"\n\n    ```json\n{_indented(text)}\n    ```\n')
    (reference / "formats.md").write_text("\n".join(parts), encoding="utf-8")
    for page in folder.rglob("*.md"):
        text = LINK.sub(lambda link, page=page: _link(link, page, folder), page.read_text(encoding="utf-8"))
        page.write_text(MATH.sub(_mathml, text), encoding="utf-8")


def left_out(folder: Path) -> list[str]:
    """Return the pages that are missing from the navigation."""
    nav = json.dumps(tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"])
    pages = sorted(str(page.relative_to(folder)) for page in folder.rglob("*.md"))
    return [page for page in pages if f'"{page}"' not in nav]


def _closed(schema: dict) -> dict:
    """Refuse names that match none of the patterns of a schema, as our reader does; pydantic's schemas omit this."""
    return schema | {"additionalProperties": False} if "patternProperties" in schema else schema


def _link(link: re.Match, page: Path, folder: Path) -> str:
    """Point a link at the repository if its target is a file there that the site does not have."""
    before, target, anchor = link.groups(default="")
    if re.match(r"\w+:", target) or (page.parent / target).is_file():
        return link[0]
    place = os.path.relpath((page.parent / target).resolve(), folder.resolve())
    return f"{before}{SOURCE}{place}{anchor})" if (ROOT / place).exists() else link[0]


def _mathml(formula: re.Match) -> str:
    from latex2mathml.converter import convert

    block, inline = formula.groups()
    if block:
        return f'<div class="formula">{convert(block.strip(), display="block")}</div>'
    return f"<span>{convert(inline)}</span>"


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def main() -> None:
    """Build the site in site/; on failure, print the reason and exit with status 1."""
    stage(STAGE)
    if pages := left_out(STAGE):
        sys.exit(f"not in the navigation of zensical.toml: {', '.join(pages)}")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        sys.exit("the site was not built: see the warnings above")


if __name__ == "__main__":
    main()
