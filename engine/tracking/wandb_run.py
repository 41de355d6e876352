"""Weights & Biases, at arm's length: all of it happens in a thread of its own, so that nothing there stops training."""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import shlex
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.config.following import TrackingSection
from engine.log import logger
from engine.redaction import redact_words

RUN_ID = "wandb_id"
QUEUE_RECORDS = 1000
START_SECONDS, CLOSE_SECONDS = 60.0, 30.0


class WandbRun:
    """One wandb run, the same one after a resume: its id is kept in the run folder.

    Where it cannot be reached at the start, the run is kept offline; where it goes away later, wandb keeps what it
    could not send; the log then has the command that sends it. What fails is told once. Records that find the queue
    full (an outage) are dropped from wandb and counted; metrics.jsonl has them all.
    """

    def __init__(self, run_folder: Path, config: TrackingSection, run_name: str, resolved: Mapping[str, Any]) -> None:
        self._settings: dict[str, Any] = {
            "project": config.wandb_project,
            "entity": config.wandb_entity,
            "group": config.wandb_group,
            "name": run_name,
            "id": _run_id(run_folder),
            "resume": "allow",
            "config": dict(resolved),
            "dir": str(run_folder),
        }
        self._mode = config.wandb
        self._queue: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(QUEUE_RECORDS)
        self._num_dropped = 0
        self._warned = False
        self._exit_code = 0
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        try:
            self._queue.put_nowait((step, dict(metrics)))
        except queue.Full:
            self._num_dropped += 1

    def close(self, status: str) -> None:
        """Wait for wandb, but at most CLOSE_SECONDS."""
        self._exit_code = 1 if status == "failed" else 0
        deadline = time.monotonic() + CLOSE_SECONDS
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=CLOSE_SECONDS)
            self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._warned = True
            logger.warning("wandb did not finish in %.0f s and is left behind; metrics.jsonl is whole", CLOSE_SECONDS)
        if self._num_dropped:
            logger.warning("wandb missed %d records; metrics.jsonl has them", self._num_dropped)

    def _work(self) -> None:
        run = None
        try:
            run = self._start()
        except BaseException as error:  # wandb also raises errors that are no Exception
            self._warn("start", error)
        while (item := self._queue.get()) is not None:
            if run is None:
                continue
            step, metrics = item
            try:
                run.log({"step": step, **metrics})
            except BaseException as error:
                self._warn("log", error, run)
        if run is not None:
            try:
                run.finish(exit_code=self._exit_code)
            except BaseException as error:
                self._warn("finish", error, run)

    def _start(self) -> Any:
        """The run online, as asked for, or else offline: its files are there to be sent when the network is."""
        import wandb

        why = None
        if self._mode == "online":
            try:
                if wandb.login(prompt=False):
                    return self._open(wandb, "online")
                why = "there is no key: set WANDB_API_KEY, or run `wandb login`"
            except BaseException as error:
                why = f"{type(error).__name__}: {error}"
                wandb.teardown()  # the run that did not begin would keep its id to itself
        run = self._open(wandb, "offline")
        if why is not None:
            logger.warning(
                "wandb: online was asked for, but %s; training goes on and the run is kept offline. Afterwards: %s",
                why,
                _sync_command(run),
            )
        return run

    def _open(self, wandb: Any, mode: str) -> Any:
        known = getattr(wandb.Settings, "model_fields", {})
        settings = wandb.Settings(
            console="off",
            silent=True,
            init_timeout=START_SECONDS,
            x_disable_meta=redact_words(sys.argv) != sys.argv,  # it would keep the command as it is
            finish_timeout=0.8 * CLOSE_SECONDS,
            **({"finish_timeout_raises": True} if "finish_timeout_raises" in known else {}),
        )
        run = wandb.init(**self._settings, mode=mode, settings=settings)
        # an axis of our own: wandb refuses a step that it has seen, and a resumed run makes some of them again
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        if mode == "online":
            logger.info("wandb: %s", run.url)
        return run

    def _warn(self, action: str, error: BaseException, run: Any = None) -> None:
        if not self._warned:
            logger.warning(
                "wandb could not %s (%s: %s); training goes on, metrics.jsonl is whole%s",
                action,
                type(error).__name__,
                error,
                f". What it did not get is kept; afterwards: {_sync_command(run)}" if run is not None else "",
            )
        self._warned = True


def _sync_command(run: Any) -> str:
    return f"wandb sync {shlex.quote(os.path.abspath(run.settings.sync_dir))}"


def _run_id(run_folder: Path) -> str:
    path = run_folder / RUN_ID
    if path.exists() and (kept := path.read_text(encoding="utf-8").strip()):
        return kept
    fresh = secrets.token_hex(4)
    temporary = path.with_name(RUN_ID + ".tmp")
    temporary.write_text(fresh + "\n", encoding="utf-8")
    temporary.replace(path)
    return fresh
