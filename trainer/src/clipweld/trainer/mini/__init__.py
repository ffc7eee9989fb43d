"""The small CLIP and its nine small tasks, which ship with the package; ``evidence.mini_recipe`` rebuilds them."""

from pathlib import Path

FOLDER = Path(__file__).parent
