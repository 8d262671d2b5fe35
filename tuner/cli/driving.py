"""What the verbs share that train: a study is driven on workers, with its progress shown."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tuner.cli.terminal import stop_on_signals, terminal
from tuner.errors import counted

if TYPE_CHECKING:
    from tuner.cluster.connection import Connection
    from tuner.coordination.coordinator import Ending
    from tuner.search.tuned_study import TunedStudy
    from tuner.spec.spec import StudySpec


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkersOf:
    """On which workers a study is trained."""

    connect: Callable[[Callable[[str], None]], AbstractContextManager[Connection]]
    threads: int  #: of each training


def drive(
    tuned: TunedStudy,
    workers: WorkersOf,
    *,
    timeout: float | None,
    as_json: bool,
    asked: StudySpec | None = None,
) -> Ending:
    """Runs a study to its budget; see `tuner.coordination.coordinator.Coordinator.run`.

    Args:
        tuned: The study.
        workers: What trains.
        timeout: Seconds after which it is stopped.
        as_json: Progress is shown on stderr.
        asked: The study file, whose budget and stop rule the study takes.
    """
    from tuner.cli.progress import ProgressWatcher
    from tuner.cluster.trainings import Cluster
    from tuner.coordination.coordinator import Coordinator
    from tuner.coordination.study_trainings import StudyTrainings
    from tuner.search.development import study_development

    data, split = tuned.record.data, tuned.record.spec.data.split
    watcher = ProgressWatcher(tuned, terminal(stderr=as_json))
    tuned.storage.leases.refuse_if_live(tuned.id)
    with workers.connect(watcher.say) as connection:
        connection.require_workers()
        count = connection.slots()
        watcher.say(
            f"Study {tuned.name}: {counted(asked.trials if asked else tuned.budget, 'trial')} on "
            f"{counted(count, 'worker')}; data {data.source}"
            f"{' (SYNTHETIC)' if data.synthetic else ''}, {data.training_rows} training and "
            f"{data.validation_rows} validation rows; split {split.in_words}, "
            f"identity {data.split_id[:12]}."
        )
        with Cluster(
            connection,
            StudyTrainings(tuned),
            development_file=study_development(tuned),
            threads=workers.threads,
        ) as cluster:
            coordinator = Coordinator(tuned, cluster, watcher)
            stop_on_signals(lambda: coordinator.stop("interrupted"))
            with watcher.showing():
                ending = coordinator.run(asked=asked, timeout=timeout)
    tuned.storage.queue.remove(tuned.id)  # it ran here, and not in the service
    return ending
