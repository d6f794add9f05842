"""The whole chain in one folder: pretrain, finetune, evaluate. A finished chain is told at once, without heavy imports."""

from modicum.record import say
from modicum.session import Request, dry_run, run_stages, show_results


def run(request: Request, *, force: bool = False, again: str | None = None, dry: bool = False) -> None:
    """Runs the stages that are not done (from `again` on: all), then prints the table; `dry` only says what would be done.

    Raises InputError, Interrupted and Preempted.
    """
    if dry:
        for line in dry_run(request, request.stages, force=force, again=again):
            print(line)
        return
    if not run_stages(request, request.stages, force=force, again=again):
        say(f"All done in {request.folder}: {', '.join(request.stages)}.")
    show_results(request.folder)
