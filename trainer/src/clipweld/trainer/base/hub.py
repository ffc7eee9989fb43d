"""A quick check whether the default weights can be downloaded; the download itself would retry for a minute.

It doesn't import torch, so that a forgotten ``--model`` is reported at once.
"""

from __future__ import annotations

import http.client
import threading
import urllib.error
import urllib.request

from huggingface_hub import constants, try_to_load_from_cache

from clipweld.trainer.base.model_choice import DEFAULT_MODEL
from clipweld.trainer.errors import WeightsError

# Where open_clip downloads the default model's weights from.
REPOSITORY = "timm/vit_base_patch16_clip_224.openai"
FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
LOOK_S = 6.0


def check_default_weights(model_name: str, pretrained: str | None) -> None:
    """Check that the default weights are cached or can be downloaded. Other weights are not checked.

    Raises:
        WeightsError: the default weights are not cached, and the hub can't be reached.
    """
    if model_name != DEFAULT_MODEL or pretrained not in (None, "openai"):
        return
    if any(isinstance(try_to_load_from_cache(REPOSITORY, file), str) for file in FILES):
        return
    if reason := _unreachable(constants.ENDPOINT):
        raise WeightsError(
            f"weights of {model_name}, the default model: not on this machine, and {constants.ENDPOINT} can't be asked "
            f"for them ({reason}); give --model mini, the small CLIP that ships, or --pretrained FILE"
        )


def _unreachable(address: str) -> str | None:
    """Return why an address doesn't answer, or None if it does. The environment's proxies are used."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    found = [f"no answer within {LOOK_S:g} s"]

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=LOOK_S).close()
            found.clear()
        except urllib.error.HTTPError:
            found.clear()
        except (OSError, ValueError, http.client.HTTPException) as exc:
            found[:] = [str(getattr(exc, "reason", exc))]

    look = threading.Thread(target=ask, daemon=True)  # DNS lookups have no timeout of their own
    look.start()
    look.join(LOOK_S)
    return next(iter(found), None)
