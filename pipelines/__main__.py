"""`python -m pipelines CONFIG` in a checkout: the same as `modicum run CONFIG`."""

from modicum.cli import stage_main

if __name__ == "__main__":
    stage_main("run")
