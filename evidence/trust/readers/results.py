"""The reader of unfinished result files of the client."""

from __future__ import annotations

import random
from typing import Any, ClassVar

from clipweld.client._results_file import ResultsFile
from evidence.trust.mutations import corrupted_bytes, corrupted_json, json_text
from evidence.trust.readers.reader import OtherMeaning, Reader


class Results(Reader):
    """The files that an interrupted ``client classify --out`` leaves."""

    QUESTION: ClassVar = {"labels": ["cat", "dog"], "top_k": 2}

    def spoil(self, draw: random.Random) -> int:
        for path in self.folder.iterdir():
            path.unlink()
        rows: list[Any] = [{"clipweld results": 1, "question": self.QUESTION}]
        for number in range(3):
            predictions = [{"label": label, "probability": 0.5, "score": 0.1} for label in ("cat", "dog")]
            rows.append({"image": f"{number}.png", "version": 2, "predictions": predictions})
        rows.append({"image": "4.png", "error": "4.png is not an image"})
        place = draw.randrange(len(rows))
        texts = [json_text(row, random.Random(0)).replace("\n", " ") for row in rows]
        texts[place] = json_text(corrupted_json(rows[place], draw), draw)
        content = "".join(f"{text}\n" for text in texts).encode("utf-8", "surrogatepass")
        content = corrupted_bytes(content, draw) if draw.random() < 0.4 else content
        self._out = self.folder / f"out{draw.choice(('.csv', '.jsonl', '.parquet'))}"
        self._out.with_name(f"{self._out.name}.part").write_bytes(content)
        return len(content)

    def read(self) -> None:
        with ResultsFile(self._out, self.QUESTION) as results:
            results.finish()
        if not self._out.is_file():
            raise OtherMeaning("nothing was written")
