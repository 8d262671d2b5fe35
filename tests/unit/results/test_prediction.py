"""Predictions of records: their order, their flags, and how they are written."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterator

import numpy as np
import pytest

from tuner.data.sequences import SequenceRecord
from tuner.results.bundle import Bundle
from tuner.results.prediction import (
    COLUMNS,
    OutputFormat,
    Prediction,
    Tally,
    predict_records,
    writer_of,
)


class FractionOfAlanine:
    """Two networks: the fraction of alanine, and half of it."""

    shares = np.array([0.5, 0.5], np.float32)

    def __init__(self, networks: int) -> None:
        self.shares = np.full(networks, 1 / networks, np.float32)
        self.calls: list[int] = []

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        self.calls.append(len(tokens))
        fraction = (tokens == 1).sum(axis=1) / np.maximum((tokens > 0).sum(axis=1), 1)
        return np.stack([fraction / (1 + each) for each in range(len(self.shares))], axis=1)


def bundle(networks: int = 1, **changes: object) -> Bundle:
    description = {
        "study": "demo",
        "max_length": 10,
        "min_length": 3,
        "threshold": 0.5,
        "synthetic": False,
        **changes,
    }
    return Bundle(description, [], FractionOfAlanine(networks))  # type: ignore[arg-type]


def record(sequence: str, name: str = "a", flags: tuple[str, ...] = ()) -> SequenceRecord:
    return SequenceRecord(file="f", line=1, id=name, sequence=sequence, flags=flags)


def one(sequence: str, **changes: object) -> Prediction:
    (found,) = predict_records(bundle(), [record(sequence, **changes)])  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize(
    ("sequence", "probability", "label", "flags"),
    [
        ("AAAM", 0.75, 1, ()),
        ("aaam", 0.75, 1, ()),
        ("AM", 0.5, 0, ("shorter_than_trained",)),
        ("AAAM*", 0.75, 1, ("stop_removed",)),
        ("AAAAAAAAAAMMMM", 1.0, 1, ("longer_than_trained:first_10_used",)),
        ("", None, None, ("empty",)),
        ("*", None, None, ("stop_removed", "empty")),
        ("AAXA", None, None, ("unknown_residues:X_at_3",)),
        ("AA*A", None, None, ("unknown_residues:*_at_3",)),
        ("AA-M.*", 2 / 3, 1, ("gaps_removed", "stop_removed")),
        ("AA8A", None, None, ("unknown_residues:8_at_3",)),
        (
            "ACGT" * 8,
            0.3,
            0,
            ("looks_like_nucleotides", "longer_than_trained:first_10_used"),
        ),
    ],
)
def test_each_record_is_predicted_or_says_why_not(
    sequence: str, probability: float | None, label: int | None, flags: tuple[str, ...]
) -> None:
    found = one(sequence)
    assert found.probability == (None if probability is None else pytest.approx(probability))
    assert (found.label, found.spread, found.flags) == (label, None, flags)


BOTH_ENDS = "longer_than_trained:first_5_and_last_5_used"


@pytest.mark.parametrize(
    ("sequence", "probability", "flags"),
    [
        ("AAXA", 0.75, ("unknown_residues:1_masked",)),
        ("BzJuoX?A", 1 / 8, ("unknown_residues:7_masked",)),
        ("AA-X*", 2 / 3, ("gaps_removed", "stop_removed", "unknown_residues:1_masked")),
        ("AX1A", None, ("unknown_residues:X_at_2",)),
        ("XXX", None, ("unknown_residues:X_at_1",)),
        ("AUGGCCAUUG", None, ("unknown_residues:U_at_2",)),
        ("MMMMAAAAAMMM", 0.3, (BOTH_ENDS,)),
        (
            "A11MMMMMM1AA",
            None,
            (BOTH_ENDS, "unknown_residues:1_at_2"),
        ),
        (
            "MMMMMMMMM1AA",
            None,
            (BOTH_ENDS, "unknown_residues:1_at_10"),
        ),
    ],
)
def test_a_bundle_masks_and_cuts_as_its_training_did(
    sequence: str, probability: float | None, flags: tuple[str, ...]
) -> None:
    masking = bundle(unknown="mask", truncate="middle")
    (found,) = predict_records(masking, [record(sequence)])
    assert found.probability == (None if probability is None else pytest.approx(probability))
    assert found.flags == flags


def test_flags_of_the_file_come_first() -> None:
    assert one("AAAM", name="", flags=("no_id",)).flags == ("no_id",)
    broken = one("AAAM", flags=("wrong_number_of_fields",))
    assert (broken.probability, broken.flags) == (None, ("wrong_number_of_fields",))


def test_the_order_is_kept_over_chunks_of_any_size() -> None:
    records = [
        record("A" * (at % 11) + "M" + "X" * (at % 5 == 0), f"p{at % 40}") for at in range(57)
    ]
    whole = list(predict_records(bundle(), records))
    assert [one.record for one in whole] == records
    for chunk in (1, 2, 13, 56, 57, 58):
        assert list(predict_records(bundle(), iter(records), chunk=chunk)) == whole
    repeated = [("duplicate_id" in one.flags) for one in whole]
    assert repeated == [False] * 40 + [True] * 17


def test_several_networks_have_a_spread() -> None:
    (found,) = predict_records(bundle(2), [record("AAAM")])
    assert found.probability == pytest.approx((0.75 + 0.375) / 2)
    assert found.spread == pytest.approx(0.1875)


def test_no_more_is_read_than_a_chunk_ahead() -> None:
    read: list[int] = []

    def endless() -> Iterator[SequenceRecord]:
        for at in itertools.count():
            read.append(at)
            yield record("AAAM", str(at))

    found = predict_records(bundle(), endless(), chunk=10)
    for _ in range(25):
        next(found)
    assert len(read) == 40  # 25 in three chunks, and one ahead


def test_records_without_a_prediction_alone_are_no_case_of_their_own() -> None:
    assert [one.probability for one in predict_records(bundle(), [record("X"), record("")])] == [
        None,
        None,
    ]
    assert list(predict_records(bundle(), [])) == []


# --- writing ---


def text(form: OutputFormat, predictions: list[Prediction]) -> str:
    stream = io.StringIO()
    write = writer_of(form, stream)
    for prediction in predictions:
        write(prediction)
    return stream.getvalue()


def test_tables_have_a_header_and_blanks() -> None:
    predictions = list(
        predict_records(bundle(2), [record("AAAM", 'a,"b"'), record("AX", "tab\tid")])
    )
    for form, delimiter in (("csv", ","), ("tsv", "\t")):
        rows = list(csv.reader(io.StringIO(text(form, predictions)), delimiter=delimiter))  # type: ignore[arg-type]
        assert rows == [
            list(COLUMNS),
            ['a,"b"', "0.562500", "1", "0.187500", ""],
            ["tab\tid", "", "", "", "shorter_than_trained;unknown_residues:X_at_2"],
        ]


def test_json_lines_have_null_and_lists() -> None:
    predictions = list(predict_records(bundle(), [record("AM*", "a"), record("", "b")]))
    first, second = map(json.loads, text("jsonl", predictions).splitlines())
    assert first == {
        "id": "a",
        "probability": 0.5,
        "label": 0,
        "spread": None,
        "flags": ["stop_removed", "shorter_than_trained"],
    }
    assert second["probability"] is None
    assert second["flags"] == ["empty"]


def test_what_was_predicted_is_counted() -> None:
    tally = Tally()
    sequences = ["AAAM", "AMMM", "AAX", "", "AAAA" * 4]
    for found in predict_records(
        bundle(), [record(one, str(at)) for at, one in enumerate(sequences)]
    ):
        tally.count(found)
    assert (tally.records, tally.soluble, tally.unpredicted) == (5, 2, 2)
    assert tally.flags == {"unknown_residues": 1, "empty": 1, "longer_than_trained": 1}
