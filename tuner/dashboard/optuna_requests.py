"""The requests for Optuna's dashboard that are let through, and what each of them may carry.

Optuna's dashboard looks at the type of little that it is sent: a note whose text was a list was
stored, and no page of its study could be shown afterwards. So each route is declared here with
its path, its query and its body. A request reaches the dashboard only as far as it was declared,
and for a study, a trial and a file that there are; what else it brought along is left out.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import mimetypes
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import parse_qs, urlencode

from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tuner.artifacts import ARTIFACT_PREFIX, ARTIFACT_PREFIXES, StudyArtifacts, dashboard_folder
from tuner.dashboard.http import RequestError
from tuner.errors import counted
from tuner.search.attributes import RECORD_KEY
from tuner.storage.dashboard_note import MAX_NOTE_VERSION

if TYPE_CHECKING:
    from wsgiref.types import WSGIEnvironment

#: Notes are written in pieces of two kilobytes, and sent with every answer about the study: one
#: of 15 MB blocked the storage for 13 s.
MAX_NOTE_BYTES = 128 * 1024
MAX_UPLOADS = 200  #: files that people attach to a study and its trials
MAX_UPLOAD_BYTES = 256 * 1024 * 1024  #: of all of these files together
_MAX_CELLS = 1_000_000  #: of a plot of pairs: a contour needs about 20 bytes a cell
_MAX_SELECTED = 10_000  #: trials that are named for a CSV file

_ID = re.compile(r"0|[1-9][0-9]{0,17}")  #: what a database of ours takes for a number
_ARTIFACT = re.compile(r"[0-9a-fA-F]{1,12}(-[0-9a-fA-F]{1,12}){1,8}")
_MIMETYPE = re.compile(r"[\w.+-]+/[\w.+-]+", re.ASCII)

#: These draw every pair of parameters; the contour of 2,000 trials with 10 parameters was
#: answered with 4.46 GB after 107 s.
_PLOTS_OF_PAIRS = ("contour", "rank")
_PLOTS = (*_PLOTS_OF_PAIRS, "slice", "parallel_coordinate", "edf", "timeline", "pareto_front")


# --- bodies ---


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _Note(_Body):
    version: int = Field(ge=1, le=MAX_NOTE_VERSION)
    body: str


class _Upload(_Body):
    file: str  #: a data URI, base64
    filename: str = Field(default="", max_length=255)

    @field_validator("file")
    @classmethod
    def _is_a_file(cls, uri: str) -> str:
        head, comma, content = uri.partition(",")
        if not comma or not re.fullmatch(r"data:[^:]{0,200};base64", head):
            raise ValueError("send a data URI: data:text/plain;base64,...")
        try:
            base64.b64decode(content, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError("its content is not base64") from error
        return uri

    @field_validator("filename")
    @classmethod
    def _is_a_name(cls, name: str) -> str:
        if not name.isprintable():
            raise ValueError("a name is one line of printable letters")
        # A name such as data:text/x,y brings a type of its own along.
        try:
            kind, _ = mimetypes.guess_type(name)
        except ValueError as error:
            raise ValueError("a name without a scheme, such as report.pdf") from error
        if kind is not None and kind not in _known_types():
            raise ValueError("a name without a scheme, such as report.pdf")
        return name


def _known_types() -> set[str]:
    mimetypes.init()
    return {*mimetypes.types_map.values(), *mimetypes.common_types.values()}


# --- routes ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One route of Optuna's dashboard."""

    method: Literal["GET", "PUT", "POST", "DELETE"]
    path: re.Pattern[str]  #: its groups study, trial, artifact and plot are checked further
    query: str = ""  #: the one parameter that is passed on; "": none is
    body: type[BaseModel] | None = None  #: its type; None: what is sent is dropped
    max_bytes: int = 0  #: of the body; 0: the server's limit
    cache_seconds: float = 0.0  #: how long its answer is cached; 0: not at all


def _route(method: Literal["GET", "PUT", "POST", "DELETE"], path: str, **more: Any) -> Route:
    pattern = re.sub(r"<(\w+)>", r"(?P<\1>[^/]*)", path)
    return Route(method=method, path=re.compile(pattern, re.DOTALL), **more)


DELETE_STUDY = _route("DELETE", r"/api/studies/<study>")
#: What may be read, and what people may change: notes and files. Not here, and so refused:
#: creating and renaming studies (a renamed one is another study), changing trials and their
#: attributes (which only the coordinator does), and every route of a later version.
ROUTES = (
    _route("GET", r"/"),
    _route("GET", r"/dashboard(/.*)?"),
    _route("GET", r"/favicon\.ico"),
    _route("GET", r"/static/[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*"),
    _route("GET", r"/api/meta"),
    _route("GET", r"/api/studies", cache_seconds=2.0),
    _route("GET", r"/api/studies/<study>", query="after", cache_seconds=2.0),
    _route("GET", r"/api/studies/<study>/param_importances", cache_seconds=10.0),
    _route("GET", r"/api/studies/<study>/plot/<plot>", cache_seconds=10.0),
    _route("GET", r"/csv/<study>", query="trial_ids"),
    _route("GET", r"/artifacts/<study>/<artifact>"),
    _route("GET", r"/artifacts/<study>/<trial>/<artifact>"),
    _route("PUT", r"/api/studies/<study>/note", body=_Note, max_bytes=MAX_NOTE_BYTES),
    _route("PUT", r"/api/studies/<study>/<trial>/note", body=_Note, max_bytes=MAX_NOTE_BYTES),
    _route("POST", r"/api/artifacts/<study>", body=_Upload),
    _route("POST", r"/api/artifacts/<study>/<trial>", body=_Upload),
    _route("DELETE", r"/api/artifacts/<study>/<artifact>"),
    _route("DELETE", r"/api/artifacts/<study>/<trial>/<artifact>"),
    DELETE_STUDY,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedRequest:
    """A request that fits its route."""

    route: Route
    study: int | None = None  #: its id in the storage; None where the path names none
    query: str = ""  #: what is passed on of the query
    may_run_scripts: bool = False  #: it asks for a page that the tuner wrote itself


def find_route(method: str, path: str) -> tuple[Route, Mapping[str, str]] | None:
    """The route that a request is for, with the parts of its path; None where none is.

    Args:
        method: HEAD stands for GET.
        path: Without slashes at its end.
    """
    wanted = "GET" if method == "HEAD" else method
    for route in ROUTES:
        if route.method == wanted and (found := route.path.fullmatch(path)):
            return route, found.groupdict()
    return None


class Checks:
    """Checks requests for Optuna's dashboard over one storage."""

    def __init__(
        self, storage: BaseStorage, artifacts: Path, is_study: Callable[[int], bool]
    ) -> None:
        """Keeps what requests are checked against.

        Args:
            storage: Optuna's.
            artifacts: The folder of all artifacts.
            is_study: Whether there is a study with this id, now.
        """
        self._storage = storage
        self._artifacts = artifacts
        self._is_study = is_study

    def check(
        self, environ: WSGIEnvironment, route: Route, parts: Mapping[str, str]
    ) -> CheckedRequest:
        """Checks a request, and removes from it what its route does not declare.

        Raises:
            RequestError: Its study, trial or file does not exist, or it does not fit its route.
        """
        study = trial = None
        if "study" in parts:
            study = _number(parts["study"])
            if study is None or not self._is_study(study):
                raise RequestError("404 Not Found", "There is no such study (any more).")
        if "trial" in parts:
            assert study is not None
            trial = self._trial(study, parts["trial"])
        query = self._query(environ, route)
        environ["QUERY_STRING"] = query
        if "plot" in parts:
            assert study is not None
            self._check_plot(study, parts["plot"])
        is_ours = False
        if "artifact" in parts:
            assert study is not None
            is_ours = self._is_ours(study, trial, parts["artifact"])
        self._check_body(environ, route)
        if route.body is _Upload:
            assert study is not None
            self._check_room(study, int(environ["CONTENT_LENGTH"]))
        return CheckedRequest(route=route, study=study, query=query, may_run_scripts=is_ours)

    def _trial(self, study: int, text: str) -> FrozenTrial:
        number = _number(text)
        for trial in self._storage.get_all_trials(study, deepcopy=False):
            if trial._trial_id == number:
                return trial
        raise RequestError("404 Not Found", "The study has no such trial.")

    @staticmethod
    def _query(environ: WSGIEnvironment, route: Route) -> str:
        if not route.query:
            return ""
        given = parse_qs(str(environ.get("QUERY_STRING", "")), max_num_fields=100)
        values = given.get(route.query)
        if not values:
            return ""
        numbers = [_number(one.strip()) for one in values[0].split(",")]
        if None in numbers or len(numbers) > (_MAX_SELECTED if route.query == "trial_ids" else 1):
            raise RequestError("400 Bad Request", f"{route.query} has numbers from 0.")
        unique = ",".join(str(one) for one in dict.fromkeys(numbers))
        return urlencode({route.query: unique}, safe=",")

    def _check_plot(self, study: int, plot: str) -> None:
        if plot not in _PLOTS:
            raise RequestError("404 Not Found", f"The plots are {', '.join(_PLOTS)}.")
        if plot in _PLOTS_OF_PAIRS and is_too_large(self._storage, study):
            raise RequestError(
                "413 Content Too Large",
                f"The {plot} plot of this study would be too large to draw: it shows every "
                "pair of parameters. The other plots are there.",
            )
        if plot == "pareto_front" and len(self._storage.get_study_directions(study)) not in (2, 3):
            raise RequestError("404 Not Found", "A Pareto front needs two or three objectives.")

    def _is_ours(self, study: int, trial: FrozenTrial | None, artifact: str) -> bool:
        """Whether the tuner itself attached this file.

        Raises:
            RequestError: The file is not attached to the study, or to the trial.
        """
        attributes = self._storage.get_study_system_attrs(study)
        keys = [f"{ARTIFACT_PREFIX}{artifact}"]
        found = attributes.get(keys[0]) if trial is None else None
        if trial is not None:
            found = attributes.get(f"{ARTIFACT_PREFIXES[1]}{trial._trial_id}:{artifact}")
            found = found or trial.system_attrs.get(keys[0])
        described = _described(found)
        file = dashboard_folder(self._artifacts) / artifact
        if described is None or not _ARTIFACT.fullmatch(artifact) or not file.is_file():
            raise RequestError("404 Not Found", "No such file is attached there (any more).")
        record = self._storage.get_study_user_attrs(study).get(RECORD_KEY)
        if not isinstance(record, dict):
            return False
        folder = StudyArtifacts(self._artifacts / str(record.get("folder")))
        number = None if trial is None else trial.number
        return artifact == folder.identity(str(described.get("filename")), number)

    @staticmethod
    def _check_body(environ: WSGIEnvironment, route: Route) -> None:
        length = int(environ.get("CONTENT_LENGTH") or 0)
        content = b""
        if route.body is not None:
            if route.max_bytes and length > route.max_bytes:
                raise RequestError(
                    "413 Content Too Large",
                    f"A note has at most {route.max_bytes // 1024} KB; attach a file to the study "
                    "instead (Artifacts).",
                )
            kind = str(environ.get("CONTENT_TYPE", "")).partition(";")[0].strip().lower()
            if kind != "application/json":
                raise RequestError("400 Bad Request", "Send application/json.")
            try:
                parsed = route.body.model_validate_json(environ["wsgi.input"].read(length))
            except ValidationError as error:
                raise RequestError("400 Bad Request", _in_words(error)) from None
            content = parsed.model_dump_json().encode()
            environ["CONTENT_TYPE"] = "application/json"
        environ["wsgi.input"] = io.BytesIO(content)
        environ["CONTENT_LENGTH"] = str(len(content))

    def _check_room(self, study: int, length: int) -> None:
        files = self._uploads(study)
        taken = sum(path.stat().st_size for path in files if path.is_file())
        if len(files) >= MAX_UPLOADS or taken + length * 3 // 4 > MAX_UPLOAD_BYTES:
            raise RequestError(
                "413 Content Too Large",
                f"People may attach {counted(MAX_UPLOADS, 'file')} to a study and its trials, of "
                f"{MAX_UPLOAD_BYTES // 2**20} MB together. Remove one first.",
            )

    def _uploads(self, study: int) -> list[Path]:
        """The files attached to a study and its trials, without those of the tuner itself."""
        trials = self._storage.get_all_trials(study, deepcopy=False)
        record = self._storage.get_study_user_attrs(study).get(RECORD_KEY)
        name = str(record.get("folder")) if isinstance(record, dict) else ""
        ours = StudyArtifacts(self._artifacts / name)
        on_study = self._storage.get_study_system_attrs(study)
        found = []
        for number, attributes in (
            (None, on_study),
            *((trial.number, trial.system_attrs) for trial in trials),
        ):
            for key, value in attributes.items():
                if key.startswith(ARTIFACT_PREFIXES) and (described := _described(value)):
                    identity = key.rpartition(":")[2]
                    if identity != ours.identity(str(described.get("filename")), number):
                        found.append(dashboard_folder(self._artifacts) / Path(identity).name)
        return found


def _number(text: str) -> int | None:
    """A number in a path or a query; None if it is not one that a database's id can be."""
    return int(text) if _ID.fullmatch(text) else None


def _described(attribute: object) -> dict[str, Any] | None:
    """The description of a file, from the attribute that attaches it; None if it was removed."""
    try:
        found = json.loads(attribute) if isinstance(attribute, str) else None
    except ValueError:
        return None
    if not isinstance(found, dict) or not _MIMETYPE.fullmatch(str(found.get("mimetype"))):
        return None
    return found


def _in_words(error: ValidationError) -> str:
    said = []
    for one in error.errors(include_url=False, include_input=False)[:5]:
        place = ".".join(map(str, one["loc"]))
        said.append(f"{place}: {one['msg']}" if place else one["msg"])
    return "; ".join(said)


def is_too_large(storage: BaseStorage, study: int) -> bool:
    """Whether a plot of every pair of parameters would have too many cells."""
    try:
        trials = storage.get_all_trials(study, deepcopy=False, states=(TrialState.COMPLETE,))
    except KeyError:
        return False  # no such study: the dashboard says so
    parameters = {name for trial in trials for name in trial.params}
    return (len(parameters) * len(trials)) ** 2 > _MAX_CELLS
