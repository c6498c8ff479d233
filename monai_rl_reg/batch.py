"""Register many pairs: a folder a pair, one table; resumable, and shared among processes by ``torchrun``."""

from __future__ import annotations

import contextlib
import csv
import datetime
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from monai_rl_reg.data import read_pairs, read_table
from monai_rl_reg.errors import InputError, find_input_error
from monai_rl_reg.files import check_writable, drop_leftovers, file_stamp
from monai_rl_reg.registration import Registrar, keep_inputs
from monai_rl_reg.request import Options, Pair
from monai_rl_reg.tables import plain, write_table

logger = logging.getLogger(__name__)

COLUMNS = [
    "name",
    "status",
    "reason",
    "fixed",
    "moving",
    "similarity",
    "similarity_before",
    "similarity_after",
    "dice_before",
    "dice_after",
    "expected_dice",
    "seen_dice_after",
    "tre_before_mm",
    "tre_after_mm",
    "folded_percent",
    "sdlogj",
    "inverse_error_mm",
    "steps",
    "seconds",
    "warnings",
]
"""Of ``summary.csv``."""
EVERY = 10.0
"""Seconds between two writings of it."""
PART = ".summary.{}.csv"
"""The rows so far of the processes but the first, while they run."""


def read_jobs(path: str | Path) -> list[dict[str, str]]:
    """Read a CSV of pairs as :func:`~monai_rl_reg.data.read_pairs` does, with ``name`` and perhaps ``landmarks``.

    Pairs without a name are called by the number of their row, from ``0000`` on. Paths are relative to the file.

    Raises:
        InputError: besides that function's errors, if a name is there twice or cannot be that of a folder.
    """
    path = Path(path)
    jobs, rows = read_pairs(path), read_table(path)[1]
    seen: dict[str, int] = {}
    for number, (job, (line, row)) in enumerate(zip(jobs, rows, strict=True)):
        name = row.get("name") or f"{number:04d}"
        if name in (".", "..") or name != Path(name).name or name == "summary.csv" or name.startswith(".summary"):
            raise InputError(f"pairs {path}, line {line}: expected the name of a folder, found {name!r}")
        if name in seen:
            raise InputError(f"pairs {path}, line {line}: expected another name than in line {seen[name]}: {name}")
        seen[name] = line
        job["name"] = name
        if landmarks := row.get("landmarks"):
            job["landmarks"] = str(path.parent / landmarks)
    return jobs


def register_pairs(
    pairs: str | Path,
    output: str | Path,
    registrar: Registrar,
    options: Options,
    *,
    resume: bool = False,
    progress: bool = True,
    **save: bool,
) -> list[dict[str, Any]]:
    """Register the pairs of a CSV file: ``output/NAME`` has the files of each, ``output/summary.csv`` a row of each.

    A pair that fails is a row with its reason. The table grows with the pairs, every :data:`EVERY` seconds. Under
    ``torchrun`` every process takes its share, and the first one gathers the table. ``output`` then lies on a file
    system that all of them see.

    Args:
        pairs: see :func:`read_jobs`.
        output: the folder.
        registrar: the policy.
        options: how to register each pair.
        resume: skip pairs whose folder is complete and was made of the same files, by the same options and weights.
        progress: show a progress bar with the time left, of the first process's share.
        save: passed on to :meth:`~monai_rl_reg.registration.Registration.save`.

    Returns:
        the rows of ``summary.csv``, in every process.

    Raises:
        InputError: if the CSV file or the bundle is bad, or the folder cannot be written to.
    """
    jobs, output = read_jobs(pairs), Path(output)
    with _processes() as (rank, world):
        check_writable(output, f".writable.{rank}")
        shares: list[Any] = [None] * world
        rows: list[dict[str, Any]] = []
        if rank == 0:  # of an earlier run that was killed
            for job in jobs:
                drop_leftovers(output / job["name"])
        _drop_shares(output, rank, world)
        given = asdict(options) | {"initial": _named(options.initial)}
        made_by = {"options": given, "save": save, "weights": registrar.made_by()}
        for job in jobs:
            keep_inputs(output / job["name"], options.initial)
        if isinstance(options.initial, str | Path) and Path(options.initial).is_file():
            made_by["initial"] = file_stamp(options.initial)
        work = _work(jobs[rank::world], output, registrar, options, resume, save, made_by)
        written = time.monotonic()
        with tqdm(
            work, total=len(jobs[rank::world]), desc="pairs", unit="pair", disable=not progress or rank > 0
        ) as bar:
            try:
                for row in bar:
                    rows.append(row)
                    if row["status"] == "failed":
                        tqdm.write(f"failed: {row['name']}: {row['reason']}", file=sys.stderr)
                    if time.monotonic() - written >= EVERY:
                        _write_share(output, rows, jobs, rank)
                        written = time.monotonic()
            finally:
                _write_share(output, rows, jobs, rank)
        if world > 1:
            dist.all_gather_object(shares, rows)
            rows = [shares[i % world][i // world] for i in range(len(jobs))]
            if rank == 0:
                write_table(output / "summary.csv", rows, COLUMNS)
        _drop_shares(output, rank, world)
    return rows


def _work(
    jobs: Sequence[dict[str, str]],
    output: Path,
    registrar: Registrar,
    options: Options,
    resume: bool,
    save: dict[str, bool],
    made_by: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Register one pair after the other, while a thread reads the next one; yield the row of each."""
    known = made_by if resume else None
    with ThreadPoolExecutor(1) as reader:
        following: Future[tuple[Pair | None, dict[str, Any]]] | None = None
        for i, job in enumerate(jobs):
            current = following or reader.submit(_prepare, job, output, known)
            following = reader.submit(_prepare, jobs[i + 1], output, known) if i + 1 < len(jobs) else None
            if current.exception() is None and (pair := current.result()[0]) is not None:
                _check_bundle(registrar, pair.fixed.ndim - 1)
            pair = None  # while the next pair is registered, this one is not kept
            try:
                yield _row(job, "done", _registered(job, current, output, registrar, options, save, made_by))
            except Exception as error:
                yield _failure(job, error)


def _registered(
    job: dict[str, str],
    prepared: Future[tuple[Pair | None, dict[str, Any]]],
    output: Path,
    registrar: Registrar,
    options: Options,
    save: dict[str, bool],
    made_by: dict[str, Any],
) -> dict[str, Any]:
    """Register a pair that was read, unless it is complete, write its files, and return its quality figures."""
    pair, known = prepared.result()
    if pair is None:
        return known
    result = registrar.register(pair, options)
    result.quality["made_of"] = known | made_by
    result.save(output / job["name"], **save)
    return result.quality


def _prepare(job: dict[str, str], output: Path, made_by: dict[str, Any] | None) -> tuple[Pair | None, dict[str, Any]]:
    """Read a pair, and tell the files that it is made of, as they are before that.

    Of one that is complete already, where ``made_by`` says how it would be now, there are its quality figures alone.
    """
    keep_inputs(output / job["name"], *(path for role, path in job.items() if role != "name"))
    made_of = {role: file_stamp(path) for role, path in job.items() if role != "name"}
    path = output / job["name"] / "quality.json"
    if made_by is not None and path.is_file():
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):  # or what is no registration's
            quality: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            then, now = quality.get("made_of", {}), json.loads(json.dumps(plain(made_of | made_by), default=str))
            missing = [name for name in quality.get("files", []) if not (path.parent / name).is_file()]
            if then == now and not missing:
                return None, quality
            changed = missing + [key for key in {*then, *now} if then.get(key) != now.get(key)]
            logger.info("%s: registered again, changed since: %s", job["name"], ", ".join(sorted(changed)))
    return Pair.read(**{key: value for key, value in job.items() if key != "name"}), made_of


def _check_bundle(registrar: Registrar, spatial_dims: int) -> None:
    """A bundle that cannot be used ends it all; one that can, but not for this pair, is the pair's own failure."""
    if not any(registrar.serves(d) for d in (spatial_dims, 5 - spatial_dims)):
        registrar.bundle(spatial_dims)


def _named(initial: Any) -> Any:
    """An initial transform as JSON can hold it."""
    return initial.tolist() if isinstance(initial, torch.Tensor) else None if initial is None else str(initial)


def _failure(job: dict[str, str], error: Exception) -> dict[str, Any]:
    known = find_input_error(error)
    if known is None:  # a defect, or out of memory: the log tells more
        logger.error("%s", job["name"], exc_info=error)
    reason = str(known) if known is not None else f"{type(error).__name__}: {error}"
    return _row(job, "failed", {"reason": " ".join(reason.split())})


def _row(job: dict[str, str], status: str, quality: dict[str, Any]) -> dict[str, Any]:
    row = {column: quality.get(column) for column in COLUMNS}
    row |= {"name": job["name"], "status": status, "fixed": job["fixed"], "moving": job["moving"]}
    row |= {f"similarity_{when}": quality.get(f"{quality.get('similarity')}_{when}") for when in ("before", "after")}
    row["warnings"] = "; ".join(quality.get("warnings", []))
    return row


def _write_share(output: Path, rows: Sequence[dict[str, Any]], jobs: Sequence[dict[str, str]], rank: int) -> None:
    """Write the rows so far: the first process its own and those that the others have written, in the pairs' order."""
    if rank > 0:
        write_table(output / PART.format(rank), rows, COLUMNS)
        return
    known = {row["name"]: row for row in rows}
    for part in output.glob(PART.format("*")):
        with open(part, newline="", encoding="utf-8") as file:
            known |= {row["name"]: row for row in csv.DictReader(file)}
    write_table(output / "summary.csv", [known[job["name"]] for job in jobs if job["name"] in known], COLUMNS)


def _drop_shares(output: Path, rank: int, world: int) -> None:
    """Remove what the processes but the first have written so far; none goes on before it is gone."""
    if rank == 0:
        for part in output.glob(PART.format("*")):
            part.unlink()
    if world > 1:
        dist.barrier()


@contextlib.contextmanager
def _processes() -> Iterator[tuple[int, int]]:
    """Yield this process's rank and the number of processes, joined while this lasts."""
    world = int(os.environ.get("WORLD_SIZE", "1")) if dist.is_torchelastic_launched() else 1
    if world == 1:
        yield 0, 1
        return
    mine = not dist.is_initialized()
    if mine:  # gloo: only rows go between processes. The first to finish waits for the last, for days if need be
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))
    try:
        yield dist.get_rank(), world
    finally:
        if mine:
            dist.destroy_process_group()
