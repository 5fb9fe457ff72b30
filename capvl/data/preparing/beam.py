"""`capvl.data.preparing.corpus` on Apache Beam: the same parts, made by any of its runners.

Shards are written in parallel; the first record of each identity (key, perceptual hash, text)
is found by grouping; shards with later ones are thinned. Both steps may be repeated without
harm, as runners do.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, SetupOptions

from capvl.data.preparing import shards
from capvl.data.preparing.jobs import Plan, identities
from capvl.errors import UserError


def _write(job_and_source, plan: Plan):
    """One shard; yields (identity, (order of the shard, number of the record)) of its records."""
    order, job, source = job_and_source
    part = plan.part(job)
    shards.write_shard(source, part, plan.filters, plan.frames, plan.names)
    for number, row in enumerate(shards.read_rows(part)):
        for place, identity in enumerate(identities(job[0], row)):
            yield identity, (order, number, place)


def _all_but_first(identity_and_places):
    """(order of a shard, (number of the record, place of the reason, reason)) of later records of one identity."""
    identity, places = identity_and_places
    first, *later = sorted(places)
    for order, number, place in later:
        yield order, (number, place, f"duplicate {identity[1]}")


def _thin(order_and_dropped, plan: Plan):
    order, dropped = order_and_dropped
    reasons: dict[int, str] = {}
    for number, _, reason in sorted(dropped):
        reasons.setdefault(number, reason)
    shards.thin_shard(plan.part(list(plan.sources)[order]), reasons)


def run_on_beam(plan: Plan, options: list[str]) -> None:
    """Makes all parts of a plan in a Beam pipeline.

    Args:
      plan: what is to be made.
      options: Beam's, such as ["--runner=DataflowRunner", "--project=…"]; the direct runner by default.

    Raises:
      UserError: an option is unknown, or the pipeline failed.
    """
    jobs = [(order, job, source) for order, (job, source) in enumerate(plan.sources.items())]
    with _pipeline(options) as pipeline:
        (
            pipeline
            | "shards" >> beam.Create(jobs)
            | "spread" >> beam.Reshuffle()
            | "write" >> beam.FlatMap(_write, plan)
            | "by identity" >> beam.GroupByKey()
            | "later ones" >> beam.FlatMap(_all_but_first)
            | "by shard" >> beam.GroupByKey()
            | "thin" >> beam.Map(_thin, plan)
        )


def map_on_beam(call: Callable[[Any], None], jobs: Sequence[Any], options: list[str]) -> None:
    """Calls a function for each of some jobs in a Beam pipeline; it may be called again for the same.

    Args:
      call: of a module, so that workers find it.
      jobs: plain values.
      options: see `run_on_beam`.

    Raises:
      UserError: see `run_on_beam`.
    """
    with _pipeline(options) as pipeline:
        pipeline | "jobs" >> beam.Create(jobs) | "spread" >> beam.Reshuffle() | "make" >> beam.Map(call)


@contextlib.contextmanager
def _pipeline(options: list[str]) -> Iterator[beam.Pipeline]:
    """A pipeline that runs when the block is over, and fails in one sentence."""
    pipeline_options = PipelineOptions(options)
    unknown = set(PipelineOptions(options).get_all_options(retain_unknown_options=True)) - set(
        pipeline_options.get_all_options()
    )
    if unknown:
        raise UserError(f"Beam does not know the option --{sorted(unknown)[0]}.")
    pipeline_options.view_as(SetupOptions).save_main_session = False
    try:
        with beam.Pipeline(options=pipeline_options) as pipeline:
            yield pipeline
    except UserError:
        raise
    except Exception as e:  # Each runner has exceptions of its own, around those of the workers.
        lines = [line for line in str(e).splitlines() if "UserError: " in line]
        said = lines[-1].partition("UserError: ")[2] if lines else str(e).strip().splitlines()[0]
        raise UserError(f"The Beam pipeline failed: {said.split(' [while running')[0]}") from e
