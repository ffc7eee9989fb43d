"""Client and trainer fill templates by the same rule, and tasks learned earlier keep their prompts."""

import json
from pathlib import Path

import open_clip
from hypothesis import given
from hypothesis import strategies as st

from clipweld import trainer
from clipweld.client._labels import DEFAULT_TEMPLATES, Wording
from clipweld.client._labels import prompt_of as in_client
from clipweld.trainer.text import prompt_of as in_trainer

WORDS = st.lists(
    st.sampled_from(
        ("a", "A", "an", "the", "The", "seven", "apple", "photo", "-", "'", "a-", "{}", " ", "  ", "\t", ".")
    ),
    min_size=1,
    max_size=6,
)


@given(WORDS, WORDS, WORDS)
def test_client_and_trainer_make_the_same_prompts(before, label, after):
    template = f"{''.join(before)}{{}}{' '.join(after)}"
    assert in_client(template, " ".join(label)) == in_trainer(template, " ".join(label))
    template = f"{' '.join(before)} {{}}{' '.join(after)}"
    assert in_client(template, "".join(label)) == in_trainer(template, "".join(label))


def test_prompts_of_shipped_tasks_and_imagenet_are_plain_substitutions():
    tasks = json.loads((Path(trainer.__file__).parent / "mini/tasks/tasks.json").read_text(encoding="utf-8"))
    asked = [(task["class_names"], task["templates"]) for task in tasks.values()]
    for names, templates in (*asked, (open_clip.IMAGENET_CLASSNAMES, DEFAULT_TEMPLATES)):
        plain = [[template.replace("{}", name) for template in templates] for name in names]
        assert [[in_trainer(template, name) for template in templates] for name in names] == plain
        assert Wording(tuple(names), tuple(templates)).prompts() == plain
