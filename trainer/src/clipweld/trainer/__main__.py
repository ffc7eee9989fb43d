"""Run the command line as ``python -m clipweld.trainer``, for systems where ``trainer`` is not on PATH."""

from clipweld.trainer.cli import main

if __name__ == "__main__":
    main()
