"""The development file: the training and validation rows, which is all that workers get."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tuner.artifacts import publish
from tuner.data.arrays import DamagedError, opened_archive, read_member
from tuner.data.problems import Problems
from tuner.data.rows import Row, Tokens, decode_tokens, encode, hash_sequence
from tuner.data.split import Split, SplitHashes
from tuner.data.text import read_bytes
from tuner.errors import TunerError


@dataclass(frozen=True, slots=True, kw_only=True)
class DevelopmentData:
    """The rows that training and the choice of hyperparameters may see.

    With folds, training and validation rows are the same: all development rows. What fits
    something to the one and measures it on the other has to go by `of_fold`.
    """

    training_tokens: Tokens  #: [training rows, max_length]
    training_labels: Tokens  #: [training rows]; 1 is soluble, 0 insoluble
    validation_tokens: Tokens  #: [validation rows, max_length]
    validation_labels: Tokens  #: [validation rows]
    #: What each training row counts, float32 [training rows], in the mean 1; None: all the same.
    training_weights: npt.NDArray[np.float32] | None = None
    folds: npt.NDArray[np.uint8] | None = None  #: of each row, from 0, [n]; None without folds

    @property
    def fold_count(self) -> int:
        """The number of folds; 0 without."""
        return 0 if self.folds is None else int(self.folds.max()) + 1

    def of_fold(self, fold: int) -> DevelopmentData:
        """The rows of one fold as validation rows, and all others as training rows."""
        if self.folds is None:
            raise ValueError("these rows have no folds")
        inside = self.folds == fold
        weights = self.training_weights
        return DevelopmentData(
            training_tokens=self.training_tokens[~inside],
            training_labels=self.training_labels[~inside],
            validation_tokens=self.training_tokens[inside],
            validation_labels=self.training_labels[inside],
            training_weights=None if weights is None else mean_1(weights[~inside]),
        )

    def reshuffled(self, seed: int, trial: int) -> DevelopmentData:
        """The same rows with other validation rows, as many of each label as these are.

        Which they are follows from `seed` and `trial` (arXiv:2405.15393).
        """
        tokens = np.concatenate([self.training_tokens, self.validation_tokens])
        labels = np.concatenate([self.training_labels, self.validation_labels])
        inside = np.zeros(len(labels), bool)
        generator = np.random.default_rng([seed, trial])
        for label in (0, 1):
            rows = generator.permutation(np.flatnonzero(labels == label))
            inside[rows[: np.count_nonzero(self.validation_labels == label)]] = True
        return DevelopmentData(
            training_tokens=tokens[~inside],
            training_labels=labels[~inside],
            validation_tokens=tokens[inside],
            validation_labels=labels[inside],
        )

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What the development file holds, by name."""
        arrays: dict[str, npt.NDArray[Any]] = {
            "training_tokens": self.training_tokens,
            "training_labels": self.training_labels,
        }
        if self.folds is None:
            arrays["validation_tokens"] = self.validation_tokens
            arrays["validation_labels"] = self.validation_labels
        else:
            arrays["folds"] = self.folds
        # Not where there are none: the same rows make the same file as in every earlier version.
        if self.training_weights is not None:
            arrays["training_weights"] = self.training_weights
        return arrays


def development_of(split: Split, max_length: int) -> DevelopmentData:
    """The training and validation rows of a split, as arrays of this width."""
    training_tokens, training_labels = split_arrays(split.training, max_length)
    validation_tokens, validation_labels = training_tokens, training_labels
    if split.folds is None:
        validation_tokens, validation_labels = split_arrays(split.validation, max_length)
    return DevelopmentData(
        training_tokens=training_tokens,
        training_labels=training_labels,
        validation_tokens=validation_tokens,
        validation_labels=validation_labels,
        training_weights=weights_of(split.training),
        folds=None if split.folds is None else np.array(split.folds, np.uint8),
    )


def development_hashes(development: DevelopmentData) -> SplitHashes:
    """The same of a development file: its test split is empty, and cut sequences are cut."""
    training, validation = (
        frozenset(hash_sequence(sequence) for sequence in decode_tokens(tokens))
        for tokens in (development.training_tokens, development.validation_tokens)
    )
    if development.folds is not None:
        validation = frozenset()  # each row is trained on, too
    return SplitHashes(training=training, validation=validation, test=frozenset())


def load_development(path: Path, sha256: str | None = None) -> DevelopmentData:
    """The rows of a development file.

    Args:
        path: What `prepare` wrote, or a copy of it.
        sha256: Of the file's bytes, checked where given.

    Raises:
        DataError: The file is missing, damaged, or not the one that was asked for.
        OSError: It cannot be opened or read.
        MemoryError: There is no room for it.
    """
    remedy = "launch the study again: that writes the file again"
    problems = Problems()
    content = read_bytes(path, str(path), problems, outages=True)
    problems.raise_if_any()
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256:
        problems.add(str(path), f"sha256 is {found}, not {sha256}; {remedy}", value=found)
        problems.raise_if_any()
    try:
        with opened_archive(content) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            training = [read_member(archive, f"training_{what}") for what in ("tokens", "labels")]
            validation = training
            if "folds" not in names:
                validation = [
                    read_member(archive, f"validation_{what}") for what in ("tokens", "labels")
                ]
            development = DevelopmentData(
                training_tokens=training[0],
                training_labels=training[1],
                validation_tokens=validation[0],
                validation_labels=validation[1],
                training_weights=read_member(archive, "training_weights")
                if "training_weights" in names
                else None,
                folds=read_member(archive, "folds") if "folds" in names else None,
            )
    except (KeyError, DamagedError) as error:
        if isinstance(error.__cause__, MemoryError):
            raise error.__cause__ from None
        problems.add(str(path), f"is no development file ({error}); {remedy}")
        problems.raise_if_any()
    return development


def split_arrays(rows: Sequence[Row], max_length: int) -> tuple[Tokens, Tokens]:
    """Tokens [n, max_length] and labels [n], both uint8."""
    labels = np.array([row.label for row in rows], dtype=np.uint8)
    # What may not be masked was refused when the rows were read.
    return encode([row.sequence for row in rows], max_length, "mask"), labels


def weights_of(rows: Sequence[Row]) -> npt.NDArray[np.float32] | None:
    """What each row counts, float32 [n], in the mean 1; None where no row has a weight."""
    given = [row.weight for row in rows if row.weight is not None]
    if not given:
        return None
    # The largest first, so that the sum of large ones is no overflow.
    return mean_1(np.array(given) / max(given))


def mean_1(weights: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float32]:
    """Weights in the mean 1, float32 [n]."""
    found: npt.NDArray[np.float32] = (weights / weights.mean()).astype(np.float32)
    return found


def balanced_weights(
    labels: npt.NDArray[Any], weights: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.float32]:
    """What each row counts so that both labels have the same sum, float32 [n], in the mean 1.

    Without weights of their own, n / (2 * rows of its label), as scikit-learn's "balanced".

    Args:
        labels: [n], 0 or 1.
        weights: What the rows count otherwise, [n]; None: all the same.
    """
    own = np.ones(len(labels)) if weights is None else weights.astype(np.float64)
    soluble = labels > 0.5
    shares = np.where(soluble, own[soluble].sum(), own[~soluble].sum())
    balanced: npt.NDArray[np.float32] = (own * own.sum() / (2 * shares)).astype(np.float32)
    return balanced


def write_development(path: Path, content: bytes) -> None:
    """Publishes the file; one of that name and content stays as it is."""
    try:
        if not path.is_file() or path.read_bytes() != content:
            publish(path, content)
    except OSError as error:
        raise TunerError(
            f"{path}: the development file cannot be written ({error.strerror or error}); free "
            "the disk or name another folder in TUNER_ARTIFACTS"
        ) from error
