"""Coverage-guided fuzzing of adapters and manifests with atheris; ``evidence.trust.files`` starts it.

Run: python -m evidence.trust.guided COUNTS -runs=N (and further flags of libFuzzer)
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=[
        "clipweld.trainer.adapters.adapter",
        "clipweld.trainer.schemas",
        "clipweld.trainer.text",
        "clipweld.trainer.tensors",
    ]
):
    from clipweld.trainer.adapters.adapter import load_adapter, save_adapter
with atheris.instrument_imports(
    include=[
        "clipweld.exporter.store.repository",
        "clipweld.exporter.store.schemas",
        "clipweld.exporter.store.manifest",
    ]
):
    from evidence.trust.readers import REFUSALS, Manifests, tiny_adapter

from evidence.trust.mutations import sealed_file

EVERY = 500


def main() -> None:
    """Feed bytes to the readers: as an adapter file, as metadata with a fitting hash, and as a manifest.

    An error that is not one of ``REFUSALS`` ends the run.
    """
    counts, outcomes = Path(sys.argv.pop(1)), Counter()
    folder = Path(tempfile.mkdtemp(prefix="clipweld-guided-"))
    whole, store, file = tiny_adapter(), Manifests(folder / "store"), folder / "a.safetensors"
    save_adapter(whole, file)
    corpus = folder / "corpus"
    corpus.mkdir()
    (corpus / "file").write_bytes(b"\0" + file.read_bytes())
    (corpus / "manifest").write_bytes(b"\1" + store.repository.manifest_file(1).read_bytes())
    runs = next(int(flag.partition("=")[2]) for flag in sys.argv if flag.startswith("-runs="))

    (corpus / "metadata").write_bytes(b"\2" + json.dumps(whole.metadata()).encode())
    tensors = {name: tensor.numpy() for name, tensor in whole.tensors.items()}

    def sealed(text: bytes) -> bytes:
        """Return an adapter file with this metadata and a fitting hash if the text is JSON, else the text itself."""
        try:
            return sealed_file(json.loads(text), tensors, random.Random(0))
        except (ValueError, RecursionError):
            return text

    def one(data: bytes) -> None:
        try:
            if data[:1] == b"\1":
                store.repository.manifest_file(1).write_bytes(data[1:])
                store.read()
            else:
                file.write_bytes(sealed(data[1:]) if data[:1] == b"\2" else data[1:])
                load_adapter(file)
            outcomes["accepted"] += 1
        except REFUSALS as exc:
            outcomes[type(exc).__name__] += 1
        if outcomes.total() % EVERY == 0 or outcomes.total() >= runs:
            counts.write_text("".join(f"{name} {count}\n" for name, count in outcomes.items()), encoding="utf-8")

    atheris.Setup([*sys.argv, str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
