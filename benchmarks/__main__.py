"""`make bench`: every comparison, one after the other. `python -m benchmarks [CASE ...] [--quick]`"""

import argparse
from pathlib import Path

from benchmarks.pairs import Skipped, rows_of
from benchmarks.results import RESULTS, environment, keep, table, write_table
from modicum.record import say, standard_output, warn

CASES = ("pretraining", "views", "fixmatch", "neighbours", "probe", "large_images")
LONG = ("end_to_end",)  # only where they are named


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Speed beside the peers, in one table.")
    parser.add_argument("words", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; without any, all of these; or {', '.join(LONG)}")
    parser.add_argument("--quick", action="store_true", help="seconds a case, to see that all still runs; the figures mean nothing")
    parser.add_argument(
        "--results",
        type=Path,
        help=f"the table to keep, none if --quick; by default {RESULTS.name} beside this file, from which both READMEs follow",
    )
    asked = parser.parse_args(arguments)
    overrides = [word for word in asked.words if "=" in word]
    cases = [word for word in asked.words if "=" not in word]
    for case in cases:
        if case not in (*CASES, *LONG):
            parser.error(f"unknown case {case!r}: choose of {', '.join((*CASES, *LONG))}")
    if overrides and cases != ["end_to_end"]:
        parser.error(f"{overrides[0]} is a setting of the run that end_to_end measures: name that case alone, or leave the setting out")
    results = asked.results or (None if asked.quick else RESULTS)
    place = environment()  # now: results that are kept change the checkout
    say(place)
    output = standard_output()
    missed, skipped = 0, 0
    for case in cases or CASES:
        say(f"{case}: measuring")
        try:
            rows = rows_of(case, asked.quick, overrides)
        except Skipped as reason:
            warn(f"{case} is skipped: {reason}")
            skipped += 1
            continue
        output.print(table(case, rows))
        if results:
            keep(results, case, rows, place)
        if results == RESULTS:
            write_table()
        missed += sum(row.held is False for row in rows)
    if not asked.quick:
        output.print(f"Bars not held: {missed}. Cases skipped: {skipped}.")


if __name__ == "__main__":
    main()
