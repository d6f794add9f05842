"""`make bench`: every comparison, one after the other. `python -m benchmarks [CASE ...] [--quick] [--table]`"""

import argparse
import importlib
from pathlib import Path

from benchmarks.pairs import Skipped
from benchmarks.results import RESULTS, environment, keep, table, write_table
from modicum.record import say, standard_output, warn

CASES = ("pretraining", "views", "fixmatch")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Speed beside the peers, in one table.")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; without any, all")
    parser.add_argument("--quick", action="store_true", help="seconds a case, to see that all still runs; the figures mean nothing")
    parser.add_argument("--table", action="store_true", help="measure nothing; write the kept results into benchmarks/README.md")
    parser.add_argument("--results", type=Path, help=f"the table to keep; by default {RESULTS.name} beside this file, none if --quick")
    asked = parser.parse_args(arguments)
    for case in asked.cases:
        if case not in CASES:
            parser.error(f"unknown case {case!r}: choose of {', '.join(CASES)}")
    results = asked.results or (None if asked.quick else RESULTS)
    if asked.table:
        write_table(results or RESULTS)
        return
    say(environment())
    output = standard_output()
    missed = 0
    for case in asked.cases or CASES:
        say(f"{case}: measuring")
        try:
            rows = list(importlib.import_module(f"benchmarks.{case}").run(asked.quick))
        except Skipped as reason:
            warn(f"{case} is skipped: {reason}")
            continue
        output.print(table(case, rows))
        if results:
            keep(results, case, rows)
        missed += sum(row.held is False for row in rows)
    if not asked.quick:
        output.print("Every bar is held." if not missed else f"{missed} bar{'' if missed == 1 else 's'} not held.")


if __name__ == "__main__":
    main()
