"""Check a task's prompts as a model reads them: for classes that it can't tell apart, and prompts that it cuts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from clipweld.trainer.errors import TaskInvalid
from clipweld.trainer.schemas import one_line
from clipweld.trainer.tasks.task import Task
from clipweld.trainer.text import prompt_of

if TYPE_CHECKING:
    from torch import Tensor

Tokenizer = Callable[..., "Tensor"]


def check_prompts(task: Task, tokenizer: Tokenizer) -> list[str]:
    """Return warnings about how a model reads the task's prompts, one line each.

    Args:
        tokenizer: open_clip's: list of str -> int64 tensor (batch, context_length).

    Raises:
        TaskInvalid: two classes are the same tokens in every template; names both. For class names that were published
            with a benchmark, this is only a warning.
    """
    prompts = [[prompt_of(template, name) for name in task.class_names] for template in task.templates]
    read = [as_read(tokenizer, own) for own in prompts]
    cut = [prompt for own in prompts for prompt in cut_prompts(tokenizer, own)]
    lines = []
    for first, second in _alike(task.class_names, zip(*read, strict=True)):
        why = "differ only where prompts are cut" if cut else "differ in case, spacing or spelling that it doesn't see"
        fault = f"classes {first!r} and {second!r} are the same tokens to the model: they {why}"
        if not task.published:
            raise TaskInvalid(f"task {task.name!r} ({one_line(task.source)}): {fault}; rename one, or merge them")
        lines.append(fault)
    lines += [
        f"templates {first!r} and {second!r} are the same tokens to the model"
        for first, second in _alike(task.templates, map(tuple, read))
    ]
    if cut:
        length = tokenizer(cut[:1]).shape[1]
        lines.append(
            f"{len(cut):,} of {len(task.class_names) * len(task.templates):,} prompts are longer than the {length} "
            f"tokens that the model reads, and are cut, such as {one_line(cut[0])!r}"
        )
    return lines


def as_read(tokenizer: Tokenizer, texts: Sequence[str]) -> list[bytes]:
    """Return each text's tokens as bytes, which can be compared and hashed."""
    return [row.tobytes() for row in tokenizer(list(texts)).numpy()]


def cut_prompts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    """Return the texts that have more tokens than the tokenizer keeps."""
    tokens = tokenizer(list(texts))
    longer = tokenizer(list(texts), context_length=tokens.shape[1] + 1)
    cut = (longer[:, :-1] != tokens).any(dim=1).tolist()
    return [text for text, is_cut in zip(texts, cut, strict=True) if is_cut]


def _alike(names: Sequence[str], read: Iterable[Sequence[bytes]]) -> list[tuple[str, str]]:
    """Return pairs of names that the model reads the same."""
    by_reading = defaultdict(list)
    for name, reading in zip(names, read, strict=True):
        by_reading[reading].append(name)
    return [(own[0], other) for own in by_reading.values() for other in own[1:]]
