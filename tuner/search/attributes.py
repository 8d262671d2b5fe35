"""The keys of what is stored with a study and its trials, and the learning curve among it."""

from __future__ import annotations

import optuna

from tuner.train import (
    EpochResult,
    curve_from_document,
)

#: Attributes of the trial, as its page and the table of trials show them.
NOTE_KEY = "note"
SEED_KEY = "seed"  # the study's
AS_TRIAL_KEY = "as_trial"  # weights, shuffling and dropout are those of this number
PRECISION_KEY = "precision"
AGAIN_KEY = "train_again"
PASSWORD_KEY = "train_again_password"  # noqa: S105 - how to give one, where the line needs that


#: What a trial leaves behind beside Optuna's own: attributes of the trial. The curve is one of the
#: system's, as the dashboard would send it with every trial and show it as one endless line.
CURVE_KEY = "curve"  # as `tuner.train.curve_document` has it
ENDED_KEY = "ended"  # why it ended early: an EndReason
DETAIL_KEY = "ended_detail"


def curve_of(trial: optuna.trial.FrozenTrial) -> tuple[EpochResult, ...]:
    """The learning curve that a trial left behind; empty where there is none."""
    # Studies of earlier versions have it among the user's attributes.
    return curve_from_document(
        trial.system_attrs.get(CURVE_KEY) or trial.user_attrs.get(CURVE_KEY, ())
    )


#: The trial attribute of one that would have been pruned, and trains on: after which epoch.
AUDITED_KEY = "audited_after_epoch"

#: The study attribute that holds everything about how the study is run.
RECORD_KEY = "tuner"
#: Study attributes that change while it lives.
BUDGET_KEY = "trials"
STOP_KEY = "stop"  # the study file's table; None without one
NOTIFY_KEY = "notify"  # likewise
ENDED_EARLY_KEY = "ended_early"  # why, where it ended before the budget that was asked for
WORKERS_KEY = "workers"
#: What precision "auto" means in this study: `precision.BFLOAT16_FROM`, or None for never.
BFLOAT16_FROM_KEY = "bfloat16_from"
ERROR_KEY = "error"  # why the service gave the study up; None once it is launched again
#: What a trial's value is called on the dashboard's axes.
VALUE_NAME = "validation loss (nats)"
#: Of a study that confirms another: which, and what it trains again (`tuner.search.confirmation`).
CONFIRMS_KEY = "confirms"
#: The attribute of its trials that says which configuration each trains.
OF_CONFIGURATION_KEY = "configuration"
#: The study file's `[confirm]`; None without one.
CONFIRM_KEY = "confirm"
#: The trial attribute that counts how often a trial was taken up again.
RESUMED_KEY = "resumed"
#: The one that says after which epoch the last time; 0: from the start.
RESUMED_FROM_KEY = "resumed_from_epoch"
#: The one that names the worker process that trained it last.
WORKER_KEY = "worker"
#: The system attribute with what trained its epochs: versions, processor, threads, a part for each
#: worker, with the first epoch that it trained ("from_epoch").
ENVIRONMENTS_KEY = "environments"


#: Trial attributes that count workers lost since the trial's last new epoch.
LOSSES_KEY = "workers_lost"
EARLY_LOSSES_KEY = "workers_lost_early"
