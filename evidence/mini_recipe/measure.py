"""Measure the zero-shot accuracy of given weights on the shipped tasks."""

import dataclasses
import io
import json
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, image_transform
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from safetensors.torch import load_file

from clipweld.trainer.base.backbone import MINI
from evidence import markdown

TASKS = MINI / "tasks"


@dataclasses.dataclass(frozen=True)
class Score:
    """Zero-shot accuracy on the test images of one task, in percent.

    Attributes:
        task: name of the task.
        classes, images: how many there are.
        accuracy: over all images.
        class_mean: mean over classes of the accuracy on each class.
    """

    task: str
    classes: int
    images: int
    accuracy: float
    class_mean: float


def load_model(weights: Path, model_cfg: Path = MINI / "mini.json") -> CLIP:
    """Load open_clip's CLIP with the weights, float32, in eval mode; missing or unexpected keys are an error.

    Args:
        weights: a safetensors file.
        model_cfg: open_clip's model configuration as JSON.
    """
    config = json.loads(model_cfg.read_text(encoding="utf-8"))
    model = CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])
    model.load_state_dict({name: value.float() for name, value in load_file(weights).items()})
    return model.eval()


def task_images(archive: Path, split: str = "") -> list[tuple[str, Image.Image]]:
    """Return class names and RGB images from a task's zip, of one split or of both, sorted by member name."""
    with zipfile.ZipFile(archive) as opened:
        members = sorted(name for name in opened.namelist() if name.startswith(split) and not name.endswith("/"))
        return [(name.split("/")[1], Image.open(io.BytesIO(opened.read(name))).convert("RGB")) for name in members]


@torch.inference_mode()
def class_embeddings(model: CLIP, class_names: list[str], templates: list[str]) -> torch.Tensor:
    """Return one embedding per class: float32, (classes, embed_dim).

    It is the mean of the normalised text features over all templates, normalised again.
    """
    tokenizer = SimpleTokenizer(context_length=model.context_length)
    rows = []
    for name in class_names:
        features = model.encode_text(tokenizer([template.format(name) for template in templates]), normalize=True)
        rows.append(F.normalize(features.mean(dim=0), dim=0))
    return torch.stack(rows)


@torch.inference_mode()
def zero_shot(model: CLIP, tasks: Path = TASKS, task_list: str = "mini") -> list[Score]:
    """Return the score on the test images of every task of a list.

    Args:
        tasks: folder of `tasks.json` and the zips.
        task_list: the list's name in `tasks.json`.
    """
    size = model.visual.image_size[0]
    preprocess = image_transform(size, is_train=False, mean=OPENAI_DATASET_MEAN, std=OPENAI_DATASET_STD)
    scores = []
    for name, entry in json.loads((tasks / "tasks.json").read_text(encoding="utf-8")).items():
        if entry["list"] != task_list:
            continue
        classes = class_embeddings(model, entry["class_names"], entry["templates"])
        labelled = task_images(tasks / f"{name}.zip", "test")
        labels = torch.tensor([entry["class_names"].index(label) for label, _ in labelled])
        images = torch.stack([preprocess(image) for _, image in labelled])
        features = torch.cat([model.encode_image(part, normalize=True) for part in images.split(256)])
        right = ((features @ classes.T).argmax(dim=1) == labels).float()
        by_class = torch.stack([right[labels == index].mean() for index in labels.unique()])
        accuracy, class_mean = 100 * right.mean().item(), 100 * by_class.mean().item()
        scores.append(Score(name, len(classes), len(labels), accuracy, class_mean))
    return scores


def table(scores: list[Score]) -> str:
    """Format the scores as a Markdown table, with the mean over tasks."""
    rows = [
        (one.task, one.classes, one.images, f"{one.accuracy:.1f}", f"{one.class_mean:.1f}", f"{100 / one.classes:.1f}")
        for one in scores
    ]
    accuracy = sum(one.accuracy for one in scores) / len(scores)
    class_mean = sum(one.class_mean for one in scores) / len(scores)
    rows.append(("mean of tasks", None, None, f"{accuracy:.1f}", f"{class_mean:.1f}", None))
    headings = ("task", "classes", "test images", "accuracy %", "mean over classes %", "chance %")
    return "\n".join(markdown.table(headings, rows, text=1))
