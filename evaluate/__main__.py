"""`python -m evaluate CONFIG` in a checkout: the same as `modicum evaluate CONFIG`.

Not by way of run.py, which imports torch before it is known whether there is work.
"""

from modicum.cli import stage_main

if __name__ == "__main__":
    stage_main("evaluate")
