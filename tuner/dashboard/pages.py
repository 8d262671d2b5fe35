"""The tuner's own pages, /tuner: launch, stop, resume and export studies; the same as JSON.

They stand behind the guard (`guard`), which has looked at the host, the origin, the session and
the role of every request before, and records every change. None of them opens the test split.
"""

from __future__ import annotations

import io
import json
import threading
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args
from urllib.parse import quote

import jinja2
import tomli_w
from werkzeug.exceptions import BadRequest, HTTPException
from werkzeug.routing import Map, Rule
from werkzeug.utils import send_file
from werkzeug.wrappers import Request, Response

from tuner.artifacts import DEFAULT_ROOT, DEFAULT_STUDIES_FOLDER
from tuner.coordination import queue as orders
from tuner.dashboard.policy import Policy, Refusals
from tuner.dashboard.sessions import Sessions, Visitor
from tuner.dashboard.users import MAX_PASSWORD, LoginsBusyError
from tuner.errors import DataError, Problem, SpecError, StorageError, TunerError, counted
from tuner.every import Every
from tuner.results.export import Format, best_configs, render
from tuner.search import overlap
from tuner.search.attributes import RECORD_KEY
from tuner.search.status import StudyStatus, status
from tuner.search.study import delete, find_name, list_names, load
from tuner.search.tuned_study import TunedStudy
from tuner.spec.bounds import parameter_counts
from tuner.spec.spec import StudySpec
from tuner.storage.storage import LOG_IN, Storage

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

ROOT = "/tuner"
LOGIN = f"{ROOT}/login"
#: Nobody is logged in yet where these are asked for.
PUBLIC = frozenset((LOGIN, f"{ROOT}/api/login"))
LOGOUTS = frozenset((f"{ROOT}/logout", f"{ROOT}/api/logout"))

VISITOR_KEY = "tuner.visitor"  #: in the WSGI environment: who asks
DETAIL_KEY = "tuner.detail"  #: in the WSGI environment: what was changed, for the record

#: The pages run one small script of ours and nothing else.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
#: A report brings its scripts along, so it runs in an origin of its own: no cookie, no request.
REPORT_POLICY = (
    "sandbox allow-scripts allow-downloads; default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data: blob:; font-src data:; frame-ancestors 'none'"
)

MAX_TOP = 100  #: configurations in one export
_FRESH_SECONDS = 2.0  #: so long a status is shown again; many browsers ask for it at once
_TEMPLATES = files("tuner.dashboard") / "templates"
_STATIC = {"pages.css": "text/css", "dashboard.css": "text/css", "pages.js": "text/javascript"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """The folders that the pages read."""

    artifacts: Path = DEFAULT_ROOT
    studies: Path = DEFAULT_STUDIES_FOLDER  #: its study files may be launched
    data: Path | None = None  #: uploaded study files may name the data files in it


def is_ours(path: str) -> bool:
    """Whether a path is one of these pages and none of Optuna's."""
    return path == ROOT or path.startswith(f"{ROOT}/")


class Catalogue:
    """The studies and where they stand, read at most every two seconds however many ask."""

    def __init__(self, storage: Storage, artifacts: Path) -> None:
        self._storage = storage
        self._artifacts = artifacts
        self._lock = threading.Lock()
        self._pause = Every(_FRESH_SECONDS)  # between two looks at the storage
        self._open: dict[str, TunedStudy] = {}
        self._states: tuple[StudyStatus, ...] = ()

    def states(self) -> tuple[StudyStatus, ...]:
        """Every study of the tuner, by name."""
        with self._lock:
            if self._pause.is_due():
                self._pause.end_pause()  # where reading fails, the next one tries again
                self._states = tuple(self._read())
                self._pause.begin_pause()
            return self._states

    def state(self, name: str) -> StudyStatus | None:
        return next((one for one in self.states() if one.study == name), None)

    def forget(self) -> None:
        """Something was changed: the next look sees it."""
        with self._lock:
            self._pause.end_pause()

    def _read(self) -> Iterable[StudyStatus]:
        ids = {one.study_name: one._study_id for one in self._storage.optuna.get_all_studies()}
        names = list_names(self._storage)
        self._open = {name: tuned for name, tuned in self._open.items() if name in names}
        for name in names:
            tuned = self._open.get(name)
            # A pruner knows the brackets that it has computed: an opened study is kept open.
            if tuned is None or not self._is_the_same(tuned, ids.get(name)):
                try:
                    tuned = load(self._storage, name, artifacts_root=self._artifacts)
                except TunerError:  # deleted a moment ago, or stored by a later version
                    continue
                self._open[name] = tuned
            try:
                yield status(tuned)
            except KeyError:  # deleted a moment ago
                continue

    def _is_the_same(self, tuned: TunedStudy, study_id: int | None) -> bool:
        if tuned.id != study_id:
            return False
        record = self._storage.optuna.get_study_user_attrs(tuned.id).get(RECORD_KEY, {})
        return bool(record.get("folder") == tuned.key)


class _LoginRefused(Exception):  # noqa: N818 - an answer, not an error
    def __init__(self, code: int, said: str, wait: float = 0.0) -> None:
        super().__init__(said)
        self.code, self.said = code, said
        self.headers = {"Retry-After": f"{wait:.0f}"} if wait else {}


class Pages:
    """The WSGI application under /tuner."""

    def __init__(
        self,
        storage: Storage,
        policy: Policy,
        sessions: Sessions | None,
        places: Places,
        refusals: Refusals,
    ) -> None:
        self._storage = storage
        self._policy = policy
        self._sessions = sessions
        self._refusals = refusals
        self._places = places
        self._catalogue = Catalogue(storage, places.artifacts)
        self._templates = jinja2.Environment(
            loader=jinja2.FunctionLoader(_source),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters["segment"] = lambda name: quote(name, safe="")
        self._templates.filters["counted"] = counted
        self._templates.filters["zip"] = zip
        self._routes = Map(
            [
                _rule("/", self._show_studies),
                _rule("/login", self._show_login),
                _rule("/login", self._log_in, "POST"),
                _rule("/logout", self._log_out, "POST"),
                _rule("/launch", self._show_launch),
                _rule("/launch", self._launch, "POST"),
                _rule("/log", self._show_log),
                _rule("/studies/<name>", self._show_study),
                _rule("/studies/<name>/stop", self._stop, "POST"),
                _rule("/studies/<name>/resume", self._resume, "POST"),
                _rule("/studies/<name>/delete", self._delete, "POST"),
                _rule("/studies/<name>/export", self._export),
                _rule("/studies/<name>/report", self._report),
                _rule("/static/<file>", self._static),
                _rule("/api/login", self._log_in_api, "POST"),
                _rule("/api/logout", self._log_out_api, "POST"),
                _rule("/api/me", self._me),
                _rule("/api/files", self._files_api),
                _rule("/api/check", self._check_api, "POST"),
                _rule("/api/log", self._log_api),
                _rule("/api/studies", self._studies_api),
                _rule("/api/studies", self._launch_api, "POST"),
                _rule("/api/studies/<name>", self._study_api),
                _rule("/api/studies/<name>", self._delete_api, "DELETE"),
                _rule("/api/studies/<name>/stop", self._stop_api, "POST"),
                _rule("/api/studies/<name>/resume", self._resume_api, "POST"),
                _rule("/api/studies/<name>/export", self._export_api),
            ],
            strict_slashes=False,
            merge_slashes=False,
            redirect_defaults=False,
        )

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        request = Request(environ)
        request.max_content_length = 4 * orders.MAX_UPLOAD_BYTES
        try:
            response = self._response(request)
        finally:
            request.close()  # and the files that were uploaded with it
        if request.method not in ("GET", "HEAD"):
            self._catalogue.forget()
        return response(environ, start_response)

    def _response(self, request: Request) -> Response:
        is_api = request.path.startswith(f"{ROOT}/api/")
        try:
            return self._dispatch(request)
        except HTTPException as error:
            code = error.code or 500
            reason = error.description or error.name
            if is_api:
                return _json({"reason": reason}, code)
            return self._message(request, error.name, reason, code)
        except (SpecError, DataError) as error:
            return self._problems(request, error, is_api=is_api)
        except StorageError:
            raise
        except TunerError as error:
            if is_api:
                return _json({"reason": str(error)}, 409)
            return self._message(request, "That cannot be done", str(error), 409)

    def _dispatch(self, request: Request) -> Response:
        path = request.path.removeprefix(ROOT) or "/"
        adapter = self._routes.bind("tuner", path_info=path)
        rule, values = adapter.match(method=request.method, return_rule=True)
        view: Callable[..., Response] = rule.endpoint
        return view(request, **values)

    # --- pages ---

    def _show_studies(self, request: Request) -> Response:
        return self._page(request, "studies", states=self._catalogue.states())

    def _seal_in_words(self, tuned: TunedStudy, state: StudyStatus) -> str:
        """Whether the study's test split was opened, and by whom."""
        if state.state == "reported":
            return "opened for the report"
        opened = [
            entry
            for entry in self._storage.ledger()
            if entry.split_id == tuned.record.data.split_id and entry.study_key != tuned.key
        ]
        if not opened:
            return "sealed"
        names = ", ".join(dict.fromkeys(entry.study for entry in opened))
        numbers = ", ".join(str(entry.id) for entry in opened)
        return f"opened before, for a report of {names}: ledger {numbers}"

    def _show_study(self, request: Request, name: str, **more: Any) -> Response:
        tuned = self._load(name)
        state = status(tuned)
        data = tuned.record.data
        seal = self._seal_in_words(tuned, state)
        facts = (
            ("Made", f"{tuned.record.created_at[:19].replace('T', ' ')} UTC"),
            ("Data", f"{data.source}, sha256 {data.sha256[:12]}"),
            (
                "Split",
                (
                    f"seed {data.split_seed}, identity {data.split_id[:12]}: "
                    f"{data.training_rows:,} training, {data.validation_rows:,} validation, "
                    f"{data.test_rows:,} test rows ({seal})"
                ),
            ),
            ("Study file", tuned.record.spec_hash[:12]),
            ("Epochs", f"{state.epochs_spent:,} spent, {state.epochs_saved:,} saved by pruning"),
            ("On disk", f"{state.bytes_on_disk / 1e6:.1f} MB"),
        )
        return self._page(
            request,
            "study",
            one=state,
            facts=facts,
            ranked=[
                (trial.number, trial.value, trial.last_step or 0) for trial in tuned.ranked()[:10]
            ],
            study_id=tuned.id,
            report_command=tuned.command("report", tuned.name),
            has_report=self._report_file(tuned).is_file(),
            spec=tomli_w.dumps(tuned.record.spec.to_document()),
            **{"said": "", **more},
        )

    def _show_launch(self, request: Request) -> Response:
        _editors_only(request, "launch studies")
        return self._launch_page(request)

    def _launch_page(self, request: Request, code: int = 200, /, **more: Any) -> Response:
        given = {"file": "", "name": "", "trials": "", "problems": (), "said": ""}
        none = {"check": None, "existing": None}
        return self._page(
            request,
            "launch",
            code=code,
            files=orders.study_files(self._places.studies),
            folder=self._places.studies.name or str(self._places.studies),
            data_folder=self._places.data is not None,
            kilobytes=orders.MAX_UPLOAD_BYTES // 1024,
            **(given | none | more),
        )

    def _launch(self, request: Request) -> Response:
        form = request.form
        kept = {key: form.get(key, "") for key in ("file", "name", "trials")}
        try:
            overrides = orders.overrides_for(
                kept["name"].strip() or None, _trials(kept["trials"].strip())
            )
            upload = request.files.get("upload")
            if upload is not None and upload.filename:
                # One byte more than allowed, so that what is too long is seen to be.
                content = upload.stream.read(orders.MAX_UPLOAD_BYTES + 1)
                spec = self._uploaded(content, upload.filename, overrides)
            else:
                spec = orders.spec_of_a_file(self._places.studies, kept["file"], overrides)
            if form.get("action") == "check":
                found = find_name(spec.name, list_names(self._storage))
                existing = None if found is None else status(self._load(found))
                check = self._check(request, spec) | {"split_seed": spec.data.split.seed}
                return self._launch_page(request, check=check, existing=existing, **kept)
            placed = self._place(request, spec)
        except (SpecError, DataError) as error:
            request.environ[DETAIL_KEY] = _refusal(error)
            problems = [_of_the_form(problem) for problem in error.problems]
            return self._launch_page(request, 422, problems=problems, **kept)
        except StorageError:
            raise
        except TunerError as error:
            request.environ[DETAIL_KEY] = f"refused: {error}"
            return self._launch_page(request, 409, said=str(error), **kept)
        if placed.shared:  # to be read now: a redirection would lose it
            return self._show_study(request, placed.queued.study, said=" ".join(placed.shared))
        return _redirect(f"{ROOT}/studies/{quote(placed.queued.study, safe='')}")

    def _show_log(self, request: Request) -> Response:
        _editors_only(request, "see who changed what")
        return self._page(request, "log", changes=self._storage.changes(last=200))

    def _stop(self, request: Request, name: str) -> Response:
        return self._done(request, name, self._stop_it(request, name).in_words)

    def _resume(self, request: Request, name: str) -> Response:
        return self._done(request, name, self._resume_it(request, name).in_words)

    def _done(self, request: Request, name: str, said: str) -> Response:
        request.environ[DETAIL_KEY] = said
        return _redirect(f"{ROOT}/studies/{quote(name, safe='')}")

    def _delete(self, request: Request, name: str) -> Response:
        if find_name(request.form.get("confirm", ""), [name]) is None:
            raise BadRequest(f"To delete the study, write its name, {name}, into the field.")
        self._delete_it(request, name)
        return _redirect(ROOT)

    def _export(self, request: Request, name: str) -> Response:
        top, form = _top(request), _format(request)
        tuned = self._load(name)
        configs = best_configs(tuned, top)
        written = {
            f"{tuned.name}-{one.rank}-trial-{one.trial}.{form}": render(one, form).encode()
            for one in configs
        }
        if len(written) == 1:
            ((file, content),) = written.items()
            return _download(request, content, file, f"application/{form}")
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for file, content in written.items():
                archive.writestr(file, content)
        return _download(
            request, packed.getvalue(), f"{tuned.name}-best-{len(written)}.zip", "application/zip"
        )

    def _report(self, request: Request, name: str) -> Response:
        tuned = self._load(name)
        try:
            content = self._report_file(tuned).read_bytes()
        except FileNotFoundError:
            return self._message(
                request,
                "No report here",
                f"`{tuned.command('report', tuned.name)}` writes the final report of a finished "
                "study. It opens the test split, once, so there is no button for it.",
                404,
            )
        response = Response(content, content_type="text/html; charset=utf-8")
        response.headers["Content-Security-Policy"] = REPORT_POLICY
        return response

    def _static(self, request: Request, file: str) -> Response:
        if file not in _STATIC:
            raise _not_found()
        response = Response(
            (_TEMPLATES / file).read_bytes(),
            content_type=_STATIC[file],
        )
        response.headers["Cache-Control"] = "no-cache"
        response.add_etag()
        return response.make_conditional(request)

    # --- login ---

    def _show_login(self, request: Request) -> Response:
        return self._login_page(request, request.args.get("next", ""))

    def _login_page(
        self, request: Request, there: str, *, code: int = 200, said: str = "", name: str = ""
    ) -> Response:
        return self._page(
            request, "login", code=code, there=_local(there), said=said, name=name[:64]
        )

    def _log_in(self, request: Request) -> Response:
        form = request.form
        name, there = form.get("name", ""), form.get("next", "")
        try:
            token = self._begin_session(request, name, form.get("password", ""))
        except _LoginRefused as refused:
            response = self._login_page(
                request, there, code=refused.code, said=refused.said, name=name
            )
            response.headers.extend(refused.headers)
            return response
        return self._with_cookie(request, _redirect(_local(there)), token)

    def _log_in_api(self, request: Request) -> Response:
        document = _document(request)
        name, password = document.get("name"), document.get("password")
        if not isinstance(name, str) or not isinstance(password, str):
            raise BadRequest('Send {"name": "...", "password": "..."}.')
        try:
            (name + password).encode()
        except UnicodeEncodeError:  # nothing hashes it, and no database takes it
            raise BadRequest("name or password holds half of a surrogate pair.") from None
        try:
            token = self._begin_session(request, name, password)
        except _LoginRefused as refused:
            response = _json({"reason": refused.said}, refused.code)
            response.headers.extend(refused.headers)
            return response
        users = self._policy.users
        role = None if users is None else users.role(name)
        return self._with_cookie(request, _json({"name": name, "role": role}), token)

    def _begin_session(self, request: Request, name: str, password: str) -> str:
        """The token of a new session; every try is recorded."""
        if self._policy.users is None or self._sessions is None:
            raise BadRequest("This dashboard asks for no login.")
        address, limit = request.remote_addr or "", self._policy.limit
        try:
            wait = limit.claim(name, address)
            if wait:
                raise _LoginRefused(
                    429, f"Too many tries; wait {max(1.0, wait):.0f} seconds.", wait
                )
            try:
                fits = (
                    len(password) <= MAX_PASSWORD
                    and self._policy.users.check(name, password, address) is not None
                )
            except LoginsBusyError as error:
                limit.take_back(name, address)
                raise _LoginRefused(503, str(error), 1.0) from error
            if not fits:
                raise _LoginRefused(401, "Wrong user name or password.")
        except _LoginRefused as refused:
            self._refusals.add(
                who=name, address=address, action=LOG_IN, status=refused.code, detail=refused.said
            )
            raise
        limit.succeeded(name, address)
        self._storage.record_change(who=name, address=address, action=LOG_IN, status=200)
        return self._sessions.begin(name)

    def _with_cookie(self, request: Request, response: Response, token: str) -> Response:
        response.set_cookie(
            self._policy.cookie(request.environ),
            token,
            path="/",
            httponly=True,
            samesite="Strict",
            secure=self._policy.secure,
        )
        return response

    def _without_cookie(self, request: Request, response: Response) -> Response:
        response.delete_cookie(
            self._policy.cookie(request.environ),
            path="/",
            httponly=True,
            samesite="Strict",
            secure=self._policy.secure,
        )
        return response

    def _end_session(self, request: Request) -> None:
        token = request.cookies.get(self._policy.cookie(request.environ))
        if token and self._sessions is not None:
            self._sessions.end(token)

    def _log_out(self, request: Request) -> Response:
        self._end_session(request)
        response = _redirect(LOGIN)
        self._without_cookie(request, response)
        response.headers["Clear-Site-Data"] = '"cache"'
        return response

    def _log_out_api(self, request: Request) -> Response:
        self._end_session(request)
        return self._without_cookie(request, _json({}))

    # --- the same as JSON ---

    def _me(self, request: Request) -> Response:
        visitor = _visitor(request)
        return _json({"name": visitor.name, "role": visitor.role})

    def _files_api(self, request: Request) -> Response:
        return _json({"files": orders.study_files(self._places.studies)})

    def _studies_api(self, request: Request) -> Response:
        return _json({"studies": [one.to_document() for one in self._catalogue.states()]})

    def _study_api(self, request: Request, name: str) -> Response:
        return _json(status(self._load(name)).to_document())

    def _check_api(self, request: Request) -> Response:
        try:
            spec = self._spec_of(_document(request))
            return _json(self._check(request, spec))
        except (SpecError, DataError) as error:
            found = {"valid": False, "errors": error.to_document()}
            return _json(found, 422)

    def _launch_api(self, request: Request) -> Response:
        placed = self._place(request, self._spec_of(_document(request)))
        document = placed.queued.to_document()
        return _json({**document, "warnings": placed.warnings, "synthetic": placed.synthetic}, 202)

    def _spec_of(self, document: Mapping[str, Any]) -> StudySpec:
        """The spec of {"file": ...} or {"toml": ...}, with "name" and "trials" over it."""
        unknown = document.keys() - {"file", "toml", "name", "trials"}
        file, text = document.get("file"), document.get("toml")
        name, trials = document.get("name"), document.get("trials")
        if unknown or (file is None) == (text is None):
            raise BadRequest(
                'Send {"file": "quickstart.toml"} or {"toml": "..."}, and "name" and "trials" '
                "where they are to be others."
            )
        if not isinstance(name, str | None) or not isinstance(text if file is None else file, str):
            raise BadRequest("file, toml and name are texts.")
        if isinstance(trials, bool) or not isinstance(trials, int | None):
            raise BadRequest("trials is a number.")
        overrides = orders.overrides_for(name, trials)
        if text is not None:
            # JSON can spell half of a surrogate pair; what is no UTF-8 is told with its line.
            return self._uploaded(text.encode("utf-8", "surrogatepass"), "upload.toml", overrides)
        return orders.spec_of_a_file(self._places.studies, str(file), overrides)

    def _stop_api(self, request: Request, name: str) -> Response:
        return _json(self._stop_it(request, name).to_document())

    def _resume_api(self, request: Request, name: str) -> Response:
        return _json(self._resume_it(request, name).to_document(), 202)

    def _delete_api(self, request: Request, name: str) -> Response:
        self._delete_it(request, name)
        return _json({"study": name, "deleted": True})

    def _export_api(self, request: Request, name: str) -> Response:
        tuned = self._load(name)
        configs = [one.to_document() for one in best_configs(tuned, _top(request))]
        return _json({"study": tuned.name, "configs": configs})

    def _log_api(self, request: Request) -> Response:
        _editors_only(request, "see who changed what")
        changes = self._storage.changes(last=1000)
        fields = ("id", "at", "who", "address", "action", "detail", "status")
        return _json({"changes": [{key: getattr(one, key) for key in fields} for one in changes]})

    # --- what both do ---

    def _load(self, name: str) -> TunedStudy:
        found = find_name(name, list_names(self._storage))
        if found is None:
            raise _not_found(f"There is no study {name!r} (any more).")
        return load(self._storage, found, artifacts_root=self._places.artifacts)

    def _uploaded(self, content: bytes, name: str, overrides: list[str]) -> StudySpec:
        return orders.spec_of_an_upload(content, name, overrides, data_folder=self._places.data)

    def _check(self, request: Request, spec: StudySpec) -> dict[str, Any]:
        prepared = orders.prepare_here(self._storage, spec, artifacts_root=self._places.artifacts)
        request.environ[DETAIL_KEY] = f"checked {spec.name}"
        identity = prepared.identity
        return {
            "study": spec.name,
            "valid": True,
            "errors": [],
            "trials": spec.trials,
            "max_epochs": spec.training.max_epochs,
            "brackets": [list(bracket) for bracket in spec.brackets],
            "trials_of_brackets": list(spec.trials_of_brackets(spec.trials)),
            "planned_epochs": spec.planned_epochs,
            "searched": list(spec.space.parameters),
            "parameter_count": parameter_counts(spec.space, spec.data.max_length),
            "data": identity.check_document(),
            "warnings": [*prepared.all_warnings, *overlap.warnings(self._storage, spec, prepared)],
            "spec_hash": spec.spec_hash,
        }

    def _place(self, request: Request, spec: StudySpec) -> orders.Placed:
        placed = orders.place(self._storage, spec, artifacts_root=self._places.artifacts)
        request.environ[DETAIL_KEY] = f"launched: {placed.queued.in_words}"
        return placed

    def _stop_it(self, request: Request, name: str) -> orders.Stopped:
        stopped = orders.stop(self._load(name))
        request.environ[DETAIL_KEY] = stopped.in_words
        return stopped

    def _resume_it(self, request: Request, name: str) -> orders.Queued:
        queued = orders.queue(self._load(name))
        request.environ[DETAIL_KEY] = queued.in_words
        return queued

    def _delete_it(self, request: Request, name: str) -> None:
        tuned = self._load(name)
        trials = counted(len(tuned.trials()), "trial")
        delete(tuned)
        request.environ[DETAIL_KEY] = f"deleted {name} with {trials}"

    @staticmethod
    def _report_file(tuned: TunedStudy) -> Path:
        return tuned.artifacts.report_folder / "report.html"

    # --- answers ---

    def _page(
        self, request: Request, template: str, /, *, code: int = 200, **values: Any
    ) -> Response:
        visitor = request.environ.get(VISITOR_KEY)
        text = self._templates.get_template(f"{template}.html.jinja").render(
            page=template, root=ROOT, visitor=visitor, max_top=MAX_TOP, **values
        )
        response = Response(text, code, content_type="text/html; charset=utf-8")
        response.headers["Content-Security-Policy"] = POLICY
        return response

    def _message(self, request: Request, title: str, text: str, code: int) -> Response:
        request.environ.setdefault(DETAIL_KEY, f"refused: {text}")
        return self._page(request, "message", code=code, title=title, text=text)

    def _problems(
        self, request: Request, error: SpecError | DataError, *, is_api: bool
    ) -> Response:
        request.environ[DETAIL_KEY] = _refusal(error)
        if is_api:
            return _json({"reason": str(error), "errors": error.to_document()}, 422)
        return self._message(request, "That cannot be done", str(error), 422)


def _refusal(error: SpecError | DataError) -> str:
    """For the record of changes, where an entry is one line."""
    return f"refused: {'; '.join(map(str, error.problems))}"


def _of_the_form(problem: Problem) -> str:
    """A mistake as the launch page says it: what is in no file stands in a field of the form."""
    text = str(problem)
    return text if problem.file else text[:1].upper() + text[1:]


def _rule(path: str, view: Callable[..., Response], method: str = "GET") -> Rule:
    return Rule(path, endpoint=view, methods=[method])


def _source(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _visitor(request: Request) -> Visitor:
    visitor: Visitor = request.environ[VISITOR_KEY]
    return visitor


def _editors_only(request: Request, what: str) -> None:
    if _visitor(request).role != "editor":
        error = HTTPException(f"Only editors {what}.")
        error.code = 403
        raise error


def _not_found(text: str = "There is no such page.") -> HTTPException:
    error = HTTPException(text)
    error.code = 404
    return error


def _json(document: Any, code: int = 200) -> Response:
    text = json.dumps(document, indent=2)
    return Response(f"{text}\n", code, content_type="application/json")


def _redirect(there: str) -> Response:
    # Relative, as it was asked for: whatever name or proxy the browser reached us by.
    return Response("", 303, headers={"Location": there}, content_type="text/plain")


def _download(request: Request, content: bytes, name: str, kind: str) -> Response:
    return send_file(
        io.BytesIO(content), request.environ, mimetype=kind, as_attachment=True, download_name=name
    )


def _document(request: Request) -> Mapping[str, Any]:
    """The JSON object in the body. Another site's form cannot send this content type."""
    if request.mimetype != "application/json":
        raise BadRequest("Send application/json.")
    try:
        document = json.loads(request.get_data())
    except (ValueError, RecursionError):
        raise BadRequest("The body is not JSON.") from None
    if not isinstance(document, dict):
        raise BadRequest("The body is not a JSON object.")
    return document


def _trials(text: str) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 8):
        raise BadRequest("Trials is a number from 1.")
    return int(text)


def _top(request: Request) -> int:
    text = request.args.get("top", "1")
    if not (text.isascii() and text.isdigit() and len(text) < 5 and 1 <= int(text) <= MAX_TOP):
        raise BadRequest(f"top is a number from 1 to {MAX_TOP}.")
    return int(text)


def _format(request: Request) -> Format:
    form = request.args.get("format", "toml")
    for known in get_args(Format):
        if form == known:
            return known  # type: ignore[no-any-return]
    raise BadRequest(f"format is {', '.join(get_args(Format))}.")


def _local(there: str) -> str:
    """Where to go after the login: a page of this server, never another site's."""
    plain = there.startswith("/") and not there.startswith(("//", "/\\"))
    return there if plain and there.isprintable() and "\\" not in there else ROOT
