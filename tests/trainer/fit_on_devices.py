"""Run by test_devices.py: train a few steps on several processes, each of which writes its votes and losses."""

import json
import sys
from pathlib import Path

from lightning_fabric import Fabric

from clipweld.trainer.adapters.adapter import Adapter, save_adapter
from clipweld.trainer.base.backbone import load_backbone
from clipweld.trainer.config import train_config
from clipweld.trainer.learning.fit import fit
from clipweld.trainer.method import Router
from clipweld.trainer.tasks import load_task


def main(devices: int, batch_size: int, out: Path) -> None:
    """Train two tasks, so that every term of the loss is used."""
    fabric = Fabric(accelerator="cpu", devices=devices)
    fabric.launch()
    votes, losses = [], []
    vote = Router.vote

    def noted(self, probabilities):
        active = vote(self, probabilities)
        votes.append(active.tolist())
        return active

    Router.vote = noted
    base = load_backbone("mini")
    lineage: list[Adapter] = []
    for name in ("emoji", "flags"):
        config = train_config(
            "mini", iterations=6, shots=4, batch_size=batch_size, router="learned", ago="sum", consolidate=0.34, lr=1e-3
        )
        task = load_task(name)
        fitted = fit(
            task, base, lineage, config, test_on=[task], fabric=fabric, on_step=lambda s: losses.append(s.loss)
        )
        lineage.append(fitted.adapter)
    out.mkdir(parents=True, exist_ok=True)
    for adapter in lineage:
        save_adapter(adapter, out / f"rank-{fabric.global_rank}" / f"{adapter.task}.safetensors")
    (out / f"rank-{fabric.global_rank}.json").write_text(json.dumps({"votes": votes, "losses": losses}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
