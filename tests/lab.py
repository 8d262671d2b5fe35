"""A dashboard with users, and clients that ask it as a browser does."""

from __future__ import annotations

import datetime as dt
import functools
import json
import tempfile
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from werkzeug.security import generate_password_hash
from werkzeug.test import Client

from tuner.dashboard.policy import Policy
from tuner.dashboard.predictor import Predictor
from tuner.dashboard.server import make_app
from tuner.dashboard.settings import Folders
from tuner.dashboard.users import Users, write_user
from tuner.storage.storage import Storage

HOST = "127.0.0.1:8080"
PASSWORDS = {"ada": "correct horse battery", "vic": "only looking around"}
ROLES = {"ada": "editor", "vic": "viewer"}


@functools.cache
def _users_file() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "users.json"
        for name, password in PASSWORDS.items():
            write_user(path, name, ROLES[name], password)
        document = json.loads(path.read_text())
    for name, password in PASSWORDS.items():  # hashed at a thirtieth of the real cost
        document["users"][name]["password"] = generate_password_hash(password, "scrypt:1024:8:1")
    return json.dumps(document).encode()


def write_users(folder: Path) -> Path:
    """A users file with an editor, ada, and a viewer, vic: hashing takes a while, so once."""
    path = folder / "users.json"
    path.write_bytes(_users_file())
    path.chmod(0o600)
    return path


class Browser(Client):
    """Sends what a browser sends from a page of the dashboard, and keeps its cookies."""

    def open(self, *args, **kwargs):
        headers = {"Host": HOST, **kwargs.pop("headers", {})}
        method = kwargs.get("method", "GET")
        if method != "GET":
            headers = {"Origin": f"http://{HOST}", "Sec-Fetch-Site": "same-origin"} | headers
        headers = {name: value for name, value in headers.items() if value is not None}
        # Read whole and closed, as the server does it.
        return super().open(*args, headers=headers, buffered=True, **kwargs)

    def log_in(self, name: str) -> Browser:
        answer = self.post("/tuner/login", data={"name": name, "password": PASSWORDS[name]})
        assert answer.status_code == 303, answer.text
        return self


class Lab:
    """The application with users, over a storage."""

    def __init__(
        self,
        storage: Storage,
        folder: Path,
        *,
        predictor: Predictor | None = None,
        **policy: object,
    ) -> None:
        self.storage = storage
        self.folder = folder
        self.users_file = write_users(folder)
        self.policy = Policy(users=Users(self.users_file), **policy)
        self.folders = Folders(artifacts=folder / "artifacts", studies=folder / "studies")
        self.app = make_app(storage, self.policy, self.folders, predictor=predictor)

    def browser(self, name: str | None = None) -> Browser:
        browser = Browser(self.app)
        return browser if name is None else browser.log_in(name)


def write_study_file(folder: Path, name: str = "tiny", source: str = "synthetic") -> None:
    (folder / "studies").mkdir(exist_ok=True)
    (folder / "studies" / f"{name}.toml").write_text(study_file(name, source))


def study_file(name: str = "tiny", source: str = "synthetic") -> str:
    return (
        f"name = {json.dumps(name)}\ntrials = 3\n[data]\nsource = {json.dumps(source)}\n"
        "[training]\nmax_epochs = 3\n[space]\n"
        "learning_rate = { low = 1e-3, high = 1e-2, log = true }\n"
    )


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for localhost that its own key signed; the files of both."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)
        .sign(key, hashes.SHA256())
    )
    files = folder / "localhost.pem", folder / "localhost.key"
    files[0].write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return files
