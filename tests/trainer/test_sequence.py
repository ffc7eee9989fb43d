import json

import pytest

from trainer.adapter import load_lineage
from trainer.config import train_config
from trainer.errors import ConfigError
from trainer.sequence import average, forgetting, last, run_sequence, transfer
from trainer.tasks import load_task

# Three tasks, worked out by hand: rows after learning 1, 2, 3.
MATRIX = [[80.0, 30.0, 10.0], [70.0, 90.0, 20.0], [75.0, 60.0, 50.0]]


def test_metrics_on_a_matrix_worked_out_by_hand():
    assert transfer(MATRIX) == (30 + (10 + 20) / 2) / 2
    assert average(MATRIX) == round((75 + 60 + 80 / 3) / 3, 2)
    assert last(MATRIX) == round((75 + 60 + 50) / 3, 2)
    assert forgetting(MATRIX) == ((80 - 75) + (90 - 60)) / 2


def test_one_task_defines_no_transfer_and_no_forgetting():
    assert transfer([[80.0]]) is None
    assert forgetting([[80.0]]) is None
    assert average([[80.0]]) == last([[80.0]]) == 80.0


@pytest.fixture(scope="module")
def run(mini, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    config = train_config("mini", iterations=3, shots=2, batch_size=8)
    tasks = [load_task("emoji"), load_task("clipart")]
    return out, run_sequence(tasks, mini, config, out, watch=[load_task("flags")])["task"]


def test_sequence_tests_all_tasks_after_each(run):
    _, result = run
    assert result.tested == ["emoji", "clipart", "flags"]
    assert [len(row) for row in result.matrix] == [3, 3]
    assert len(result.zero_shot) == 3
    assert result.last == round(sum(result.matrix[1][:2]) / 2, 2)


def test_sequence_leaves_a_lineage_and_a_record(run, mini):
    out, result = run
    assert [a.task for a in load_lineage(out / "adapters", mini.fingerprint)] == ["emoji", "clipart"]
    assert json.loads((out / "sequence.json").read_text())["results"]["task"]["matrix"] == result.matrix


def test_sequence_does_not_mix_with_adapters_of_another_run(run, mini):
    with pytest.raises(ConfigError, match="holds a run already"):
        run_sequence([load_task("emoji")], mini, train_config("mini"), run[0])


def test_sequence_names_a_task_that_stands_twice(mini, tmp_path):
    with pytest.raises(ConfigError, match="emoji emoji"):
        run_sequence([load_task("emoji"), load_task("emoji")], mini, train_config("mini"), tmp_path)
