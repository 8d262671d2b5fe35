"""The studies, the queue and the database as metrics for Prometheus, under /metrics."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import get_args

from prometheus_client import CollectorRegistry, Metric, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from werkzeug.wrappers import Response

from tuner.dashboard.web import Request, Routes, Site
from tuner.search.record import versions
from tuner.search.status import State, StudyStatus

routes = Routes()


@routes.add("GET", "/metrics")
def metrics(request: Request) -> Response:
    registry = CollectorRegistry()
    registry.register(_Everything(request.site))
    ProcessCollector(registry=registry)
    encode, kind = choose_encoder(request.headers.get("Accept", ""))
    return Response(encode(registry), content_type=kind)


class _Everything(Collector):
    """What a scrape reads; the studies as the pages have read them a moment ago."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def describe(self) -> Iterable[Metric]:
        return ()  # else the registry would read everything to learn the names

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily("tuner", "Version.", {"version": versions().get("tuner", "")})
        yield from _of_the_database(self._site)
        if self._site.slots is not None:
            slots = self._site.slots()
            yield GaugeMetricFamily("tuner_slots", "Trainings that the workers run at once.", slots)
        states = self._site.catalogue.states()
        yield from _of_all(states)
        yield from _of_each(states)


def _of_the_database(site: Site) -> Iterator[Metric]:
    began = time.perf_counter()
    queued = len(site.storage.queue.study_ids())
    took = time.perf_counter() - began
    yield GaugeMetricFamily("tuner_queue_length", "Studies in the queue.", queued)
    yield GaugeMetricFamily(
        "tuner_database_latency_seconds", "Time of one query, as a request waits for it.", took
    )


def _of_all(states: Iterable[StudyStatus]) -> Iterator[Metric]:
    counts = Counter(one.state for one in states)
    by_state = GaugeMetricFamily("tuner_studies", "Studies by state.", labels=["state"])
    for state in get_args(State):
        by_state.add_metric([state], counts[state])
    yield by_state
    given_up = sum(one.error is not None for one in states)
    yield GaugeMetricFamily("tuner_studies_given_up", "Studies that the service gave up.", given_up)


def _of_each(states: Iterable[StudyStatus]) -> Iterator[Metric]:
    trials = GaugeMetricFamily(
        "tuner_trials", "Trials of a study by state.", labels=["study", "state"]
    )
    budget = GaugeMetricFamily(
        "tuner_trials_budget", "Finished trials after which a study ends.", labels=["study"]
    )
    epochs = CounterMetricFamily("tuner_epochs", "Epochs that were trained.", labels=["study"])
    saved = GaugeMetricFamily(
        "tuner_epochs_saved", "Epochs that pruning left untrained.", labels=["study"]
    )
    workers = GaugeMetricFamily("tuner_workers", "Workers of a running study.", labels=["study"])
    best = GaugeMetricFamily(
        "tuner_best_validation_loss", "The lowest of fully trained trials, nats.", labels=["study"]
    )
    for one in states:
        for state, count in one.counts.items():
            trials.add_metric([one.study, state.lower()], count)
        budget.add_metric([one.study], one.budget)
        epochs.add_metric([one.study], one.epochs_spent)
        saved.add_metric([one.study], one.epochs_saved)
        workers.add_metric([one.study], one.workers)
        if one.best is not None and one.best.value is not None:
            best.add_metric([one.study], one.best.value)
    yield from (trials, budget, epochs, saved, workers, best)
