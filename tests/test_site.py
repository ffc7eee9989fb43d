"""The documentation site: its reference is complete, its schemas fit real files, and a strict build passes."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import jsonschema
import pytest

from clipweld import client

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def build():
    """docs/build.py, imported as a module."""
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def validators(build):
    """A schema validator per file format."""
    schemas = build.schemas()
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    return {name: jsonschema.Draft202012Validator(schema) for name, schema in schemas.items()}


@pytest.mark.slow
@pytest.mark.parametrize("program", ["trainer", "exporter", "client"])
def test_reference_has_every_subcommand(build, program):
    page = build.commands_page(program)
    own, *others = re.findall(r"```text\n(.*?)```", page, re.S)
    # A row in a list of commands: a name, two or more blanks, and a sentence.
    listed = own[re.search(r"(?i)\b(?:sub)?commands\b\W*─|^commands:?$", own, re.M).start() :]
    rows = re.findall(r"^[│ ]+(?:• )?([a-z][a-z-]*) {2,}\S", listed, re.M)
    assert sorted(rows) == sorted(build.COMMANDS[program])
    assert len(others) == len(build.COMMANDS[program])
    assert [screen.split()[2] for screen in others] == list(build.COMMANDS[program])
    assert "\x1b" not in page


def test_reference_has_every_public_name_of_the_client(build):
    page = build.client_page()
    assert re.findall(r"^::: clipweld\.client\.(\w+)$", page, re.M) == [n for n in client.__all__ if n != "errors"]
    assert "::: clipweld.client.errors.ServerBusy" in page


def test_the_layers_on_the_architecture_page_are_those_of_the_import_test():
    spec = importlib.util.spec_from_file_location("rooms", ROOT / "tests/contract/test_rooms.py")
    rooms = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rooms)
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    for room, floors in rooms.FLOORS.items():
        table = page.split(f"**{room}**, from the top:")[1].split("\n\n")[1]
        rows = {
            int(number): re.findall(r"`(\w+)`", names) for number, names in re.findall(r"\| (\d+) \| (.+) \|", table)
        }
        assert rows == {number: wings.split() for number, wings in enumerate(floors)}
    seams = page.split("may import ")[1].split(".\n")[0]
    assert set(re.findall(r"`(\w+)`", seams)) == {name.rpartition(".")[2] for name in rooms.SEAMS}


def test_no_page_is_left_out_of_the_navigation(build, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "commands_page", lambda program: f"# {program}\n")
    monkeypatch.setattr(build, "_mathml", lambda formula: formula[0])
    build.stage(tmp_path)
    assert build.left_out(tmp_path) == []
    (tmp_path / "docs/new.md").write_text("# New\n")
    assert build.left_out(tmp_path) == ["docs/new.md"]


def test_an_adapter_s_metadata_fits_its_schema_and_invalid_metadata_does_not(validators, adapters):
    from clipweld.trainer.header import read_entry

    metadata = json.loads(read_entry(adapters / "digits.safetensors"))
    validators["adapter"].validate(metadata)
    for wrong in (
        {"scaling": 0},
        {"parents": ["no hash"]},
        {"accuracy": {"before": {"digits": 101}}},
        {"class_names": "one"},
        {"format": 2},
        {"more": 1},
    ):
        assert not validators["adapter"].is_valid(metadata | wrong), wrong
    assert not validators["adapter"].is_valid({name: value for name, value in metadata.items() if name != "sha256"})


def test_card_and_manifest_fit_their_schemas_and_invalid_ones_do_not(validators, repository):
    from clipweld.exporter.store.repository import Repository

    store = Repository(repository, "clip")
    for version in (1, 2):
        card, manifest = (json.loads(json.dumps(said)) for said in (store.card(version), store.manifest(version)))
        validators["card"].validate(card)
        validators["manifest"].validate(manifest)
    for wrong in ({"version": 0}, {"embed_dim": 1.5}, {"tasks": [{"name": "digits"}]}, {"more": 1}):
        assert not validators["card"].is_valid(card | wrong), wrong
    for wrong in ({"model": "../clip"}, {"files": {"../x": {"sha256": "0" * 64, "bytes": 1}}}, {"unmerged": None}):
        assert not validators["manifest"].is_valid(manifest | wrong), wrong


@pytest.mark.slow
@pytest.mark.parametrize("fault", [None, "[dead](nowhere.md)", "[dead](tutorial.md#nowhere)"])
def test_the_site_builds_and_a_dead_link_fails_the_build(build, monkeypatch, fault):
    monkeypatch.setattr(build, "commands_page", lambda program: f"# {program}\n")
    staged = build.stage

    def stage(folder):
        staged(folder)
        if fault:
            with (folder / "docs/client.md").open("a") as page:
                page.write(f"\n{fault}\n")

    monkeypatch.setattr(build, "stage", stage)
    if fault:
        with pytest.raises(SystemExit):
            build.main()
        return
    build.main()
    pages = {path.relative_to(ROOT / "site").as_posix() for path in (ROOT / "site").rglob("*.html")}
    assert {"index.html", "RESULTS.html", "docs/tutorial.html", "docs/reference/python.html"} <= pages
    foreign = re.compile(r'<(?:script|img|link|iframe)[^>]*(?:src|href)="https?://[^"]*"')
    assert [page for page in pages if foreign.search((ROOT / "site" / page).read_text(encoding="utf-8"))] == []
