"""Ray Data under the units: spreads them over this machine or a cluster and hands back their facts.

Only names of units travel out and only facts travel back; rows and pictures go from disk to worker
to disk.  So memory does not grow with the number of pictures, and the death of a worker, a node or
of everything loses what was being made and nothing else.  Easy to get wrong: an error of the user's
making (a full disk, an endpoint that refuses) must not be tried again by Ray nor come back as its
traceback, so it is caught in the worker and sent back as one sentence.
"""

import json
import logging
import os
import socket
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from eve_vlm.curate.recipe import WorkerSection
from eve_vlm.curate.tasks import NO_EXTRA
from eve_vlm.curate.units import Order, Range, make_unit
from eve_vlm.errors import first_line

ANSWER = 10.0  # seconds in which a cluster takes a connection
OBJECT_STORE = 100 * 2**20  # bytes; facts are all that it holds


class Done(NamedTuple):
    """A unit that is finished, or failed."""

    unit: str
    """Its name."""
    facts: dict[str, Any]
    """What is known of it; empty if it failed."""
    error: str | None
    """What went wrong, in a sentence."""


@contextmanager
def ray_session(address: str | None, cores: int | None) -> Iterator[None]:
    """Ray for the time of a run: that of `address`, one that runs here already, or an own one.

    Raises:
        ValueError: if Ray is not installed, or the address is not one of a cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    try:
        import ray
        import ray.data
    except ImportError:
        raise ValueError(NO_EXTRA) from None
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # ours say more
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address is None:
            ray.init(
                address="local",
                num_cpus=cores,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE,
                _node_ip_address="127.0.0.1",
                **quiet,
            )
        else:
            _check_answers(address)
            ray.init(address=address, **quiet)
    except OSError as error:  # Ray's ConnectionError is one too
        raise ValueError(
            f"There is no Ray cluster at {address} ({error}); start one with `ray start --head` "
            "and give its address, or leave out --address to run here."
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Whether anybody listens at HOST:PORT; Ray asks for two minutes and more before it says no.

    Raises:
        OSError: if nobody does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=ANSWER).close()


class _Maker:
    """A worker that makes many units and keeps its model between them."""

    def __init__(self, order: Order, todo: Sequence[tuple[str, tuple[Range, ...]]]):
        self.order, self.todo = order, todo

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return _make(batch, order=self.order, todo=self.todo)


def made_units(
    order: Order,
    todo: Sequence[tuple[str, tuple[Range, ...]]],
    *,
    worker: WorkerSection,
) -> Generator[Done, None, None]:
    """Makes units on whatever Ray has, and gives each as soon as it is finished, in any order.

    Ray keeps the processes of tasks for the next ones, so a model that a step keeps in its process
    is loaded once.  It does not where tasks take a GPU, so there workers are actors.
    """
    import ray.data
    import ray.exceptions
    from ray.data import ActorPoolStrategy, TaskPoolStrategy

    _check_room(order.step, worker)
    # One unit in each block of Ray's, or its facts would wait for those of others.
    numbers = ray.data.range(len(todo), override_num_blocks=len(todo))
    takes: dict[str, Any] = {"num_cpus": worker.cpus, "batch_size": 1}
    if worker.gpus:
        takes["num_gpus"] = worker.gpus
        most = min(worker.most or _fitting(worker), len(todo))
        made = numbers.map_batches(
            _Maker,
            fn_constructor_kwargs={"order": order, "todo": todo},
            compute=ActorPoolStrategy(min_size=1, max_size=max(most, 1)),
            **takes,
        )
    else:
        function = partial(_make, order=order, todo=todo)
        made = numbers.map_batches(function, compute=TaskPoolStrategy(size=worker.most), **takes)
    try:
        for row in made.iter_rows():
            yield Done(row["unit"], json.loads(row["facts"]), row["error"] or None)
    except ray.exceptions.RayError as error:
        raise ValueError(
            f"Workers of {order.step} died again and again ({first_line(error)}); look for memory "
            "that is too small, give them fewer pictures (block) or more room (workers), and run "
            "the same command again."
        ) from error


def _check_room(step: str, worker: WorkerSection) -> None:
    """Checks that a node can take a worker at all; Ray would wait for one for ever.

    Raises:
        ValueError: if none can.
    """
    import ray

    for name, key, wanted in (("cpus", "CPU", worker.cpus), ("gpus", "GPU", worker.gpus)):
        most = max(node["Resources"].get(key, 0.0) for node in ray.nodes() if node["Alive"])
        if wanted > most:
            raise ValueError(
                f"A worker of {step} takes {wanted:g} {name}, but the largest node has {most:g}; "
                f"change workers.{step}.{name}, or run where there are more."
            )


def _fitting(worker: WorkerSection) -> int:
    """How many workers the cluster has room for now."""
    import ray

    there = ray.cluster_resources()
    room = [there.get("CPU", 1.0) / worker.cpus] if worker.cpus else []
    room += [there.get("GPU", 0.0) / worker.gpus] if worker.gpus else []
    return max(int(min(room)), 1) if room else 1


def _make(
    batch: dict[str, Any], *, order: Order, todo: Sequence[tuple[str, tuple[Range, ...]]]
) -> dict[str, Any]:
    units, facts, errors = [], [], []
    for number in batch["id"].tolist():
        unit, ranges = todo[number]
        units.append(unit)
        try:
            facts.append(json.dumps(make_unit(order, unit, ranges)))
            errors.append("")
        except (ValueError, OSError) as error:
            facts.append("{}")
            errors.append(str(error))
    return {"unit": units, "facts": facts, "error": errors}


__all__ = ["Done", "made_units", "ray_session"]
