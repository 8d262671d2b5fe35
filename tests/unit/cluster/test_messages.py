from __future__ import annotations

import dataclasses
import math
from typing import get_args

import msgpack
import pytest
from fakes import epoch_result

from tuner.cluster import messages
from tuner.cluster.messages import (
    STOP,
    CheckpointSaved,
    CheckpointUnusable,
    EpochTrained,
    LeaveReason,
    Left,
    Message,
    Opened,
    Orders,
    Started,
    WorkerMessage,
    from_wire,
    to_wire,
)

EPOCH = dataclasses.replace(epoch_result(0.5, 3), validation_roc_auc=0.75)
MESSAGES: list[Message] = [
    Started(attempt="a"),
    CheckpointUnusable(attempt="a", reason="half of it is missing"),
    Opened(attempt="a", worker="host, process 7", after=2),
    EpochTrained(attempt="a", result=EPOCH),
    EpochTrained(attempt="a", result=epoch_result(0.5, 3)),
    CheckpointSaved(attempt="a", content=b"\0\xff"),
    *(Left(attempt="a", reason=reason, checkpoint=b"\1") for reason in get_args(LeaveReason)),
    Left(attempt="a", reason="unfit", detail="no Keras"),
    Orders(pause=True, attempts={"a": 3, "b": STOP}, complete=False),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda one: type(one).__name__)
def test_a_message_that_travelled_is_the_same(message: Message) -> None:
    # As Dask sends it, and with what its scheduler adds to what a worker says.
    document = msgpack.unpackb(msgpack.packb(to_wire(message)))
    assert from_wire(document | {"worker": "tcp://127.0.0.1:1"}) == message


def test_every_type_of_message_is_known_by_its_name() -> None:
    kinds = [one for one in vars(messages).values() if isinstance(one, type)]
    declared = {one for one in kinds if issubclass(one, Message)} - {WorkerMessage}
    assert set(messages._TYPES.values()) == {type(one) for one in MESSAGES} == declared


def test_a_message_of_another_version_is_ignored() -> None:
    document = to_wire(Opened(attempt="a", worker="w", after=2))
    assert from_wire(document | {"type": "Reopened"}) is None
    assert from_wire({"attempt": "a", "opened": 2, "trained_by": "w"}) is None
    assert from_wire(document | {"fields": {"attempt": "a"}}) is None
    assert from_wire({"type": "EpochTrained", "fields": {"attempt": "a"}}) is None


def test_fields_that_another_version_added_are_ignored() -> None:
    document = to_wire(Left(attempt="a", reason="asked"))
    document["fields"] |= {"temperature": 80.0}
    assert from_wire(document) == Left(attempt="a", reason="asked")
    document = to_wire(EpochTrained(attempt="a", result=EPOCH))
    del document["fields"]["result"]["training_loss"]
    document["fields"]["result"] |= {"temperature": 80.0}
    message = from_wire(document)
    assert isinstance(message, EpochTrained)
    assert math.isnan(message.result.training_loss)
    assert message.result.validation_loss == EPOCH.validation_loss
