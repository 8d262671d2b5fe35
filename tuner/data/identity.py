"""What data a study was made from, and how it was split."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuner.spec.spec import DataSettings
from tuner.data.homology import Clusters
from tuner.data.rows import Source
from tuner.data.split import Split


@dataclass(frozen=True, slots=True, kw_only=True)
class DataIdentity:
    """What a study was trained on: enough to tell whether two studies can be compared."""

    source: str  #: "solubility", "synthetic", or the file name(s) as the study file gives them
    synthetic: bool  #: the rows were generated (`synthetic_sequences`), not measured
    sha256: str  #: of the source's bytes; of both digests (FASTA pair); of the rows (synthetic)
    split_id: str  #: sha256 of the sorted sequence hashes of the test rows
    split_seed: int
    max_length: int  #: residues; the width of the token arrays
    training_rows: int  #: with folds, of a network in the mean over the folds
    validation_rows: int  #: rows that choose hyperparameters; with folds, likewise
    test_rows: int  #: rows that are sealed until the report
    folds: int | None = None  #: of cross-validation
    clusters: int | None = None  #: of similar sequences, of rule "homology"
    mmseqs: str | None = None  #: the version of MMseqs2 that found them

    @property
    def rows(self) -> int:
        """Of all three splits."""
        return self.training_rows + self.validation_rows + self.test_rows

    def to_document(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def check_document(self) -> dict[str, Any]:
        """The same for whoever checks a study file: `tuner check --json` and the dashboard."""
        others = {"folds": self.folds, "clusters": self.clusters}
        return {
            **{key: value for key, value in others.items() if value is not None},
            "source": self.source,
            "synthetic": self.synthetic,
            "sha256": self.sha256,
            "split_id": self.split_id,
            "rows": {
                "train": self.training_rows,
                "validation": self.validation_rows,
                "test": self.test_rows,
            },
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> DataIdentity:
        """The identity that `to_document` wrote."""
        return cls(**document)


def identity_of(
    source: Source, split: Split, settings: DataSettings, clusters: Clusters | None = None
) -> DataIdentity:
    """The identity of rows and their split."""
    # Without the seed, so that it names the set of test sequences, however they were chosen.
    hashes = sorted(hashlib.sha256(row.sequence.encode()).hexdigest() for row in split.test)
    folds = None if split.folds is None else len(set(split.folds))
    development = len(split.training) + len(split.validation)
    validation = len(split.validation) if folds is None else round(development / folds)
    return DataIdentity(
        source=source.name,
        synthetic=source.synthetic,
        sha256=source.sha256,
        split_id=hashlib.sha256("\n".join(hashes).encode()).hexdigest(),
        split_seed=settings.split.seed,
        max_length=settings.max_length,
        training_rows=development - validation,
        validation_rows=validation,
        test_rows=len(split.test),
        folds=folds,
        clusters=None if clusters is None else clusters.count,
        mmseqs=None if clusters is None else clusters.version,
    )
