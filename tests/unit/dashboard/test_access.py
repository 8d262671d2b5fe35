"""Users, sessions and login limits: what holds, and what an attacker would try."""

from __future__ import annotations

import json
import os
import statistics
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from lab import PASSWORDS, write_users

from tuner.dashboard.addresses import allowed_hosts, is_loopback_host
from tuner.dashboard.policy import Policy, Refusals
from tuner.dashboard.sessions import LoginLimit, Sessions
from tuner.dashboard.users import LoginsBusyError, Users, read_users, remove_user, write_user
from tuner.errors import TunerError


@pytest.fixture
def users(tmp_path: Path) -> Users:
    return Users(write_users(tmp_path))


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


# --- the users file ---


def test_the_file_is_its_owner_s_alone_and_holds_no_password(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "users.json"
    assert write_user(path, "ada", "viewer", "correct horse battery")
    assert path.stat().st_mode & 0o777 == 0o600
    assert "correct" not in path.read_text()
    assert json.loads(path.read_text())["users"]["ada"]["password"].startswith("scrypt:32768:8:")
    assert not write_user(path, "ada", "editor", "another good one")
    assert read_users(path)["ada"].role == "editor"
    assert [one.name for one in path.parent.iterdir()] == ["users.json"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o622, 0o666])
def test_a_file_that_others_may_open_is_refused(tmp_path: Path, mode: int) -> None:
    path = write_users(tmp_path)
    path.chmod(mode)
    with pytest.raises(TunerError, match=rf"mode {mode:04o}.*chmod 600"):
        Users(path)


@pytest.mark.parametrize("change", ["mode", "owner"])
def test_a_file_that_others_come_to_control_gives_nobody_rights_until_it_is_right_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    path = write_users(tmp_path)
    users = Users(path)
    assert users.role("ada") == "editor"
    if change == "mode":
        path.chmod(0o660)
    elif os.geteuid() == 0:
        os.chown(path, 12345, -1)
    else:  # only root may give a file away: this process becomes another user
        mine = os.geteuid()
        monkeypatch.setattr("os.geteuid", lambda: mine + 1)
        path.touch()
    assert users.role("ada") is None
    with pytest.raises(TunerError, match="chmod 600" if change == "mode" else "chown"):
        Users(path)
    monkeypatch.undo()
    path.chmod(0o600)
    if os.geteuid() == 0:
        os.chown(path, 0, -1)
    assert users.role("ada") == "editor"


def test_a_file_that_could_not_be_opened_for_a_moment_is_looked_at_again(
    users: Users, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(path: Path) -> None:
        raise TunerError(f"Users file {path}: Too many open files.")

    users.path.touch()
    with monkeypatch.context() as patch:
        patch.setattr("tuner.dashboard.users.read_users", busy)
        assert users.role("ada") is None
    assert users.role("ada") == "editor"  # although the file did not change in between


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"users": []}',
        '{"users": {"ada": {"role": "editor"}}}',
        '{"users": {"ada": {"role": "root", "password": "scrypt:1"}}}',
        '{"users": {"ada": {"role": "editor", "password": "plain"}}}',
        '{"users": {}}',
    ],
)
def test_a_damaged_or_empty_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "users.json"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(TunerError, match=r"users\.json"):
        Users(path)


def test_a_missing_file_is_told_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(TunerError, match="tuner dashboard add-user NAME"):
        Users(tmp_path / "users.json")


@pytest.mark.parametrize("name", ["", "a b", "../x", "a\nb", "<b>", "x" * 65, "-x", "ä"])
def test_a_name_that_could_be_mistaken_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(TunerError, match="is not a user name"):
        write_user(tmp_path / "users.json", name, "viewer", "correct horse battery")


@pytest.mark.parametrize("password", ["", "short", "x" * 201])
def test_a_password_has_a_sensible_length(tmp_path: Path, password: str) -> None:
    with pytest.raises(TunerError, match="it needs 10 to 200"):
        write_user(tmp_path / "users.json", "ada", "viewer", password)


def test_only_the_right_password_of_the_right_user_is_taken(users: Users) -> None:
    assert users.check("ada", PASSWORDS["ada"]) == "editor"
    assert users.check("vic", PASSWORDS["vic"]) == "viewer"
    assert users.check("vic", PASSWORDS["ada"]) is None
    assert users.check("ada", "") is None
    assert users.check("nobody", PASSWORDS["ada"]) is None


def test_an_unknown_user_takes_as_long_as_a_wrong_password(tmp_path: Path) -> None:
    write_user(tmp_path / "users.json", "ada", "viewer", PASSWORDS["ada"])
    users = Users(tmp_path / "users.json")

    def seconds(name: str) -> float:
        taken = []
        for _ in range(5):
            start = time.perf_counter()
            users.check(name, "a wrong password")
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    # Without the hash for nobody, the second is a thousand times faster.
    assert 0.3 < seconds("ada") / seconds("nobody") < 3


# --- sessions ---


def test_a_session_ends_with_its_user_its_password_and_its_file(users: Users) -> None:
    sessions = Sessions(users)
    token = sessions.begin("ada")
    visitor = sessions.visitor(token)
    assert visitor is not None
    assert (visitor.name, visitor.role) == ("ada", "editor")
    write_user(users.path, "ada", "viewer", PASSWORDS["ada"])
    assert sessions.visitor(token) is None  # the password was set anew

    token = sessions.begin("vic")
    assert sessions.visitor(token) is not None
    remove_user(users.path, "vic")
    assert sessions.visitor(token) is None

    token = sessions.begin("ada")
    users.path.write_text("damaged")
    assert sessions.visitor(token) is None


def test_a_role_that_was_taken_away_is_gone_with_the_next_request(users: Users) -> None:
    sessions = Sessions(users)
    token = sessions.begin("ada")
    document = json.loads(users.path.read_text())
    document["users"]["ada"]["role"] = "viewer"
    users.path.write_text(json.dumps(document))
    visitor = sessions.visitor(token)
    assert visitor is not None
    assert visitor.role == "viewer"


def test_a_session_ends_when_it_is_not_used_and_after_a_week(users: Users) -> None:
    clock = Clock()
    sessions = Sessions(users, clock)
    idle, used = sessions.begin("ada"), sessions.begin("ada")
    while clock.now < 7 * 24 * 3600:
        assert sessions.visitor(used) is not None
        clock.now += 11 * 3600
        if clock.now == 22 * 3600:
            assert sessions.visitor(idle) is None
    assert sessions.visitor(used) is None


def test_tokens_are_random_and_only_their_digests_are_kept(users: Users) -> None:
    sessions = Sessions(users)
    tokens = {sessions.begin("ada") for _ in range(100)}
    assert len(tokens) == 100
    assert all(len(token) >= 43 for token in tokens)
    kept = repr(sessions._sessions)
    assert not any(token in kept for token in tokens)
    assert len(sessions._sessions) == 20  # of one user
    assert sessions.visitor("x" * 43) is None


# --- limits ---


def test_five_wrong_passwords_a_minute_and_a_right_one_in_between_costs_nothing() -> None:
    clock = Clock()
    limit = LoginLimit(clock)
    for _ in range(50):
        assert limit.claim("ada", "192.0.2.1") == 0
        limit.succeeded("ada", "192.0.2.1")
    for _ in range(5):
        assert limit.claim("ada", "192.0.2.1") == 0
    assert limit.claim("ada", "192.0.2.1") == 60
    assert limit.claim("ADA", "192.0.2.1") == 60
    assert limit.claim("ada", "192.0.2.2") == 0  # at home, she may still log in
    clock.now = 61
    assert limit.claim("ada", "192.0.2.1") == 0


def test_one_address_cannot_try_one_password_with_many_users() -> None:
    limit = LoginLimit(Clock())
    waits = [limit.claim(f"user{number}", "192.0.2.1") for number in range(30)]
    assert waits.count(0) == 20


def test_many_addresses_cannot_guess_one_user_for_ever() -> None:
    limit = LoginLimit(Clock())
    waits = [limit.claim("ada", f"192.0.2.{number}") for number in range(100)]
    assert waits.count(0) == 60


def test_who_has_a_network_of_ipv6_has_one_address() -> None:
    limit = LoginLimit(Clock())
    waits = [limit.claim(f"user{number}", f"2001:db8:1:2::{number:x}") for number in range(30)]
    assert waits.count(0) == 20
    assert limit.claim("ada", "2001:db8:1:3::1") == 0
    assert [limit.claim("vic", f"::ffff:192.0.2.{number}") for number in range(9)] == [0] * 9


def test_passwords_of_one_address_do_not_fill_the_queue(
    users: Users, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask_again(depth: int, address: str) -> None:
        with pytest.raises(LoginsBusyError) if depth == limit else nullcontext():
            users.check("ada", str(depth), address)

    def check(_: str, depth: str) -> bool:  # while this one is being checked, another comes
        asked = threading.Thread(target=ask_again, args=(int(depth) + 1, "192.0.2.1"))
        asked.start()
        asked.join()
        return False

    monkeypatch.setattr("tuner.dashboard.users.check_password_hash", check)
    monkeypatch.setattr("tuner.dashboard.users._HASHES_AT_ONCE", 100)
    users = Users(users.path)
    limit = 3
    ask_again(0, "192.0.2.1")
    assert users._hashing._queued == {}


def test_a_flood_of_refusals_is_counted_and_not_written_down() -> None:
    clock, written = Clock(), []
    refusals = Refusals(lambda **entry: written.append(entry["detail"]), clock)
    for number in range(150):
        refusals.add(who="", address="", action="", status=403, detail=f"{number}.")
    assert len(written) == 100
    clock.now = 301
    for _ in range(2):
        refusals.add(who="", address="", action="", status=403, detail="Later.")
    assert written[100:] == [
        "Later. (50 more refusals before this one were not recorded)",
        "Later.",
    ]


def test_a_flood_of_names_does_not_fill_the_memory() -> None:
    limit = LoginLimit(Clock())
    for number in range(12_000):
        limit.claim("x" * 100_000 + str(number), f"198.51.{number // 250}.{number % 250}")
    assert len(limit._failures) <= 10_000
    assert max(len(key) for _, key in limit._failures) < 100


# --- where requests come from ---


def test_origins_are_compared_whole() -> None:
    def same(origin: str | None, site: str | None = None, *, secure: bool = False) -> bool:
        environ = {"HTTP_HOST": "lab.example:8080"}
        environ |= {} if origin is None else {"HTTP_ORIGIN": origin}
        environ |= {} if site is None else {"HTTP_SEC_FETCH_SITE": site}
        return Policy(secure=secure).is_same_origin(environ)

    assert same("http://lab.example:8080")
    assert same(None)  # curl
    assert same("https://lab.example:8080", secure=True)
    for origin in (
        "null",
        "",
        "http://lab.example",
        "https://lab.example:8080",
        "http://lab.example:8080.evil.example",
        "http://evil.example",
        "http://evil.example#http://lab.example:8080",
    ):
        assert not same(origin), origin
    assert not same("http://lab.example:8080", "cross-site")
    assert not same(None, "same-site")


def test_hosts_are_this_machine_s_the_address_and_those_given() -> None:
    assert allowed_hosts("0.0.0.0", ()) == {"127.0.0.1", "localhost", "[::1]"}
    assert "192.0.2.7" in allowed_hosts("192.0.2.7", ())
    assert "[2001:db8::1]" in allowed_hosts("2001:db8::1", ())
    assert "tuner.lab.example" in allowed_hosts("0.0.0.0", ["Tuner.lab.example"])
    for name in ("https://x.example", "x.example:80", "*", "a b", ""):
        with pytest.raises(TunerError, match="--allow-host"):
            allowed_hosts("0.0.0.0", [name])


def test_loopback_is_told_from_every_other_address() -> None:
    assert all(map(is_loopback_host, ("127.0.0.1", "localhost", "::1", "127.8.8.8")))
    assert not any(map(is_loopback_host, ("0.0.0.0", "::", "192.0.2.1", "", "example.org")))
