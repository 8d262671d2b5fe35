"""The service over fake workers: shares, the queue, and what ends a study's driving."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import optuna
import pytest
import sqlalchemy as sa
from fakes import IDENTITY, FakeWorkers, Notes, fake_train, make_study, ready_sqlite, small_spec
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState
from waiting import wait_until

from tuner.artifacts import development_path
from tuner.coordination.coordinator import Coordinator
from tuner.coordination.service import Service
from tuner.coordination.shares import FairShares, max_min_shares
from tuner.coordination.webhook import Notifier
from tuner.errors import ClusterError
from tuner.search.attributes import ERROR_KEY, RECORD_KEY, RESUMED_KEY
from tuner.search.confirmation import confirmed
from tuner.search.status import StudyStatus, status
from tuner.search.study import create_or_resume, delete, load
from tuner.search.tuned_study import FINISHED, TunedStudy
from tuner.storage.holder import LeaseHolder
from tuner.storage.queue import Queue
from tuner.storage.storage import Storage
from tuner.train import TrainingJob

ROWS = b"the development rows"
_EPOCHS = 3
SHA256 = hashlib.sha256(ROWS).hexdigest()


# --- shares ---


@given(st.integers(0, 50), st.lists(st.integers(0, 30), max_size=8))
def test_shares_are_max_min_fair(slots: int, wishes: list[int]) -> None:
    shares = max_min_shares(slots, wishes)
    assert sum(shares) == min(slots, sum(wishes))
    for share, wish in zip(shares, wishes, strict=True):
        assert 0 <= share <= wish
        if share < wish:  # who wants more has, but for the remainder, no less than anybody
            assert max(shares) <= share + 1


def test_who_wants_little_leaves_the_rest_and_the_first_get_the_remainder() -> None:
    assert max_min_shares(8, [1, 100, 100]) == [1, 4, 3]
    assert max_min_shares(3, [2, 100, 100]) == [1, 1, 1]
    assert max_min_shares(2, [5, 5, 5]) == [1, 1, 0]
    assert max_min_shares(0, [5]) == [0]
    assert max_min_shares(9, []) == []


# --- shares of studies ---


@dataclass
class Sketch:
    """A study as a share sees it, driven by hand as the coordinator does it."""

    shares: FairShares
    cluster: FakeWorkers
    budget: int
    running: int = 0
    finished: int = 0
    woken: int = 0

    def __post_init__(self) -> None:
        self.share = self.shares.join(self.cluster)
        self.share.used_by(self)

    def unfinished(self) -> int:
        return self.budget - self.finished

    def wake(self) -> None:
        self.woken += 1

    def look(self) -> int:
        """Starts what it may; returns how many run."""
        while self.running < self.share.slots():
            self.running += 1
        return self.running

    def end(self, trials: int = 1) -> None:
        self.running -= trials
        self.finished += trials


def settle(*studies: Sketch) -> None:
    """Lets every study look until nobody finds anything: they wake each other."""
    before = None
    while before != (
        before := [study.running for study in studies] + [sum(study.woken for study in studies)]
    ):
        for study in studies:
            study.look()


def test_one_study_has_all_slots_and_a_second_gets_its_half_as_trials_end() -> None:
    shares, cluster = FairShares(), FakeWorkers(4)
    first = Sketch(shares, cluster, 100)
    assert first.look() == 4
    second = Sketch(shares, cluster, 100)
    assert second.look() == 0  # nothing is taken away
    for expected in (1, 2):
        first.end()
        assert first.look() == 4 - expected
        assert second.woken == expected  # a slot is free: no heartbeat is waited for
        assert second.look() == expected
    first.end()
    assert first.look() == 2


def test_a_study_near_its_end_leaves_its_rest_to_the_others() -> None:
    shares, cluster = FairShares(), FakeWorkers(4)
    short, long = Sketch(shares, cluster, 1), Sketch(shares, cluster, 100)
    assert (short.look(), long.look()) == (1, 3)
    short.end()
    assert short.look() == 0
    assert long.look() == 4


class Clock:
    """Time as a test lets it pass."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_a_coordinator_leaves_the_slots_that_its_last_trials_do_not_need(tmp_path: Path) -> None:
    may_end = threading.Event()

    def train(job: TrainingJob):
        yield from fake_train(job)
        if job.trial == 0:
            may_end.wait(60)

    shares, cluster = FairShares(), FakeWorkers(4, train)
    tuned = make_study(tmp_path, small_spec(trials=4, hyperband=None))
    share = shares.join(cluster)
    coordinator = Coordinator(tuned, share, Notes())
    share.used_by(coordinator)
    run = threading.Thread(target=coordinator.run)
    run.start()
    wait_until(lambda: len(tuned.trials(TrialState.COMPLETE)) == 3)
    other = Sketch(shares, cluster, 100)
    wait_until(lambda: other.look() == 3)
    may_end.set()
    run.join(60)
    tuned.storage.close()


def test_with_one_slot_studies_take_turns_trial_by_trial() -> None:
    clock = Clock()
    shares, cluster = FairShares(clock), FakeWorkers(1)
    studies = [Sketch(shares, cluster, 3) for _ in range(3)]
    order = []
    for _ in range(9):
        settle(*studies)
        (at_work,) = [study for study in studies if study.running]
        assert at_work.running == 1
        order.append(studies.index(at_work))
        clock.seconds += 10
        at_work.end()
    assert order == [0, 1, 2] * 3


def test_on_one_slot_short_trials_get_as_much_time_as_long_ones() -> None:
    clock = Clock()
    shares, cluster = FairShares(clock), FakeWorkers(1)
    long, short = Sketch(shares, cluster, 1000), Sketch(shares, cluster, 1000)
    for _ in range(60):
        settle(long, short)
        clock.seconds += 50 if long.running else 10
        (long if long.running else short).end()
    assert long.finished == 10
    assert short.finished == 50


def test_who_comes_later_does_not_catch_up() -> None:
    clock = Clock()
    shares, cluster = FairShares(clock), FakeWorkers(1)
    first = Sketch(shares, cluster, 1000)
    for _ in range(10):
        first.look()
        clock.seconds += 10
        first.end()
    first.look()
    second = Sketch(shares, cluster, 1000)
    for _ in range(10):
        clock.seconds += 10
        (first if first.running else second).end()
        settle(first, second)
    assert (first.finished, second.finished) == (15, 5)


def test_a_remainder_goes_round() -> None:
    clock = Clock()
    shares, cluster = FairShares(clock), FakeWorkers(3)
    studies = [Sketch(shares, cluster, 1000) for _ in range(2)]
    had = [0, 0]
    for _ in range(60):
        settle(*studies)
        assert sum(study.running for study in studies) == 3
        clock.seconds += 10
        for index, study in enumerate(studies):
            had[index] += study.running
            if study.running:
                study.end()
    assert abs(had[0] - had[1]) <= 4


def test_slots_of_a_paused_or_gone_study_are_free_at_once() -> None:
    shares, cluster = FairShares(), FakeWorkers(4)
    first, second = (Sketch(shares, cluster, 100) for _ in range(2))
    assert first.share.slots() == 4  # the second has not asked yet
    first.share.pause()
    assert cluster.pausing.is_set()
    assert second.look() == 4
    second.share.leave()
    assert second.share not in shares._shares


def test_slots_that_left_are_given_to_nobody_twice() -> None:
    shares, cluster = FairShares(), FakeWorkers(4)
    first, second = (Sketch(shares, cluster, 100) for _ in range(2))
    assert first.look() == 4
    cluster._slots = 2  # two workers left; their trials wait for the other two
    first.end(2)
    assert (first.look(), second.look()) == (2, 0)
    first.end()
    assert (first.look(), second.look()) == (1, 1)


@given(
    st.integers(1, 5),
    st.lists(st.integers(1, 12), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
)
def test_no_slot_is_given_twice_and_none_lies_idle(
    slots: int, budgets: list[int], chance: random.Random
) -> None:
    clock = Clock()
    shares, cluster = FairShares(clock), FakeWorkers(slots)
    studies: list[Sketch] = []
    waiting = list(budgets)
    while waiting or any(study.unfinished() for study in studies):
        if waiting and chance.random() < 0.3:
            studies.append(Sketch(shares, cluster, waiting.pop()))
        if studies:
            chance.choice(studies).look()
            assert sum(study.running for study in studies) <= slots
        settle(*studies)
        at_work = sum(study.running for study in studies)
        assert at_work == min(slots, sum(study.unfinished() for study in studies))
        clock.seconds += chance.random()
        busy = [study for study in studies if study.running]
        if busy:
            chance.choice(busy).end()


# --- the service ---


class Shop:
    """A storage, one cluster's worth of fake slots, and the services over them."""

    def __init__(self, folder: Path, slots: int = 2) -> None:
        self.folder = folder
        self.url = ready_sqlite(folder)
        self.slots = slots
        self.lines: list[str] = []
        self.order: list[str] = []  # the study of every trial, as they began
        self.at_once = self.most_at_once = 0
        self.pace = 0.002  # seconds an epoch
        self.fail: dict[str, Callable[[], Exception]] = {}
        self.told: list[tuple[str, str, str]] = []  # to webhooks: URL, study, event
        self._lock = threading.Lock()
        self.window = self.storage()  # to look through

    def storage(self) -> Storage:
        return Storage(self.url, patience_seconds=None, say=self.lines.append)

    def queue(self, name: str, trials: int, **changes: object) -> None:
        with self.storage() as storage:
            tuned = self.create(storage, name, trials, **changes)
            storage.development.add(SHA256, ROWS)
            assert storage.queue.add(tuned.id)

    def create(self, storage: Storage, name: str, trials: int, **changes: object) -> TunedStudy:
        spec = small_spec(
            name=name,
            trials=trials,
            training={"max_epochs": _EPOCHS},
            sampler={"kind": "random"},
            hyperband=None,
            **changes,
        )
        return create_or_resume(
            storage, spec, IDENTITY, development_sha256=SHA256, artifacts_root=self.artifacts
        )

    @property
    def artifacts(self) -> Path:
        return self.folder / "artifacts"

    @contextmanager
    def workers(self, tuned: TunedStudy, file: Path) -> Iterator[FakeWorkers]:
        assert file.read_bytes() == ROWS
        if tuned.name in self.fail:
            raise self.fail[tuned.name]()

        def train(job: TrainingJob):
            with self._lock:
                self.at_once += 1
                self.most_at_once = max(self.most_at_once, self.at_once)
                self.order.append(tuned.name)
            try:
                for result in fake_train(job, epochs=_EPOCHS):
                    time.sleep(self.pace)
                    yield result
            finally:
                with self._lock:
                    self.at_once -= 1

        yield FakeWorkers(self.slots, train)

    def service(self, say: Callable[[str], None] | None = None) -> Service:
        return Service(
            open_storage=self.storage,
            open_workers=self.workers,
            slots=lambda: self.slots,
            artifacts_root=self.artifacts,
            say=say or self.lines.append,
            notifier=Notifier(self.lines.append, post=self.take),
        )

    def take(self, url: str, body: bytes) -> None:
        document = json.loads(body)
        self.told.append((url, document["study"], document["event"]))

    @contextmanager
    def serving(self, service: Service | None = None) -> Iterator[Service]:
        service = service or self.service()

        def run() -> None:
            with Storage(self.url, patience_seconds=0.2, say=lambda _: None) as queue:
                service.run(queue)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield service
        finally:
            service.stop()
            thread.join(30)
            assert not thread.is_alive()

    @contextmanager
    def study(self, name: str) -> Iterator[TunedStudy]:
        """On a connection of its own, which may take a lease."""
        with self.storage() as storage:
            yield load(storage, name, artifacts_root=self.artifacts)

    def status(self, name: str) -> StudyStatus:
        return status(load(self.window, name, artifacts_root=self.artifacts))

    def state(self, name: str) -> str:
        return self.status(name).state

    def finished(self, name: str) -> int:
        return self.status(name).finished_trials

    def wait_for(self, name: str, state: str) -> None:
        wait_until(lambda: self.state(name) == state)

    def queued(self) -> tuple[int, ...]:
        return self.window.queue.study_ids()

    def said(self, *words: str) -> list[str]:
        return [line for line in self.lines if all(word in line for word in words)]


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    monkeypatch.setattr("tuner.coordination.service._LOOK_SECONDS", 0.1)
    monkeypatch.setattr("tuner.coordination.service._NAP_SECONDS", 0.02)
    monkeypatch.setattr("tuner.coordination.service._RETRY_SECONDS", (0.1, 0.4))
    monkeypatch.setattr("tuner.coordination.coordinator._TURN_SECONDS", 0.2)
    monkeypatch.setattr("tuner.coordination.lease._HEARTBEAT_SECONDS", 0.2)
    shop = Shop(tmp_path)
    yield shop
    shop.window.close()


def test_two_studies_share_the_slots_and_a_later_one_is_not_starved(shop: Shop) -> None:
    shop.pace = 0.01
    shop.queue("a", 1000)
    shop.queue("b", 1000)
    with shop.serving():
        wait_until(lambda: "b" in shop.order and len(shop.order) - shop.order.index("b") >= 24)
        shop.queue("c", 4)
        shop.wait_for("c", "finished")
    assert shop.most_at_once == 2
    assert shop.finished("c") == 4
    begun = "".join(shop.order)
    # Shares are of time (`FairShares` is tested by itself), and on a busy machine trials take
    # unequal times. But once both were there, each of the first two had its part, ...
    both = begun[begun.index("b") :][:24]
    assert min(both.count("a"), both.count("b")) >= 4
    # ... and the third had its turns from its first trial to its last: some 12 of 2,000.
    assert len(begun[begun.index("c") : begun.rindex("c")]) <= 40
    assert len(shop.queued()) == 2
    assert len(shop.said("finished, ")) == 1


def test_a_study_is_confirmed_where_its_file_says_so(shop: Shop) -> None:
    shop.queue("a", 3, confirm={"top": 2, "seeds": 2})
    with shop.serving():
        wait_until(lambda: bool(shop.said("Study a-confirm: finished")))
    with shop.study("a") as tuned:
        assert confirmed(tuned) is not None
    assert not shop.queued()


def test_a_study_that_is_launched_while_the_service_runs_is_taken_up(shop: Shop) -> None:
    with shop.serving():
        wait_until(lambda: shop.said("The cluster runs 2 trainings at once"))
        shop.queue("late", 3)
        assert shop.state("late") in ("queued", "running", "finished")
        shop.wait_for("late", "finished")
    assert shop.finished("late") == 3
    (line,) = shop.said("Study late: finished")
    assert "3 of 3 trials (3 COMPLETE), best validation loss 0." in line


def test_a_service_that_ends_leaves_the_queue_to_the_next(shop: Shop) -> None:
    shop.pace = 0.01
    shop.queue("a", 12)
    shop.queue("b", 12)
    assert shop.state("a") == "queued"
    with shop.serving():
        wait_until(lambda: len(shop.order) >= 6)
    assert len(shop.queued()) == 2
    assert shop.state("a") == "queued"
    assert 0 < shop.finished("a") + shop.finished("b") < 24
    with shop.serving():
        shop.wait_for("a", "finished")
        shop.wait_for("b", "finished")
    for name in "ab":
        with shop.study(name) as tuned:
            assert len(tuned.trials()) == len(tuned.trials(*FINISHED)) == 12
    assert shop.queued() == ()


def test_two_services_on_one_storage_do_each_trial_once(shop: Shop) -> None:
    shop.pace = 0.005
    lines: list[str] = []
    with shop.serving(), shop.serving(shop.service(lines.append)):
        for name in "abc":
            shop.queue(name, 8)
        for name in "abc":
            shop.wait_for(name, "finished")
    assert len(shop.order) == 24
    for name in "abc":
        with shop.study(name) as tuned:
            assert len(tuned.trials()) == len(tuned.trials(*FINISHED)) == 8
    both = lines + shop.lines
    assert len([line for line in both if "finished, " in line]) == 3
    assert not [line for line in both if "tried again" in line]
    assert len([line for line in both if "is driven by process" in line]) <= 3


def test_stop_takes_a_study_out_of_the_queue_and_it_can_come_back(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNER_NOTIFY", "https://hooks.example.org/all")
    shop.queue("a", 300)
    with shop.serving():
        wait_until(lambda: len(shop.order) >= 4)
        with shop.study("a") as tuned:
            assert tuned.storage.queue.remove(tuned.id)
            tuned.storage.leases.request_stop(tuned.id)
        shop.wait_for("a", "stopped")
        done = shop.finished("a")
        assert 0 < done < 300
        time.sleep(0.3)  # three looks at the queue
        assert shop.state("a") == "stopped"
        with shop.storage() as storage:
            storage.queue.add(shop.create(storage, "a", done + 2).id)
        shop.wait_for("a", "finished")
    assert shop.finished("a") == done + 2
    assert len(shop.said("Study a: stopped")) == 1
    assert [event for _, _, event in shop.told] == ["stopped", "finished"]


def test_a_study_that_left_the_queue_is_stopped_though_nobody_asked_its_coordinator(
    shop: Shop,
) -> None:
    shop.queue("a", 300)
    with shop.serving():
        wait_until(lambda: len(shop.order) >= 2)
        with shop.study("a") as tuned:
            tuned.storage.queue.remove(tuned.id)
        shop.wait_for("a", "stopped")


def test_a_deleted_study_leaves_the_queue_and_the_service_in_peace(shop: Shop) -> None:
    shop.queue("a", 3)
    shop.queue("b", 3)
    with shop.study("a") as tuned:
        delete(tuned)
    assert len(shop.queued()) == 1
    with shop.storage() as storage:
        storage.queue.add(77)  # as if it was deleted between two looks
    with shop.serving():
        shop.wait_for("b", "finished")
        wait_until(lambda: shop.queued() == ())


def failing(trials: int) -> Callable[..., Iterator[object]]:
    def train(job):
        raise RuntimeError("no space left on device")
        yield

    return train


def test_a_study_that_fails_leaves_the_queue_with_its_reason_and_hurts_no_other(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNER_NOTIFY", "https://hooks.example.org/all")
    monkeypatch.setenv("TUNER_NOTIFY_ODD", "not a URL")
    shop.queue("good", 6)
    shop.queue("bad", 20, notify={"on": ["failed"]})
    shop.queue("odd", 2, notify={"url_env": "TUNER_NOTIFY_ODD"})
    workers = shop.workers

    @contextmanager
    def some_fail(tuned: TunedStudy, file: Path) -> Iterator[FakeWorkers]:
        if tuned.name == "bad":
            yield FakeWorkers(2, failing(10))
        else:
            with workers(tuned, file) as good:
                yield good

    monkeypatch.setattr(shop, "workers", some_fail)
    with shop.serving():
        shop.wait_for("good", "finished")
        wait_until(lambda: shop.queued() == ())
    with shop.study("bad") as tuned:
        now = status(tuned)
        assert now.state == "stopped"
        assert "no space left on device" in str(now.error)
        assert now.to_document()["error"] == now.error
        assert tuned.storage.leases.of(tuned.id) is None
    assert len(shop.said("Study bad: given up", "10 trials in a row failed")) == 1
    assert sorted(shop.told) == [
        ("https://hooks.example.org/all", "bad", "failed"),
        ("https://hooks.example.org/all", "good", "finished"),
    ]
    assert (
        len(shop.said("Study odd: no notification", "$TUNER_NOTIFY_ODD does not hold a URL")) == 1
    )


def test_a_record_that_cannot_be_read_is_given_up_with_its_reason(shop: Shop) -> None:
    shop.queue("odd", 3)
    shop.queue("good", 3)
    with shop.study("odd") as tuned:
        tuned.study.set_user_attr(RECORD_KEY, {"spec": "of another tuner"})
    with shop.serving():
        shop.wait_for("good", "finished")
        wait_until(lambda: shop.queued() == ())
    with shop.storage() as storage:
        odd = optuna.load_study(study_name="odd", storage=storage.optuna)
        assert odd.user_attrs[ERROR_KEY]


def test_without_development_rows_the_reason_says_how_to_bring_them(shop: Shop) -> None:
    with shop.storage() as storage:
        storage.queue.add(shop.create(storage, "bare", 3).id)
    with shop.serving():
        wait_until(lambda: shop.queued() == ())
    with shop.study("bare") as tuned:
        again = tuned.command("launch", "STUDY.toml", "--detach")
        assert f"nor in the storage; `{again}`, with" in str(status(tuned).error)


def test_spoilt_development_rows_are_replaced_from_the_storage(shop: Shop) -> None:
    path = development_path(shop.artifacts, SHA256)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half a fi")
    shop.queue("a", 1)
    with shop.serving():
        shop.wait_for("a", "finished")
    assert path.read_bytes() == ROWS


def test_without_workers_a_study_waits_and_is_said_so_once(shop: Shop) -> None:
    shop.fail["a"] = lambda: ClusterError("No worker has offered a slot.")
    shop.queue("a", 2)
    shop.slots = 0
    with shop.serving():
        wait_until(lambda: shop.said("No worker offers a slot"))
        wait_until(lambda: shop.said("Study a: interrupted, it is tried again. No worker"))
        time.sleep(0.5)
        assert len(shop.said("tried again")) == 1
        assert shop.state("a") == "queued"
        shop.fail.clear()
        wait_until(lambda: shop.state("a") == "running")
        time.sleep(0.2)
        assert shop.finished("a") == 0
        shop.slots = 2
    assert len(shop.queued()) == 1


def test_slots_that_come_later_are_used(shop: Shop) -> None:
    slots = itertools.chain([0] * 4, itertools.repeat(2))
    with shop.storage() as storage:
        tuned = shop.create(storage, "a", 5)
        workers = FakeWorkers()
        workers.slots = lambda: next(slots)  # type: ignore[method-assign]
        assert Coordinator(tuned, workers, Notes()).run() == "finished"
        assert len(tuned.trials(*FINISHED)) == 5


def test_a_lease_that_another_process_holds_is_waited_for_quietly(shop: Shop) -> None:
    shop.queue("a", 3)
    with shop.study("a") as tuned:
        tuned.storage.lease.take(tuned.id)
        with shop.serving():
            wait_until(lambda: shop.said("Study a: is driven by process"))
            time.sleep(0.4)
            assert shop.finished("a") == 0
            tuned.storage.lease.release()
            shop.wait_for("a", "finished")
    assert len(shop.said("is driven by process")) == 1


@pytest.mark.parametrize("host", ["here", "elsewhere"])
def test_a_study_whose_service_was_killed_is_adopted_with_its_trials(
    shop: Shop, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    shop.queue("a", 3)
    with shop.study("a") as tuned:
        tuned.storage.lease.take(tuned.id)
        tuned.record.spec.space.suggest(tuned.study.ask())  # the trial that it was training
        dead = replace(LeaseHolder.this_process(), host=host, pid=gone.pid)
        holder = json.dumps(asdict(dead if host == "here" else replace(dead, machine=host)))
        tuned.storage._transactions.run(
            lambda c: c.execute(sa.text("UPDATE tuner_lease SET holder = :h"), {"h": holder})
        )
    with shop.serving():
        if host == "elsewhere":  # nobody here can know that it is dead: the lease must lapse
            wait_until(lambda: shop.said("Study a: is driven by process", "on elsewhere"))
            assert shop.finished("a") == 0
            monkeypatch.setattr("tuner.storage.lease.LEASE_SECONDS", 0.0)
            monkeypatch.setattr("tuner.storage.lease._LAST_LOOK_SECONDS", 0.6)
        wait_until(lambda: shop.finished("a") == 3, seconds=25)
    assert bool(shop.said("is driven by process")) == (host == "elsewhere")
    with shop.study("a") as tuned:
        assert len(tuned.trials()) == len(tuned.trials(*FINISHED)) == 3
        assert tuned.trials()[0].user_attrs[RESUMED_KEY] == 1


def test_a_study_that_another_coordinator_took_over_stays_queued(shop: Shop) -> None:
    shop.pace = 0.005
    shop.queue("a", 300)
    with shop.serving():
        wait_until(lambda: len(shop.order) >= 4)
        with shop.study("a") as tuned:
            tuned.storage._transactions.run(
                lambda c: c.exec_driver_sql(
                    "UPDATE tuner_lease SET token = 'another', renewed_at = renewed_at + 3600"
                )
            )
            wait_until(lambda: shop.said("tried again", "Another coordinator took this study over"))
            wait_until(lambda: shop.at_once == 0)
            assert tuned.storage.queue.study_ids() == (tuned.id,)
            assert {trial.state for trial in tuned.trials()} <= {
                TrialState.RUNNING,
                TrialState.COMPLETE,
            }


def test_the_queue_survives_a_database_that_is_away(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuner.errors import StorageError

    shop.queue("a", 3)
    away = threading.Event()
    away.set()
    study_ids = Queue.study_ids

    def sometimes(self: Queue) -> tuple[int, ...]:
        if away.is_set():
            raise StorageError("the database does not answer")
        return study_ids(self)

    monkeypatch.setattr(Queue, "study_ids", sometimes)
    with shop.serving():
        wait_until(lambda: shop.said("The queue cannot be read"))
        time.sleep(0.4)
        away.clear()
        shop.wait_for("a", "finished")
    assert len(shop.said("The queue cannot be read")) == 1
    assert len(shop.said("The queue can be read again")) == 1


@pytest.mark.parametrize("at_work_on", ["loading a study", "its trials"])
def test_a_service_ends_though_the_database_is_away(
    shop: Shop, at_work_on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.coordination.service._PATIENCE_AFTER_STOP_SECONDS", 0.2)
    away = threading.Event()

    def refuse(*_: object) -> None:
        if away.is_set():
            raise sqlite3.OperationalError("server closed the connection unexpectedly")

    connect = shop.storage

    def breakable(patience: float | None = None) -> Storage:
        storage = Storage(shop.url, patience_seconds=patience, say=shop.lines.append)
        sa.event.listen(storage._rdb.engine, "before_cursor_execute", refuse)
        return storage

    monkeypatch.setattr(shop, "storage", breakable)
    shop.pace = 0.01
    shop.queue("a", 300)

    def open_storage() -> Storage:
        storage = breakable()
        if at_work_on == "loading a study":
            away.set()
        return storage

    service = shop.service()
    service._open_storage = open_storage

    def run() -> None:
        with breakable(0.2) as queue:
            service.run(queue)

    thread = threading.Thread(target=run)
    thread.start()
    if at_work_on == "its trials":
        wait_until(lambda: len(shop.order) >= 3)
        away.set()
    wait_until(lambda: shop.said("The queue cannot be read"))
    service.stop()
    thread.join(30)
    assert not thread.is_alive()
    assert shop.said("The database is unavailable, so studies stop without it")
    away.clear()
    monkeypatch.setattr(shop, "storage", connect)
    assert shop.state("a") in ("queued", "running")  # its lease may not have lapsed
    assert len(shop.queued()) == 1


def test_a_budget_that_is_raised_while_it_is_driven_is_reached(shop: Shop) -> None:
    shop.pace = 0.005
    shop.queue("a", 6)
    with shop.serving():
        wait_until(lambda: len(shop.order) >= 3)
        with shop.storage() as storage:
            storage.queue.add(shop.create(storage, "a", 10).id)
        wait_until(lambda: shop.finished("a") == 10)
        wait_until(lambda: shop.queued() == ())


def test_a_budget_that_is_raised_as_the_study_finishes_is_not_forgotten(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.queue("a", 2)
    remove = Queue.remove
    raised: list[bool] = []

    def raise_first(queue: Queue, study_id: int) -> bool:
        if not raised:
            with shop.storage() as storage:
                raised.append(storage.queue.add(shop.create(storage, "a", 4).id))
        return remove(queue, study_id)

    monkeypatch.setattr(Queue, "remove", raise_first)
    with shop.serving():
        wait_until(lambda: shop.finished("a") == 4)
        wait_until(lambda: shop.queued() == ())
    assert raised == [False]  # the row of the first two trials was still there


def test_the_number_of_workers_is_that_of_the_moment(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.coordination.study_note._WORKERS_SECONDS", 0.05)
    shop.pace = 0.05
    shop.queue("a", 60)

    def workers() -> int:
        return shop.status("a").workers

    with shop.serving():
        wait_until(lambda: workers() == 2)
        shop.queue("b", 60)
        wait_until(lambda: workers() == 1)
    assert workers() == 0
