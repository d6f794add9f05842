"""What a run prints on the console, kept as plain text beside its results."""

import io
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from rich.console import Console, ConsoleRenderable, NewLine, RenderHook
from rich.control import Control

from modicum import __version__, record

WIDTH = 140
BAR_SIGNS = (Control, NewLine)  # a refresh, the end


class ConsoleLog(RenderHook):
    """Copies what `record.say` and its siblings print, without progress bars, into the file that `writing_to` names.

    What is printed before the first file is named goes there too. `quiet` keeps everything but progress bars off the console,
    and those only until they are full.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._pending = io.StringIO()
        self._copy = self._plain(self._pending)

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Called by rich for every print, before a progress bar adds itself; a bar itself prints nothing but BAR_SIGNS."""
        printed = [renderable for renderable in renderables if not isinstance(renderable, BAR_SIGNS)]
        for renderable in printed:
            self._copy.print(renderable)
        return [renderable for renderable in renderables if isinstance(renderable, BAR_SIGNS)] if self.quiet else renderables

    @contextmanager
    def copying(self) -> Iterator[None]:
        record.console.push_render_hook(self)
        record.keep_bars = not self.quiet
        try:
            yield
        finally:
            record.keep_bars = True
            record.console.pop_render_hook()

    @contextmanager
    def writing_to(self, path: Path) -> Iterator[None]:
        """Appends to `path` until the block ends, and the error that ends it."""
        with path.open("a", encoding="utf-8") as file:
            file.write(f"--- {datetime.now().astimezone():%Y-%m-%d %H:%M:%S%z} modicum {__version__}\n{self._pending.getvalue()}")
            self._copy = self._plain(file)
            try:
                yield
            except BaseException as error:
                expected = hasattr(error, "exit_status") or isinstance(error, KeyboardInterrupt)
                file.write(f"{type(error).__name__}: {error}\n" if expected else "".join(traceback.format_exception(error)))
                raise
            finally:
                self._pending = io.StringIO()
                self._copy = self._plain(self._pending)

    @staticmethod
    def _plain(file: io.TextIOBase) -> Console:
        return Console(file=file, width=WIDTH, no_color=True, force_terminal=False, highlight=False, soft_wrap=True)  # type: ignore[arg-type]
