"""The note that Optuna's dashboard shows with a study: attributes as optuna_dashboard names them.

The dashboard counts the versions of a note, and where somebody edits it, stores it in pieces and
shows all of them.
"""

from __future__ import annotations

import json

import sqlalchemy as sa

from tuner.storage.private_optuna import models
from tuner.storage.tables import lock_for_writing

MAX_NOTE_VERSION = 2**53  #: browsers count exactly up to here

_PREFIX = "dashboard:note_"
_VERSION, _PIECE = "dashboard:note_ver", "dashboard:note_str:"


def replace_note(connection: sa.Connection, study_id: int, markdown: str) -> None:
    """Replaces the note of a study, and counts one version more."""
    table = models.StudySystemAttributeModel.__table__
    lock_for_writing(connection)
    notes = (table.c.study_id == study_id) & table.c.key.startswith(_PREFIX)
    query = sa.select(table.c.key, table.c.value_json).where(notes)
    known = {row.key: row.value_json for row in connection.execute(query)}
    version = note_version(json.loads(known.get(_VERSION, "0"))) + 1
    values = {key: "" for key in known if key.startswith(_PIECE)}
    values |= {f"{_PIECE}0": markdown}
    for key, value in {**values, _VERSION: version}.items():
        row = (table.c.study_id == study_id) & (table.c.key == key)
        text = json.dumps(value)
        if key in known:
            connection.execute(table.update().where(row).values(value_json=text))
        else:
            connection.execute(table.insert().values(study_id=study_id, key=key, value_json=text))


def note_version(stored: object) -> int:
    """The version of a note; 0 of one that an earlier dashboard stored as something else."""
    try:
        version = int(stored)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError):
        return 0
    return version if 0 <= version < MAX_NOTE_VERSION else 0
