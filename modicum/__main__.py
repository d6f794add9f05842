"""`python -m modicum`: the command line from a bare checkout."""

from modicum.cli import main

if __name__ == "__main__":
    main()
