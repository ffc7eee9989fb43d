"""``python -m clipweld.trainer``: the command line, where the command is not on PATH."""

from clipweld.trainer.cli import main

if __name__ == "__main__":
    main()
