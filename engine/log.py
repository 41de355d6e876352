"""Rank-tagged messages, the end of a program, and progress.

Rank 0 speaks plainly on stderr and writes everything to log.txt; other ranks speak only to warn, with their number.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from tqdm import tqdm

from engine.errors import CheckpointError, StillhouseError
from engine.redaction import redact
from engine.rendezvous import launched_rank

logger = logging.getLogger("stillhouse")

NOISY_LOGGERS = ("DeepSpeed", "transformers", "torch", "torch.distributed", "accelerate", "datasets", "httpx")
LIBRARIES = r"(deepspeed|torch|transformers|accelerate|datasets|multiprocessing)(\.|$)"
LEAD_SECONDS = 3.0
PLAIN_LINE_SECONDS = 5.0


def setup(rank: int, log_file: Path | None = None) -> None:
    """Send our messages to stderr and, on rank 0, to ``log_file`` as well. Call it again once the run folder is known.

    Raises CheckpointError when the file cannot be opened.
    """
    for handler in [handler for handler in logger.handlers if isinstance(handler, (_Console, _LogFile))]:
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    console = _Console(logging.INFO if rank == 0 else logging.WARNING)
    console.setFormatter(_PlainFormatter("" if rank == 0 else f"[rank {rank}] "))
    logger.addHandler(console)
    if log_file is not None and rank == 0:
        logger.addHandler(_file_handler(log_file))
    _quiet_libraries()


def _file_handler(log_file: Path) -> logging.Handler:
    try:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        handler = _LogFile(log_file, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot write {log_file}: {error.strerror}; make the run folder writable") from error
    handler.setFormatter(_FileFormatter("%(asctime)s %(levelname)-7s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    return handler


class _LogFile(logging.FileHandler):
    """log.txt, told apart from handlers that others may have put on our logger."""


class _Console(logging.Handler):
    """Writes to what stderr is now, above a progress bar if one is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


class _PlainFormatter(logging.Formatter):
    def __init__(self, prefix: str) -> None:
        super().__init__("%(message)s")
        self.prefix = prefix

    def format(self, record: logging.LogRecord) -> str:
        kind = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return self.prefix + kind + redact(super().format(record))


class _FileFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def _at_least_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING


def _quiet_libraries() -> None:
    """Libraries keep their warnings and errors. A filter outlasts the level that they set for themselves on import."""
    for name in NOISY_LOGGERS:
        noisy = logging.getLogger(name)
        noisy.removeFilter(_at_least_warning)
        noisy.addFilter(_at_least_warning)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "warning")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for category in (FutureWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category, module=LIBRARIES)


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run a program and exit: 0 or what ``main`` returns; for an error that the user can act on one message and 2, or 3
    for a lost rank, or 4 for a launch that another has replaced; 130 when interrupted; 1 and a traceback for a fault of
    ours.

    A rank that fails leaves at once, without the collective calls that would wait for ranks in another place: its
    launcher sees the exit code and ends the others.
    """
    if not logger.handlers:
        setup(launched_rank())
    try:
        code = main() or 0
    except StillhouseError as error:
        _hold_back()
        logger.error("%s", "\n".join([str(error), *getattr(error, "__notes__", ())]))
        code = error.exit_code
    except KeyboardInterrupt:
        if launched_rank() == 0:
            logger.info("interrupted")
        code = 130
    except Exception as error:
        _hold_back()
        logger.critical("unexpected %s", type(error).__name__, exc_info=True)
        code = 1
    _leave(code)


def _hold_back() -> None:
    """Let rank 0 report first. If it failed too, the launcher ends this rank meanwhile and the user reads it once."""
    if launched_rank() != 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(LEAD_SECONDS)


def _leave(code: int) -> NoReturn:
    if code != 0 and "torch.distributed" in sys.modules:  # its threads would not let go, or abort
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


class Progress:
    """A bar when stderr is a terminal, otherwise a plain line every few seconds.

    ``total`` is None when the end is not known; ``first_step`` is where a resumed run begins. ``fields`` of an update
    are shown in their order, as many as the terminal has room for.
    """

    def __init__(self, total: int | None, label: str, enabled: bool = True, first_step: int = 0) -> None:
        self.total, self.label, self.enabled, self.first_step = total, label, enabled, first_step
        self.step = first_step
        self._fields: Mapping[str, str] = {}
        self._started = time.monotonic()
        self._first_update: tuple[float, int] | None = None
        self._next_line = self._started
        self._printed_step = -1
        self._bar: tqdm | None = None
        if enabled and sys.stderr.isatty():
            # tqdm redraws and keeps messages above the bar; the delay spares an empty line before the first update
            self._bar = tqdm(bar_format="{desc}", initial=first_step, miniters=1, delay=1e-9, file=sys.stderr)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def update(self, step: int, fields: Mapping[str, str] | None = None) -> None:
        """``step`` steps are done. Fields given earlier stay until others come."""
        if not self.enabled:
            return
        self.step = step
        # what is left is judged from here on: neither the warm-up nor steps done before a resume count
        self._first_update = self._first_update or (time.monotonic(), step)
        self._fields = fields if fields is not None else self._fields
        if self._bar is not None:
            self._draw(self._bar, force=False)
        elif time.monotonic() >= self._next_line or step == self.total:
            self._print_line()

    def close(self) -> None:
        """Show the last state. Harmless when called again."""
        if self._bar is not None:
            self._draw(self._bar, force=True)
            self._bar.close()
        elif self.enabled and self.step not in (self._printed_step, self.first_step):
            self._print_line()
        self.enabled = False

    def _draw(self, bar: tqdm, force: bool) -> None:
        bar.ncols = _terminal_columns() - 1
        bar.set_description_str(self._line(bar.ncols), refresh=force)
        bar.update(self.step - bar.n)

    def _print_line(self) -> None:
        self._printed_step = self.step
        self._next_line = time.monotonic() + PLAIN_LINE_SECONDS
        print("  ".join(self._parts()), file=sys.stderr, flush=True)

    def _parts(self) -> list[str]:
        now = time.monotonic()
        since_seconds, since_step = self._first_update or (now, self.step)
        parts = [f"{self.label} {self.step:,}" + (f"/{self.total:,}" if self.total else "")]
        if self.total:
            parts.append(f"{100 * self.step // self.total}%")
        parts += [f"{name} {value}" for name, value in self._fields.items()]
        if self.total and since_step < self.step < self.total:
            seconds_a_step = (now - since_seconds) / (self.step - since_step)
            parts.append(f"eta {_clock_time(seconds_a_step * (self.total - self.step))}")
        else:
            parts.append(_clock_time(now - self._started))
        return parts

    def _line(self, width: int) -> str:
        """What fits into ``width`` characters: counts, bar and time first, then fields while there is room."""
        count, *rest = self._parts()
        fields, timing = rest[:-1], rest[-1]
        if self.total:
            percent, *fields = fields
            bar_width = 20 if width >= 80 else 10
            filled = min(bar_width, bar_width * self.step // self.total)
            bar = f"{count} [{'#' * filled}{'.' * (bar_width - filled)}] {percent}"
            count = bar if len(bar) + len(timing) + 2 <= width else f"{count}  {percent}"
        while fields and len("  ".join([count, *fields, timing])) > width:
            fields.pop()
        return "  ".join([count, *fields, timing])[:width]


def _terminal_columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def _clock_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
