"""Reading untrusted JSON stays within its memory limit."""

from __future__ import annotations

import json
from dataclasses import make_dataclass

import pytest

from clipweld.exporter.store.schemas import Accuracy
from clipweld.trainer.schemas import MAX_BYTES, MAX_NAMES, MAX_VALUES, Items, Json, Setting, Texts, one_line, read_json
from evidence.trust.files import EXTRA_BYTES, _limits

SMALL = ("1", '""', "[]", "{}", "[1]", "[[]]", '{"":1}', '"n":[1]')


def holding(kind):
    return make_dataclass("Holding", [("value", kind)])


def test_as_many_class_names_as_imagenet_21k_has_are_read():
    names = [f"number {n}, of ImageNet-21k, and so on" for n in range(21_841)]
    assert read_json(holding(Texts), json.dumps({"value": names})).value == tuple(names)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b" " * (MAX_BYTES + 1), f"JSON of {MAX_BYTES + 1:,} bytes, at most {MAX_BYTES:,} are read"),
        ("[" + "1," * MAX_VALUES + "1]", f"JSON of {MAX_VALUES + 1:,} values, at most {MAX_VALUES:,} are read"),
        ("{" * MAX_VALUES + '{"', f"JSON of {MAX_VALUES + 1:,} values, at most {MAX_VALUES:,} are read"),
        (b"[" * 50_000, "recursion limit exceeded"),
        (
            json.dumps([{"a": dict.fromkeys(map(str, range(MAX_NAMES + 1)))}]),
            f"an object of {MAX_NAMES + 1:,} names, at",
        ),
    ],
)
def test_oversized_json_is_refused_before_it_is_parsed(text, reason):
    with pytest.raises(ValueError, match=reason):
        read_json(Json, text)


@pytest.mark.parametrize("kind", [Json | list, Texts, Items[Accuracy], dict[str, Items[float]], dict[str, Setting]])
@pytest.mark.parametrize("small", SMALL)
def test_many_small_values_are_read_or_refused_in_little_memory(kind, small):
    inside = ",".join(small.replace("n", str(n)) for n in range(MAX_VALUES // 2 - 2))
    text = ('{"value":' + (f"{{{inside}}}" if small.startswith('"n"') else f"[{inside}]") + "}").encode()
    with _limits(len(text)) as grew:
        try:
            read_json(holding(kind), text)
        except ValueError as exc:
            assert len(str(exc)) < 400  # noqa: PT017
    assert grew[0] < 2 * len(text) + EXTRA_BYTES


def test_untrusted_text_is_shortened_to_one_line():
    assert one_line("a\n\x1b[2Jb" + "c" * 400) == "a ?[2Jb" + "c" * 293 + " ..."
