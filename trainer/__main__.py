"""``python -m trainer``: the command line, where the installed command is not at hand."""

from trainer.cli import main

if __name__ == "__main__":
    main()
