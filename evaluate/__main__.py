"""`python -m evaluate CONFIG` in a checkout: the same as `modicum evaluate CONFIG`."""

from modicum.evaluate.run import main

if __name__ == "__main__":
    main()
