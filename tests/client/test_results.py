import dataclasses
import json

import pytest

from clipweld.client import Classification, Prediction

ANSWER = Classification("a.png", (Prediction("cat", 0.975, 0.31), Prediction("dog", 0.025, 0.27)), version=2)


def test_str_shows_labels_with_their_probabilities():
    assert str(ANSWER) == "cat 97.5%, dog 2.5%"


def test_to_dict_is_json():
    assert json.loads(json.dumps(ANSWER.to_dict())) == {
        "image": "a.png",
        "version": 2,
        "predictions": [
            {"label": "cat", "probability": 0.975, "score": 0.31},
            {"label": "dog", "probability": 0.025, "score": 0.27},
        ],
    }


def test_best_is_the_first_and_iteration_follows_the_order():
    assert ANSWER.best.label == "cat"
    assert [found.label for found in ANSWER] == ["cat", "dog"]


def test_results_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ANSWER.version = 3
