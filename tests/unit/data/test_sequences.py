"""Files of sequences to predict, in whatever shape they come."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import numpy as np
import pytest

from tuner.data import sequences
from tuner.data.sequences import SeenIds, SequenceRecord, read_sequences
from tuner.errors import DataError


def records(content: bytes, **columns: str) -> list[SequenceRecord]:
    return list(read_sequences("stdin", io.BytesIO(content), **columns))


def told(content: bytes, **columns: str) -> list[tuple[str, str]]:
    return [(one.id, one.sequence) for one in records(content, **columns)]


TWO = [("a", "MKV"), ("b", "ACDE")]


@pytest.mark.parametrize(
    "content",
    [
        b">a\nMKV\n>b\nACDE\n",
        b">a\r\nMKV\r\n>b\r\nACDE\r\n",
        b">a\rMKV\r>b\rACDE\r",
        b">a\nMKV\n>b\nACDE",
        b"\n\n>a first protein\nM\nKV\n\n>b\nAC DE\n",
        b"\xef\xbb\xbf>a\nMKV\n>b\nACDE\n",
        b">a|x y\nMKV\n>b\nACDE\n".replace(b"|x", b""),
        b"; a comment of old programs\n>a\nMKV\n;another\n>b\nACDE\n"[28:],
        b";old\n#new\n\n>a\nM\n;old\nKV\n>b\n#new\nACDE\n",
        b"id,sequence\na,MKV\nb,ACDE\n",
        b"sequence,id\nMKV,a\nACDE,b\n",
        b"ID , Sequence \n a , MKV \nb,ACDE\n",
        b"id\tsequence\na\tMKV\nb\tACDE\n",
        b'id,note,sequence\na,"one, two",MKV\nb,"line\nbreak",ACDE\n',
        b"\n\nid,sequence\n\na,MKV\n,\nb,ACDE\n\n",
        b"name,sequence\na,MKV\nb,ACDE\n",
    ],
)
def test_two_records_in_every_shape(content: bytes, tmp_path: Path) -> None:
    assert told(content) == TWO
    assert told(gzip.compress(content)) == TWO
    (tmp_path / "a file").write_bytes(gzip.compress(content))
    found = list(read_sequences(tmp_path / "a file"))
    assert [(one.id, one.sequence) for one in found] == TWO


def test_a_table_without_ids_counts_its_records() -> None:
    assert told(b"sequence\nMKV\n\nACDE\n") == [("1", "MKV"), ("2", "ACDE")]


def test_a_cell_that_says_missing_has_no_sequence() -> None:
    content = b"id,sequence\nx,NA\nx, nan\nx,N/A\nx,None\n"
    assert {sequence for _, sequence in told(content)} == {""}
    assert told(b">a\nNA\n") == [("a", "NA")]


def test_a_column_of_the_training_is_found_behind_the_usual_one() -> None:
    for header, found in (("fasta,sequence", "ACDE"), ("fasta,note", "MKV")):
        content = io.BytesIO(f"{header}\nMKV,ACDE\n".encode())
        (record,) = read_sequences("stdin", content, usual_columns=("sequence", "FASTA"))
        assert record.sequence == found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b">a\n" + b"A" * 999, "stdin:1: the record 'a' has more than 99 letters"),
        (b">" + b"A" * 999, "stdin:1: the line has more than 99 letters"),
        (b">a\nM\n>b\n" + b"AAAAAAAAA\n" * 12, "stdin:3: the record 'b' has more than 99 letters"),
        (b'sequence\nM\n"' + b"A\n" * 99, "stdin:3: cannot be read as ','-separated text from"),
    ],
)
def test_a_record_that_would_take_all_memory_is_an_error(
    content: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequences, "LONGEST_RECORD", 100)
    for packed in (content, gzip.compress(content)):
        with pytest.raises(DataError) as caught:
            records(packed)
        assert message in str(caught.value)


def test_columns_are_named() -> None:
    content = b"sid,fasta,id\nx,MKV,1\n"
    assert told(content, sequence_column="FASTA") == [("1", "MKV")]
    assert told(content, sequence_column="fasta", id_column="sid") == [("x", "MKV")]


def test_each_record_knows_its_line() -> None:
    assert [one.line for one in records(b"\n>a\nMKV\nMKV\n>b\nA\n")] == [2, 5]
    assert [one.line for one in records(b'id,sequence\na,"M\nKV"\nb,A\n')] == [2, 4]


def test_ids_that_are_not_utf8_come_back_as_they_were() -> None:
    (record,) = records(b">caf\xe9\nMKV\n")
    assert record.id.encode("utf-8", "surrogateescape") == b"caf\xe9"


@pytest.mark.parametrize(
    ("content", "flags"),
    [
        (b">\nMKV\n", ("no_id",)),
        (b'id,note,sequence\na,"x,M\nb,y",A\n', ("several_lines:2_to_3",)),
        (b'id,note,sequence\na,"x,M\nb,z,M\nc,y",A\n', ("several_lines:2_to_4",)),
        (b'id,sequence\na,"M\nKV"\n', ("several_lines:2_to_3", "spaces_removed")),
        (b'id\tnote\tsequence\na\t"one\ntwo"\tM\n', ("several_lines:2_to_3",)),
        (b'sequence,note,id\nM,"x,1\nMK,y",3\n', ("several_lines:2_to_3",)),
        (b'sequence,note,id\nM,"in cells, of yeast\nand of mice, too",3\n', ()),
        (b'id,note,sequence\na,"one, two\nthree",M\n', ()),
        (b'id,note,sequence\na,"one\ntwo, three\n",M\n', ()),
        (b">a\nMK V\nLL\n", ("spaces_removed",)),
        (b"id,sequence\na, M KV \n", ("spaces_removed",)),
        (b"id,sequence\na, MKV \n", ()),
        (b"id,sequence\na, NaN \n", ()),
        (b"id,sequence\n,MKV\n", ("no_id",)),
        (b"id,sequence\na\n", ("wrong_number_of_fields",)),
        (b"id,sequence\na,MKV,1\n", ("wrong_number_of_fields",)),
        (b">a\n\n", ()),
    ],
)
def test_what_is_wrong_with_a_record_is_a_flag(content: bytes, flags: tuple[str, ...]) -> None:
    (record,) = records(content)
    assert record.flags == flags


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no records"),
        (b"\n \n", "holds no records"),
        (b"MKV\nACDE\n", "no column 'sequence' among mkv; name it with --sequence-column"),
        (b"id;sequence\na;MKV\n", "is separated by ';'"),
        (b"sequence,sequence\nA,M\n", "2 columns are called 'sequence'"),
        ("id,sequence\na,MKV\n".encode("utf-16"), "is not UTF-8 text but UTF-16"),
        (b"id|sequence\na|MKV\n", "is separated by '|'"),
        (b"PK\x03\x04" + b"\0" * 26 + b"positives.npy", "is an npz file, not text"),
        (b"MKV\0\0", "is not text"),
        (gzip.compress(b">a\nMKV\n" * 9, mtime=0)[:-9], "is damaged or was cut"),
        (b"\x1f\x8bnothing", "is damaged or was cut"),
        (b'id,sequence\na,"MKV\nb,A\n', "from here to line 3 (unexpected end of data); check the"),
        (b'id,sequence\nx,A\na,"M"KV\n', "stdin:3: cannot be read as ','-separated text"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_of(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=r"^stdin.*") as caught:
        records(content)
    assert message in str(caught.value)


def test_a_missing_file_and_a_folder_are_told_of(tmp_path: Path) -> None:
    for place in (tmp_path / "none.fasta", tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            list(read_sequences(place))


def test_a_long_file_is_read_as_it_is_asked_for() -> None:
    """Constant memory: no more is read than a buffer ahead of what was asked for."""

    class Endless(io.RawIOBase):
        given = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: memoryview) -> int:
            line = b">a\nMKV\n"
            count = len(buffer) // len(line) * len(line)
            buffer[:count] = line * (count // len(line))
            self.given += count
            return count

    stream = Endless()
    found = read_sequences("stdin", stream)
    for _ in range(10_000):
        assert next(found).sequence == "MKV"
    assert stream.given < 10_000 * 7 + 200_000


# --- ids ---


def test_ids_are_remembered_over_all_calls() -> None:
    seen = SeenIds()
    assert seen.add(["a", "b", "a"]).tolist() == [False, False, True]
    assert seen.add([]).tolist() == []
    assert seen.add(["c", "b", "c", "d"]).tolist() == [False, True, True, False]


def test_many_calls_find_what_one_would() -> None:
    generator = np.random.default_rng(0)
    ids = [str(one) for one in generator.integers(0, 3_000, 5_000)]
    seen, found = SeenIds(), []
    start = 0
    while start < len(ids):
        size = int(generator.integers(1, 200))
        found += seen.add(ids[start : start + size]).tolist()
        start += size
    before: set[str] = set()
    for one, repeated in zip(ids, found, strict=True):
        assert repeated == (one in before)
        before.add(one)
