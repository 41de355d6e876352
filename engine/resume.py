"""Where a run goes on: whose folder it is, which checkpoint is the newest whole one, and loading it exactly."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from engine.checkpoint import CheckpointStore, newest, read_meta
from engine.errors import CheckpointError, StillhouseError
from engine.parts import Parts, Place
from engine.runfolder import check_owner, set_aside, write_start
from engine.state import TrainState, set_rng_state
from engine.zero import StudentEngine

log = logging.getLogger("stillhouse")


def open_run_folder(folder: Path, store: CheckpointStore, parts: Parts, place: Place, resume: str) -> Path | None:
    """Rank 0 decides what to resume from and prepares the folder; the others follow. Errors are everyone's."""
    found: Path | None = None
    problem: StillhouseError | None = None
    if place.control.is_main:
        try:
            found = _prepare_folder(folder, parts, resume)
        except StillhouseError as error:
            problem = error
        except Exception as error:  # a full disk comes through several libraries, each with a type of its own
            problem = CheckpointError(
                f"{folder}: cannot be written ({error}); free some space or give another run.output"
            )
    found, problem = place.control.from_main((found, problem))
    if problem is not None:
        raise problem
    store.remove_incomplete()
    return found


def _prepare_folder(folder: Path, parts: Parts, resume: str) -> Path | None:
    if resume == "never":
        if (old := set_aside(folder)) is not None:
            log.info("the run that was in %s is now in %s", folder, old)
        found = None
    elif resume == "auto":
        check_owner(folder, parts.run.config)
        has_one = any((folder / "checkpoints").glob("step_*/COMPLETE"))
        found = newest(folder / "checkpoints") if has_one else None
    else:
        check_owner(folder, parts.run.config)
        found = Path(resume)
        read_meta(found)
    facts = {"origins": list(parts.student.origins)} | ({"cache": parts.cache.facts()} if parts.cache else {})
    write_start(folder, parts.run.config, parts.run.deepspeed, facts)
    parts.student.model.config.save_pretrained(folder / "student")
    parts.tokenizer.save_pretrained(folder / "student")
    return found


def load_checkpoint(checkpoint: Path, engine: StudentEngine, parts: Parts, place: Place) -> tuple[TrainState, int]:
    """The state, and the number of damaged records that this rank has met. Collective.

    Raises CheckpointError when the checkpoint is of other data, another world size or another ZeRO stage.
    """
    meta = read_meta(checkpoint)
    if meta["world_size"] != place.ranks.world_size:
        raise CheckpointError(
            f"{checkpoint} was written by {meta['world_size']} ranks and this run has {place.ranks.world_size}; "
            f"start it with {meta['world_size']} ranks"
        )
    if meta["data"] != parts.data_identity:
        raise CheckpointError(
            f"{checkpoint} was trained on other data ({meta['data']}) than this run has ({parts.data_identity})"
        )
    if meta["zero_stage"] != engine.zero_stage:
        raise CheckpointError(
            f"{checkpoint} was written under ZeRO stage {meta['zero_stage']}, this run uses {engine.zero_stage}; "
            "use the DeepSpeed JSON it was started with"
        )
    engine.load(checkpoint)
    try:
        own = torch.load(checkpoint / "state" / f"rank_{place.ranks.rank:05d}.pt", weights_only=True)
    except (OSError, RuntimeError, EOFError) as problem:
        raise CheckpointError(f"{checkpoint}: this rank's state cannot be read ({problem})") from problem
    set_rng_state(own["rng"])
    state = TrainState.from_dict(meta["state"])
    state.num_resumes += 1
    log.info("resuming %s after step %d", checkpoint, state.step)
    return state, own["num_bad_samples"]
