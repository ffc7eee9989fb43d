"""``python -m clipweld.trainer``: the command line, where the installed command is not at hand."""

from clipweld.trainer.cli import main

if __name__ == "__main__":
    main()
