"""The synthetic data set: sequences whose best possible accuracy is known."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from tuner.data.rows import RESIDUES, Row, Source

SYNTHETIC_ROWS = 6_000
SYNTHETIC_SEED = 20_260_101
#: A run of this many residues out of these makes a generated protein insoluble.
SYNTHETIC_PATCH_LENGTH = 4
SYNTHETIC_PATCH_RESIDUES = "FILVWY"
#: Labels flipped at random, percent: what no model can predict.
SYNTHETIC_NOISE_PERCENT = 15
SYNTHETIC_BEST_ACCURACY = 1 - SYNTHETIC_NOISE_PERCENT / 100
#: Binary cross-entropy of the one who knows the rule and the noise, nats.
SYNTHETIC_BEST_LOSS = 0.4227

#: Lengths at every 5 % of the published data set's sequences, residues.
_LENGTH_QUANTILES = (
    *(19, 72, 87, 97, 104, 112, 118, 124, 131, 137, 143),
    *(148, 154, 159, 165, 170, 176, 181, 187, 193, 198),
)
#: Residues per 10,000 in UniProtKB/Swiss-Prot (release statistics), in the order of `RESIDUES`.
_COMPOSITION = (
    *(825, 553, 406, 546, 138, 393, 672, 707, 227, 591),
    *(965, 580, 241, 386, 474, 665, 536, 110, 292, 686),
)
_TILTS = (-20, 0, 20)  # percent more charged and fewer patch residues, a third of the rows each


def synthetic_sequences() -> tuple[list[str], list[int]]:
    """Sequences and labels (1 soluble) that look like proteins but follow a known rule.

    A sequence is insoluble if it has a run of `SYNTHETIC_PATCH_LENGTH` residues out of
    `SYNTHETIC_PATCH_RESIDUES`; then `SYNTHETIC_NOISE_PERCENT` % of the labels are flipped. Some
    sequences are rich in charged, some in patch residues, so composition tells a part of it.

    Only integers and the raw output of PCG64, which NumPy promises never to change (NEP 19), so
    that the rows are the same everywhere.
    """
    raw = np.random.PCG64(SYNTHETIC_SEED).random_raw

    def draw(below: int, count: int = SYNTHETIC_ROWS) -> npt.NDArray[np.int64]:
        return np.asarray(raw(count) % np.uint64(below), dtype=np.int64)

    quantiles = np.array(_LENGTH_QUANTILES)
    step = draw(len(quantiles) - 1)
    low, high = quantiles[step], quantiles[step + 1]
    lengths = low + draw(1_000) * (high - low + 1) // 1_000
    longest = max(_LENGTH_QUANTILES)
    inside = np.arange(longest) < lengths[:, np.newaxis]

    in_patch = np.array([residue in SYNTHETIC_PATCH_RESIDUES for residue in RESIDUES])
    charged = np.array([residue in "DEKR" for residue in RESIDUES])
    tilts = np.array(_TILTS)[draw(len(_TILTS))]
    draws = draw(2**40, SYNTHETIC_ROWS * longest).reshape(SYNTHETIC_ROWS, longest)
    residues = np.zeros_like(draws)
    for tilt in _TILTS:
        weights = np.array(_COMPOSITION) * (100 + tilt * charged - tilt * in_patch)
        limits = np.cumsum(weights)
        rows = tilts == tilt
        residues[rows] = np.searchsorted(limits, draws[rows] % limits[-1], side="right")
    residues[draw(3) < 2, 0] = RESIDUES.index("M")  # two of three start with it, as real ones do

    sticky = in_patch[residues] & inside
    windows = np.lib.stride_tricks.sliding_window_view(sticky, SYNTHETIC_PATCH_LENGTH, axis=1)
    soluble = ~np.any(np.all(windows, axis=2), axis=1)
    flipped = draw(100) < SYNTHETIC_NOISE_PERCENT
    letters = np.frombuffer(RESIDUES.encode(), dtype=np.uint8)[residues]
    sequences = [
        letters[row, :length].tobytes().decode() for row, length in enumerate(lengths.tolist())
    ]
    return sequences, (soluble ^ flipped).astype(int).tolist()


def synthetic_source() -> Source:
    """The rows of the synthetic data set."""
    sequences, labels = synthetic_sequences()
    content = "".join(f"{label},{each}\n" for each, label in zip(sequences, labels, strict=True))
    rows = tuple(
        Row(sequence=each, label=label, file="synthetic", line=None, place=f"row {number}")
        for number, (each, label) in enumerate(zip(sequences, labels, strict=True))
    )
    return Source(
        name="synthetic",
        synthetic=True,
        sha256=hashlib.sha256(content.encode()).hexdigest(),
        rows=rows,
        warnings=(),
    )
