"""The study of release costs, at its smallest."""

from __future__ import annotations

import json

import pytest

from evidence.studies import release


@pytest.mark.slow
def test_the_cost_of_releases_is_measured(tmp_path, capsys):
    release.main(model="mini", pretrained="random", tasks=2, experts=1, out=tmp_path / "release.json")
    figures = json.loads((tmp_path / "release.json").read_text())
    assert figures["same_bytes"]
    assert len(figures["merges"]) == 3
    assert all(row["seconds"] > row["of_which_release"] > 0 for row in figures["merges"].values())
    assert all(row["peak_bytes"] > 2e8 for row in figures["merges"].values())
    assert "the same bytes" in capsys.readouterr().out
