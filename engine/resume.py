"""Where a run goes on: whose folder it is, which checkpoint is the newest whole one, and loading it exactly."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from engine.checkpoint import CheckpointStore, complete_checkpoints, read_meta
from engine.digests import Digests
from engine.errors import CheckpointError, StillhouseError
from engine.incarnation import Incarnation, last_number
from engine.parts import Parts, Place
from engine.runfolder import check_owner, set_aside, write_start
from engine.state import TrainState, fresh_rng_state, set_rng_state
from engine.zero import TAG, UNIVERSAL, StudentEngine, convert

log = logging.getLogger("stillhouse")


def open_run_folder(folder: Path, store: CheckpointStore, parts: Parts, place: Place, resume: str) -> Path | None:
    """Rank 0 decides what to resume from and prepares the folder; the others follow. Errors are everyone's.

    From then on every earlier launch of this run is replaced.
    """
    found: Path | None = None
    number = 0
    problem: StillhouseError | None = None
    if place.control.is_main:
        try:
            found, number = _prepare_folder(folder, parts, resume)
        except StillhouseError as error:
            problem = error
        except Exception as error:  # a full disk comes through several libraries, each with a type of its own
            problem = CheckpointError(
                f"{folder}: cannot be written ({error}); free some space or give another run.output"
            )
    found, number, problem = place.control.from_main((found, number, problem))
    if problem is not None:
        raise problem
    store.incarnation = Incarnation(folder, number)
    store.remove_incomplete()
    return found


def _prepare_folder(folder: Path, parts: Parts, resume: str) -> tuple[Path | None, int]:
    number = last_number(folder)
    if resume == "never":
        if (old := set_aside(folder)) is not None:
            log.info("the run that was in %s is now in %s", folder, old)
    else:
        check_owner(folder, parts.run.config)
    given = None if resume in ("auto", "never") else Path(resume)
    if given is not None:
        read_meta(given)
    incarnation = Incarnation.take(folder, after=number)
    whole = complete_checkpoints(folder / "checkpoints")  # after that: nobody else completes one any more
    found = given or (whole[-1] if whole else None)
    facts = {"origins": list(parts.student.origins)} | ({"cache": parts.cache.facts()} if parts.cache else {})
    write_start(folder, parts.run.config, parts.run.deepspeed, facts)
    parts.student.model.config.save_pretrained(folder / "student")
    parts.tokenizer.save_pretrained(folder / "student")
    return found, incarnation.number


def load_checkpoint(checkpoint: Path, engine: StudentEngine, parts: Parts, place: Place) -> tuple[TrainState, int]:
    """The state, and the number of damaged records that this rank has met. Collective.

    Under another number of ranks than wrote it, ZeRO's parts are converted first, and what was one rank's is made anew:
    its generators from seed, rank and step; the damaged records count for rank 0.
    Raises CheckpointError, on all ranks, when the checkpoint is of other data, another ZeRO stage or another precision,
    or has a file that is not the one that was written.
    """
    meta = read_meta(checkpoint)
    if meta["data"] != parts.data_identity:
        raise CheckpointError(
            f"{checkpoint} was trained on other data ({meta['data']}) than this run has ({parts.data_identity})"
        )
    if meta["zero_stage"] != engine.zero_stage:
        raise CheckpointError(
            f"{checkpoint} was written under ZeRO stage {meta['zero_stage']}, this run uses {engine.zero_stage}; "
            "use the DeepSpeed JSON it was started with"
        )
    if meta["precision"] != parts.run.precision:
        raise CheckpointError(
            f"{checkpoint} was trained in {meta['precision']}, this run uses {parts.run.precision}; "
            f"set run.precision: {meta['precision']}"
        )
    digests = Digests(checkpoint, meta.get("sha256"))
    if "sha256" not in meta:
        log.warning("%s is of an older Stillhouse, without hashes: its files cannot be checked", checkpoint)
    state = TrainState.from_dict(meta["state"])
    state.num_resumes += 1
    if meta["world_size"] == place.ranks.world_size:
        num_bad = _load_same_ranks(checkpoint, engine, place, digests)
        log.info("resuming %s after step %d", checkpoint, state.step)
        return state, num_bad
    _load_other_ranks(checkpoint, engine, place, digests)
    set_rng_state(fresh_rng_state(parts.run.config.run.seed, place.ranks.rank, state.step))
    log.info(
        "resuming %s after step %d, on %d ranks after %d",
        checkpoint,
        state.step,
        place.ranks.world_size,
        meta["world_size"],
    )
    return state, state.num_bad_samples if place.control.is_main else 0


def _load_same_ranks(checkpoint: Path, engine: StudentEngine, place: Place, digests: Digests) -> int:
    own = checkpoint / "state" / f"rank_{place.ranks.rank:05d}.pt"
    _check_together(checkpoint, place, lambda: digests.check_all([own, *engine.files(checkpoint)]))
    engine.load(checkpoint, digests)
    try:
        state = torch.load(own, weights_only=True)
    except (OSError, RuntimeError, EOFError) as problem:
        raise CheckpointError(f"{checkpoint}: this rank's state cannot be read ({problem})") from problem
    set_rng_state(state["rng"])
    return state["num_bad_samples"]


def _load_other_ranks(checkpoint: Path, engine: StudentEngine, place: Place, digests: Digests) -> None:
    if engine.zero_stage == 0:  # every rank has all of the state, and reads the same file
        _check_together(checkpoint, place, lambda: digests.check_all(engine.files(checkpoint)))
        engine.load(checkpoint, digests)
        return

    def convert_alone() -> None:
        if not (checkpoint / UNIVERSAL).is_dir():
            log.info("%s: converting it for %d ranks, once", checkpoint, place.ranks.world_size)
            digests.check_all(sorted((checkpoint / TAG).glob("*.pt")))
            convert(checkpoint)

    _main_works_alone(checkpoint, place, convert_alone)
    _check_together(checkpoint, place, lambda: _see_universal(checkpoint))
    engine.load_universal(checkpoint, lambda work: _check_together(checkpoint, place, work))


def _see_universal(checkpoint: Path) -> None:
    if not (checkpoint / UNIVERSAL / "zero" / "optimizer_state.pt").is_file():
        raise CheckpointError(
            f"{checkpoint / UNIVERSAL}: not whole where this rank looks; let all hosts see one run folder, or remove "
            "it, so that it is made again"
        )


def _main_works_alone(checkpoint: Path, place: Place, work: Callable[[], None]) -> None:
    """Rank 0 does ``work`` while the others wait; its error is everyone's."""
    problem = _problem_of(checkpoint, work) if place.control.is_main else None
    problem = place.control.from_main(problem)
    if problem is not None:
        raise CheckpointError(problem)


def _check_together(checkpoint: Path, place: Place, work: Callable[[], None]) -> None:
    """Each rank does ``work``; an error of one is everyone's, before any goes into a collective call alone."""
    problems = sorted({text for text in place.control.gather(_problem_of(checkpoint, work)) if text})
    if problems:
        raise CheckpointError("\n".join(problems[:8]))


def _problem_of(checkpoint: Path, work: Callable[[], None]) -> str | None:
    try:
        work()
    except Exception as problem:  # whatever it is, the other ranks are waiting
        kind = "" if isinstance(problem, CheckpointError) else f"{checkpoint}: {type(problem).__name__}: "
        older = [path for path in complete_checkpoints(checkpoint.parent) if path.name < checkpoint.name]
        rest = f"the one before it is complete: --resume {older[-1]}" if older else "there is no older one"
        return f"{kind}{problem}; {rest}"
    return None
