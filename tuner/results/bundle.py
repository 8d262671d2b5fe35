"""Bundles: trained networks with all that is needed to use, judge and train them again.

A bundle is a folder, or a zip file of the same files:

    model.keras    tokens -> probability; plain Keras loads it, without tuner
    bundle.json    what it is
    README.md      the model card
    trial-N.toml   a study file for each network, which trains it again
    model.onnx     if asked for
    SHA256SUMS     of all the others, as `sha256sum -c` reads it

Reading one verifies the checksums first. No class or function that a file names is ever looked up:
the networks are built from the study files, and of `model.keras` the arrays of weights are read.

Why: `docs/decisions.md#why-does-a-reader-of-a-bundle-not-load-modelkeras-as-keras-does`.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tuner.data.rows import alphabet_of, encode
from tuner.errors import BundleError, SpecError, reason_of
from tuner.spec.architecture import ModelConfig
from tuner.spec.reader import spec_from_document

if TYPE_CHECKING:
    from tuner.network.combined import Predictor
    from tuner.spec.spec import Truncate, Unknown

#: Of the bundles that this version writes. Format 1 has no `unknown` (an error) and no `truncate`.
FORMAT = 2
MODEL_FILE, ONNX_FILE = "model.keras", "model.onnx"
DESCRIPTION_FILE, CARD_FILE, SUMS_FILE = "bundle.json", "README.md", "SHA256SUMS"
#: How far a probability may be from that of the version that wrote the bundle.
_PROBE_TOLERANCE = 1e-3
_MOST_BYTES = 2**31  #: of one file in a bundle; more is not one of ours


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One network of a bundle."""

    trial: int  #: its number in the study
    share: float  #: of the mean probability, 0..1
    config: ModelConfig
    study_file: str  #: the name of the file in the bundle that trains it again


class Bundle:
    """A bundle that was read: predicts from sequences.

    Attributes:
        description: What `bundle.json` holds.
        members: The networks, the largest share first.
        max_length: Residues of the longest sequence that the networks take.
        min_length: Residues of the shortest sequence that they were trained on.
        threshold: A higher probability counts as soluble, 0..1.
        unknown: What becomes of letters that are not residues: "error", or "mask".
        truncate: Where longer sequences are cut: "end", "start", "middle"; None if they were an
            error in training.
        sequence_column: Of the table that the networks were trained on.
    """

    def __init__(
        self, description: Mapping[str, Any], members: Sequence[Member], predictor: Predictor
    ) -> None:
        """Takes what `read_bundle` or `bundle_of_study` made."""
        self.description = description
        self.members = tuple(members)
        self.max_length = int(description["max_length"])
        self.min_length = int(description["min_length"])
        self.threshold = float(description["threshold"])
        self.unknown: Unknown = description.get("unknown", "error")
        self.truncate: Truncate | None = description.get("truncate")
        self.sequence_column = str(description.get("sequence_column", "sequence"))
        self._predictor = predictor

    @property
    def name(self) -> str:
        """The study's name."""
        return str(self.description["study"])

    @property
    def synthetic(self) -> bool:
        """Trained on generated sequences: its predictions say nothing about proteins."""
        return bool(self.description["synthetic"])

    def predict(self, sequences: Sequence[str]) -> npt.NDArray[np.float64]:
        """The probability of each sequence of being soluble, float64 [n], 0..1.

        Args:
            sequences: One-letter residues, 1 to `max_length` each; lower case is upper case. With
                unknown = "mask", X B Z J U O and ? are left out.

        Raises:
            ValueError: A sequence is empty, too long, or holds something that is not a residue.
        """
        if not all(sequences):
            raise ValueError("an empty sequence has no prediction")
        mean, _ = self.predict_tokens(self.encode(sequences))
        return mean

    def encode(self, sequences: Sequence[str]) -> npt.NDArray[np.uint8]:
        """Tokens of sequences, uint8 [n, max_length]; raises as `predict` does."""
        return encode(sequences, self.max_length, self.unknown)

    def predict_tokens(
        self, tokens: npt.NDArray[np.uint8]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64] | None]:
        """The same of tokens, uint8 [n, max_length].

        Returns:
            The probabilities, float64 [n], and their standard deviations over the networks,
            float64 [n]; None for the latter if there is one network.
        """
        each = self._predictor(tokens).astype(np.float64)
        shares = self._predictor.shares.astype(np.float64)
        mean: npt.NDArray[np.float64] = each @ shares
        if len(shares) == 1:
            return mean, None
        return mean, np.sqrt(np.maximum(((each - mean[:, np.newaxis]) ** 2) @ shares, 0))


def read_bundle(path: Path) -> Bundle:
    """Reads a bundle, and verifies it.

    Args:
        path: The folder, or the zip file.

    Raises:
        BundleError: It is not a bundle, damaged, of a later version, or predicts otherwise here.
        SetupError: TensorFlow is missing.
    """
    return bundle_from(_read_files(path), path)


def bundle_from(contents: Mapping[str, bytes], path: Path) -> Bundle:
    """The same of the files of a bundle, by name; `path` is what messages call it."""
    _verify_sums(path, contents)
    description = _read_description(path, contents)
    members = [_member(path, contents, network) for network in description["networks"]]
    from tuner.network import combined  # noqa: PLC0415 - TensorFlow takes seconds to import

    configs = [member.config for member in members]
    max_length, unknown = int(description["max_length"]), description.get("unknown") == "mask"
    try:
        model = combined.model_from_keras_file(
            contents[MODEL_FILE], configs, max_length, unknown=unknown
        )
    except (ValueError, OSError, KeyError) as error:
        raise BundleError(
            f"{path}: {MODEL_FILE} does not have the weights of the networks that it is to hold "
            f"({reason_of(error)}). Export the bundle again."
        ) from error
    predictor = combined.Predictor(model, configs, max_length, unknown=unknown)
    bundle = Bundle(description, members, predictor)
    probe = description["probe"]
    found, _ = bundle.predict_tokens(bundle.encode(probe["sequences"]))
    if not np.allclose(found, probe["probabilities"], rtol=0, atol=_PROBE_TOLERANCE):
        written_with = versions_in_words(description["versions"]["written_with"])
        raise BundleError(
            f"{path}: this version of tuner does not predict what the bundle says of its own "
            f"example sequences ({found[0]:.4f} instead of {probe['probabilities'][0]:.4f}). It "
            f"was written with {written_with}: use these versions, or export the bundle again."
        )
    return bundle


def versions_in_words(found: Mapping[str, str]) -> str:
    """The versions that a prediction depends on most."""
    wanted = ("tuner", "keras", "tensorflow")
    return ", ".join(f"{name} {found[name]}" for name in wanted if name in found)


def _read_files(path: Path) -> dict[str, bytes]:
    try:
        if path.is_dir():
            return {
                one.name: one.read_bytes()
                for one in sorted(path.iterdir())
                if one.is_file() and one.stat().st_size <= _MOST_BYTES
            }
        with zipfile.ZipFile(path) as archive:
            return {
                one.filename: archive.read(one)
                for one in archive.infolist()
                if not one.is_dir() and one.file_size <= _MOST_BYTES
            }
    except FileNotFoundError:
        raise BundleError(f"{path}: there is no such bundle or study.") from None
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError) as error:
        raise BundleError(
            f"{path} cannot be read as a bundle ({reason_of(error)}); it is the folder, or the "
            "zip file, that `tuner export NAME --model` writes."
        ) from error


def _verify_sums(path: Path, contents: Mapping[str, bytes]) -> None:
    if SUMS_FILE not in contents or DESCRIPTION_FILE not in contents:
        raise BundleError(
            f"{path} is not a bundle: {SUMS_FILE} or {DESCRIPTION_FILE} is missing. "
            "`tuner export NAME --model` writes one."
        )
    listed = dict(_sums(path, contents[SUMS_FILE]))
    for name, expected in listed.items():
        if name not in contents:
            raise BundleError(f"{path}: {name} is missing. Copy the whole bundle again.")
        if hashlib.sha256(contents[name]).hexdigest() != expected:
            raise BundleError(
                f"{path}: {name} was changed or damaged since the bundle was written (its "
                f"checksum is not the one in {SUMS_FILE}). Copy or export the bundle again."
            )
    if missing := {MODEL_FILE, DESCRIPTION_FILE} - listed.keys():
        raise BundleError(f"{path}: {SUMS_FILE} does not list {', '.join(sorted(missing))}.")


def _sums(path: Path, content: bytes) -> Iterator[tuple[str, str]]:
    for line in content.decode("utf-8", "replace").splitlines():
        digest, _, name = line.partition("  ")
        if len(digest) != hashlib.sha256().digest_size * 2 or not name:
            raise BundleError(f"{path}: {SUMS_FILE} has a line that is not a checksum: {line[:80]}")
        yield name, digest


def _read_description(path: Path, contents: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        description = json.loads(contents[DESCRIPTION_FILE])
        its_format = int(description["format"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(f"{path}: {DESCRIPTION_FILE} is damaged ({reason_of(error)}).") from error
    if its_format > FORMAT:
        raise BundleError(
            f"{path} is a bundle of format {its_format}, and this version of tuner reads up to "
            f"{FORMAT}: upgrade tuner, or use model.keras with plain Keras, as {CARD_FILE} says."
        )
    if description.get("alphabet") != alphabet_of(description.get("unknown", "error")):
        raise BundleError(
            f"{path}: its alphabet is {description.get('alphabet')!r}, and this version of tuner "
            f"writes residues as {alphabet_of(description.get('unknown', 'error'))!r}."
        )
    return dict(description)


def _member(path: Path, contents: Mapping[str, bytes], network: Mapping[str, Any]) -> Member:
    name = network["study_file"]
    try:
        document = tomllib.loads(contents[name].decode())
        config = spec_from_document(document).space.resolve({})
    except (KeyError, ValueError, SpecError) as error:
        raise BundleError(
            f"{path}: {name}, the study file of trial {network['trial']}, cannot be read "
            f"({reason_of(error)})."
        ) from error
    return Member(
        trial=int(network["trial"]),
        share=float(network["share"]),
        config=config,
        study_file=name,
    )
