"""Learning curves as they are stored: by name, and readable across versions."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from fakes import epoch_result

from tuner import train as curves
from tuner.train import EpochResult, curve_document, curve_from_document

CURVE = (epoch_result(0.7, 1), epoch_result(0.6, 2), epoch_result(0.65, 3))
#: CURVE as versions stored it that knew six fields, and nothing of their names.
BY_POSITION = [[1, 0.65, 0.7, 0.7, 0.6, 0.001], [2, 0.55, 0.7, 0.6, 0.6, 0.001]]


def as_stored(document: Any) -> Any:
    return json.loads(json.dumps(document))


def another_version(*fields: tuple[Any, ...], first: bool = False) -> type[EpochResult]:
    """An EpochResult with these fields more, after its own or before them."""
    own = [(one.name, one.type) for one in dataclasses.fields(EpochResult)]
    methods = {"from_document": classmethod(EpochResult.from_document.__func__)}
    ordered = [*fields, *own] if first else [*own, *fields]
    return dataclasses.make_dataclass(
        "EpochResult", ordered, namespace=methods, frozen=True, kw_only=True
    )


def test_a_curve_comes_back_as_it_was_stored() -> None:
    assert curve_from_document(as_stored(curve_document(CURVE))) == CURVE
    assert curve_from_document(as_stored(curve_document(()))) == ()


def test_a_curve_is_stored_by_the_names_of_its_fields() -> None:
    document = curve_document(CURVE)
    assert document["epoch"] == [1, 2, 3]
    assert document["validation_loss"] == [0.7, 0.6, 0.65]
    backwards = dict(reversed(as_stored(document).items()))
    assert curve_from_document(backwards) == CURVE


def test_a_curve_that_was_stored_by_position_is_read() -> None:
    read = curve_from_document(BY_POSITION)
    assert [(one.epoch, one.validation_loss, one.seconds) for one in read] == [
        (1, 0.7, 0.001),
        (2, 0.6, 0.001),
    ]
    assert read[1].training_loss == 0.55
    assert curve_from_document([]) == ()


@pytest.mark.parametrize("first", [False, True])
def test_a_field_more_leaves_every_earlier_curve_readable(
    first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_name = as_stored(curve_document(CURVE))
    later = another_version(
        ("gradient_norm", float), ("note", str, dataclasses.field(default="")), first=first
    )
    monkeypatch.setattr(curves, "EpochResult", later)
    for stored in (by_name, BY_POSITION):
        epoch = curve_from_document(stored)[1]
        assert (epoch.epoch, epoch.validation_loss, epoch.seconds) == (2, 0.6, 0.001)
        assert math.isnan(epoch.gradient_norm)
        assert epoch.note == ""


def test_a_field_that_only_a_later_version_knows_is_left_out() -> None:
    stored = {**as_stored(curve_document(CURVE)), "gradient_norm": [1.0, 2.0, 3.0]}
    assert curve_from_document(stored) == CURVE
