"""Write one CLIP in every format that a contender of `evidence.benchmarks.compare` reads."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import open_clip
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from clipweld.exporter.release.checkpoints import save_open_clip, save_transformers
from clipweld.exporter.release.publish import release
from clipweld.exporter.store.repository import Repository
from clipweld.trainer.base.backbone import load_backbone
from clipweld.trainer.tasks import load_task, sample
from evidence.benchmarks.contenders import Bundle

LABELS_OF = "fashion"  # ten class names
TEMPLATE = "a photo of a {}"
LOGIT_SCALE = 100.0  # as in every published CLIP; random weights start at 14, which gives all labels almost equal odds
# What open_clip and transformers call the first and the last token of a text.
START, END = ("<start_of_text>", "<|startoftext|>"), ("<end_of_text>", "<|endoftext|>")


def write_bundle(model_name: str, pretrained: str | None, num_images: int, folder: Path) -> Bundle:
    """Export a model to open_clip, transformers and a Triton repository, and add real images.

    Args:
        model_name, pretrained: as in ``clipweld.trainer.base.backbone.load_backbone``.
        num_images: number of images, taken from the test sets of the shipped tasks in turn.
        folder: where everything is written.
    """
    backbone = load_backbone(model_name, pretrained)
    if pretrained == "random":
        backbone.model.logit_scale.fill_(math.log(LOGIT_SCALE))
    images, prompts = sample(num_images)
    files = []
    for number, image in enumerate(images):
        files.append(str(folder / f"{number}.png"))
        image.convert("RGB").save(files[-1])
    name = save_open_clip(backbone, [], folder / "open_clip.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(open_clip.get_model_config(name)), encoding="utf-8")
    save_transformers(backbone, [], folder / "transformers")
    write_tokenizer(folder / "transformers", backbone.context_length)
    release(backbone, [], Repository(folder / "model_repository", "clip"), images[:8], prompts)
    bundle = Bundle(
        model=name,
        labels=load_task(LABELS_OF).class_names,
        template=TEMPLATE,
        images=tuple(files),
        image_size=backbone.image_size,
        logit_scale=backbone.model.logit_scale.exp().item(),
    )
    bundle.save(folder)
    return bundle


def write_tokenizer(folder: Path, context_length: int) -> None:
    """Write CLIP's tokenizer in the files that transformers reads, with open_clip's own vocabulary."""
    known = open_clip.tokenizer.SimpleTokenizer()
    renamed = dict((START, END))
    vocab = {renamed.get(token, token): index for token, index in known.encoder.items()}
    (start, end), merges = (vocab[theirs] for _, theirs in (START, END)), list(known.bpe_ranks)
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=END[1], end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    word = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(word), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.post_processor = processors.RobertaProcessing((END[1], end), (START[1], start), False, False)
    tokenizer.add_special_tokens([START[1], END[1]])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": START[1], "eos_token": END[1], "unk_token": END[1], "pad_token": END[1]}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2), encoding="utf-8")
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_bundle(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
