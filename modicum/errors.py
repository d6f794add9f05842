"""The exceptions that end a run on purpose, each with its exit status. Everything else is a bug and shows its traceback."""


class InputError(ValueError):
    """What the user gave cannot be used. The message is one clear sentence that names the file, row or key."""

    exit_status = 2


class Interrupted(Exception):
    """Ctrl-C: the state is saved and the same command goes on from there."""

    exit_status = 130


class ProcessLost(RuntimeError):
    """The system took a process of a run away. The same command goes on from the last saved state."""

    exit_status = 1


class Preempted(Interrupted):
    """SIGTERM, as a scheduler sends it: the state is saved and the same command goes on from there."""

    exit_status = 75
