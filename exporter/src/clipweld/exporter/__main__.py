"""``python -m clipweld.exporter``."""

from clipweld.exporter.cli import main

main()
