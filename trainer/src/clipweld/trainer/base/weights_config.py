"""``open_clip_config.json``, which open_clip saves beside weights, with their architecture and preprocessing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import open_clip
from pydantic import ConfigDict, Field, TypeAdapter

from clipweld.trainer.errors import WeightsError
from clipweld.trainer.schemas import Json, one_line, read_json_file

NAME = "open_clip_config.json"
# Fields of a tower's configuration that the shapes of its tensors don't show.
UNSEEN = ("heads", "head_width", "pool_type", "no_causal_mask", "act_kwargs", "norm_kwargs")

Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Size = Annotated[int, Field(gt=0)]


@dataclass(frozen=True, kw_only=True)
class _Preprocess:
    """The fields of ``preprocess_cfg`` that are used. Fields left out are those of OpenAI's weights."""

    __pydantic_config__: ClassVar[Any] = ConfigDict(extra="ignore")

    size: Size | tuple[Size, Size] | None = None
    mode: Literal["RGB"] | None = None
    mean: Number | tuple[Number, Number, Number] | None = None
    std: Positive | tuple[Positive, Positive, Positive] | None = None
    interpolation: Literal["bicubic", "bilinear"] | None = None
    resize_mode: Literal["shortest", "longest", "squash"] | None = None
    fill_color: Annotated[int, Field(ge=0, le=255)] | None = None


@dataclass(frozen=True)
class WeightsConfig:
    """The configuration found beside a file of weights.

    Attributes:
        model_cfg: open_clip's configuration of the trained model; None if it is not given.
        preprocess: the given fields of open_clip's ``PreprocessCfg``; None if there are none.
    """

    model_cfg: dict | None = None
    preprocess: dict | None = None


def read_config(file: Path) -> WeightsConfig:
    """Read the configuration beside a file of weights; empty where there is none.

    Raises:
        WeightsError: it can't be read, or has nothing that open_clip writes.
    """
    beside = file.with_name(NAME)
    if not beside.exists() and not beside.is_symlink():
        return WeightsConfig()
    try:
        said = read_json_file(Json, beside)
        if not said.keys() & {"model_cfg", "preprocess_cfg"}:
            raise ValueError("neither model_cfg nor preprocess_cfg in it")
        model_cfg, preprocess = said.get("model_cfg"), said.get("preprocess_cfg")
        if model_cfg is not None:
            _check_objects(model_cfg, *(model_cfg.get(tower, {}) for tower in ("vision_cfg", "text_cfg")))
        if preprocess is not None:
            _check_objects(preprocess)
            found = asdict(TypeAdapter(_Preprocess).validate_python(preprocess))
            preprocess = {name: value for name, value in found.items() if value is not None}
            preprocess |= {name: (v,) * 3 for name in ("mean", "std") if isinstance(v := preprocess.get(name), float)}
    except (OSError, ValueError, AttributeError) as exc:
        raise WeightsError(
            f"weights {file}: {NAME} beside them can't be read ({one_line(str(exc))}); restore or remove it"
        ) from exc
    return WeightsConfig(model_cfg, preprocess)


def _check_objects(*values: object) -> None:
    if not all(isinstance(value, dict) for value in values):
        raise ValueError("a part of it is no object")


def check_config(config: WeightsConfig, model_name: str, file: Path, from_openai: bool) -> None:
    """Refuse weights that are known to be trained in another architecture than the model's.

    Differences that the shapes of tensors don't show, such as GELU for QuickGELU or another number of heads, raise no
    error in torch, but make the features worse.

    Raises:
        WeightsError: names the difference.
    """
    if config.model_cfg is None and not from_openai:
        return
    trained_quick = True if config.model_cfg is None else bool(config.model_cfg.get("quick_gelu", False))
    quick = configured_quick_gelu(model_name)
    if quick != trained_quick:
        other = f"{model_name}-quickgelu" if trained_quick else model_name.removesuffix("-quickgelu")
        step = f"give --model {other}" if other in open_clip.list_models() else "give another model"
        trained, has = ("QuickGELU", "GELU") if trained_quick else ("GELU", "QuickGELU")
        raise WeightsError(f"weights {file} were trained with {trained}, model {model_name} has {has}; {step}")
    if config.model_cfg is None:
        return
    ours = open_clip.get_model_config(model_name)
    defaults = {"vision_cfg": asdict(open_clip.CLIPVisionCfg()), "text_cfg": asdict(open_clip.CLIPTextCfg())}
    for tower, default in defaults.items():
        said = config.model_cfg.get(tower, {})
        for name in UNSEEN:
            has = ours[tower].get(name, default.get(name))
            theirs = said.get(name, default.get(name) if "width" in said else has)  # the configuration may be partial
            if theirs != has:
                raise WeightsError(
                    f"weights {file} were trained with {tower}.{name} {one_line(repr(theirs))}, model {model_name} has "
                    f"{has!r}; give another model"
                )


def configured_quick_gelu(model_name: str) -> bool:
    """Whether open_clip builds this model with QuickGELU, OpenAI's approximation of GELU."""
    return bool((open_clip.get_model_config(model_name) or {}).get("quick_gelu", False))


def preprocess_for(config: WeightsConfig, image_size: int, model_name: str, file: Path) -> dict:
    """Return the fields of ``PreprocessCfg`` that are given beside weights, without the image size.

    Raises:
        WeightsError: they are for images of another size than the model's.
    """
    said = {name: value for name, value in (config.preprocess or {}).items() if name != "size"}
    size = (config.preprocess or {}).get("size", image_size)
    if size not in (image_size, (image_size, image_size)):
        raise WeightsError(
            f"weights {file}: {NAME} beside them is for images of {size} pixels, model {model_name} takes "
            f"{image_size}; give the model of that size"
        )
    return said
