"""The stream benchmark at its smallest."""

import json

import pytest

from evidence.benchmarks import stream


@pytest.mark.slow
def test_the_client_is_timed_against_onnx_runtime(tmp_path, capsys):
    stream.main(model="mini", pretrained="random", images=20, batch_size=[8], rounds=1, out=tmp_path / "stream.json")
    rows = json.loads((tmp_path / "stream.json").read_text())["rows"]
    assert list(rows) == ["client", "ONNX Runtime, batches of 8"]
    assert all(row["images_per_s"] > 0 for row in rows.values())
    assert rows["client"]["client_share"] == 1
    assert "the client does" in capsys.readouterr().out
