"""Suggested commands: whatever is in a name, a path or a URL, a shell runs what was meant."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from command_lines import parse
from fakes import make_study
from folders import ROOT

from tuner.cluster.scheduler import TlsFiles, worker_command
from tuner.commands import command, password_hint
from tuner.coordination.study_note import overview
from tuner.search.status import status
from tuner.storage.schema import init_command

SECRET = "s3cret/pw"
QUOTED = "s3cret%2Fpw"

WITH_SECRETS = [
    (f"postgresql://ada:{QUOTED}@db/lab", "postgresql://ada@db/lab"),
    (f"postgresql+psycopg://ada:{QUOTED}@db:5433/lab", "postgresql://ada@db:5433/lab"),
    (f"postgresql://ada@db/lab?password={QUOTED}", "postgresql://ada@db/lab"),
    (f"postgresql://ada@db/lab?pass%77ord={QUOTED}", "postgresql://ada@db/lab"),
    (f"postgresql://ada@db/lab?PASSWORD={QUOTED}", "postgresql://ada@db/lab"),
    (f"postgresql://db/lab?user=ada&password={QUOTED}", "postgresql://db/lab?user=ada"),
    (
        f"postgresql://ada:x@db/lab?password={QUOTED}&password=two&sslmode=require",
        "postgresql://ada@db/lab?sslmode=require",
    ),
    (f"postgresql://ada@db/lab?passfile={QUOTED}", "postgresql://ada@db/lab"),
    (f"postgresql://ada@db/lab?sslpassword={QUOTED}", "postgresql://ada@db/lab"),
    (f"postgresql://ada@db/lab?scram_client_key={QUOTED}", "postgresql://ada@db/lab"),
    (f"postgresql://ada@db/lab?oauth_client_secret={QUOTED}", "postgresql://ada@db/lab"),
    (f"postgresql://ada@db/lab?dbname=password%3D{QUOTED}", "postgresql://ada@db/lab"),
    (f"postgresql://ada@db/lab?dbname=postgresql://u:{QUOTED}@h/d", "postgresql://ada@db/lab"),
]


@pytest.mark.parametrize(("storage", "plain"), WITH_SECRETS)
def test_no_secret_of_a_url_is_suggested_and_how_to_give_it_is_told(
    storage: str, plain: str
) -> None:
    said = command("status", storage=storage)
    assert shlex.split(said) == ["tuner", "status", "--storage", plain]
    hint = password_hint(storage)
    for text in (said, hint):
        assert SECRET not in text
        assert QUOTED not in text
        assert "***" not in text
    assert hint


@pytest.mark.parametrize(
    ("storage", "ways"),
    [
        (WITH_SECRETS[0][0], ["PGPASSWORD", "TUNER_STORAGE_PASSWORD_FILE"]),
        (WITH_SECRETS[2][0], ["PGPASSWORD", "TUNER_STORAGE_PASSWORD_FILE"]),
        ("postgresql://ada@db/lab?passfile=mine", ["PGPASSFILE"]),
        ("postgresql://ada@db/lab?sslpassword=mine", ["sslpassword", "PGSERVICE"]),
        ("postgresql://ada@db/lab?sslmode=require", []),
        ("sqlite:///other.db", []),
    ],
)
def test_the_hint_says_the_way_for_what_was_left_out(storage: str, ways: list[str]) -> None:
    hint = password_hint(storage)
    assert all(way in hint for way in ways)
    assert bool(hint) == bool(ways)


def test_the_default_places_are_not_named_and_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = {"storage": "sqlite:///runs/tuner.db", "artifacts": Path("runs/artifacts")}
    other = {"storage": "postgresql://ada:secret@db/lab", "artifacts": Path("/data/it's here")}
    plain = ["--storage", "postgresql://ada@db/lab", "--artifacts", "/data/it's here"]
    assert command("status", **usual) == "tuner status"
    assert shlex.split(command("status", **other)) == ["tuner", "status", *plain]
    monkeypatch.setenv("TUNER_STORAGE", other["storage"])
    monkeypatch.setenv("TUNER_ARTIFACTS", str(other["artifacts"]))
    assert command("status", **other) == "tuner status"
    assert password_hint(other["storage"]) == ""
    # Where the environment names others, the defaults have to be named.
    assert shlex.split(command("status", **usual)) == [
        *("tuner", "status", "--storage", "sqlite:///runs/tuner.db"),
        *("--artifacts", "runs/artifacts"),
    ]


@pytest.mark.parametrize(
    "word",
    ["a b", "it's", "$(touch x)", "`touch x`", "a;b", "a&b", "*", "a#b", "#", "~", '"', "é", "!x"],
)
def test_a_shell_takes_every_word_as_it_is(word: str) -> None:
    said = command("export", word, "-o", word, storage=f"sqlite:///{word}.db", artifacts=Path(word))
    script = f'tuner() {{ printf "%s\\0" "$@"; }}\n{said}  # a comment'
    done = subprocess.run(["sh", "-c", script], capture_output=True, check=True, timeout=60)
    assert done.stdout.decode().split("\0")[:-1] == [
        *("export", word, "-o", word),
        *("--storage", f"sqlite:///{word}.db", "--artifacts", word),
    ]


def test_a_worker_s_command_quotes_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a b.pem", "c;d.pem", "k.pem"):
        Path(name).touch()
    tls = TlsFiles(ca=Path("a b.pem"), cert=Path("c;d.pem"), key=Path("k.pem"))
    assert shlex.split(worker_command("my cluster.json", tls)) == [
        *("tuner", "worker", "--cluster", "my cluster.json"),
        *("--tls-ca", "a b.pem", "--tls-cert", "c;d.pem", "--tls-key", "k.pem"),
    ]


def test_the_overview_of_a_study_tells_how_to_give_a_password_and_never_the_password(
    tmp_path: Path,
) -> None:
    tuned = make_study(tmp_path)
    own, tuned.storage.url = tuned.storage.url, "postgresql://ada@db/lab?password=s3cret"
    try:
        for state in ("running", "queued", "stopped", "finished", "reported"):
            if state in ("finished", "reported"):
                continue  # without a trained trial they suggest no command
            said = overview(tuned, status(tuned), state)
            assert "s3cret" not in said
            assert "--storage postgresql://ada@db/lab --artifacts" in said
            assert "PGPASSWORD" in said
    finally:
        tuned.storage.url = own
        tuned.storage.close()


def test_a_storage_that_the_environment_names_with_its_password_is_not_named_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TUNER_STORAGE", f"postgresql://ada:{QUOTED}@db/lab")
    opened = sa.make_url(f"postgresql+psycopg://ada:{QUOTED}@db/lab")
    assert init_command(opened) == "tuner storage init"
    elsewhere = opened.set(host="other")
    assert init_command(elsewhere) == "tuner storage init --storage postgresql://ada@other/lab"
    monkeypatch.setenv("TUNER_STORAGE", "not a url")
    assert init_command(opened) == "tuner storage init --storage postgresql://ada@db/lab"


# --- every command that is suggested anywhere ---


def values(words: Sequence[ast.expr]) -> Iterator[object]:
    """The words of a call of `command`; what is computed is a number, which any word may be."""
    for word in words:
        if isinstance(word, ast.Starred):
            continue
        yield ast.literal_eval(word) if isinstance(word, ast.Constant) else 7


def suggestions() -> Iterator[Any]:
    """The commands that calls of `command` in the tuner's modules make, and those in texts."""
    for path in sorted((ROOT / "tuner").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            line = f"{name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call) and node.args:
                called = ast.unparse(node.func)
                by_hand = {keyword.arg for keyword in node.keywords}
                known = {"storage", "artifacts"} if called == "tuned.command" else by_hand
                if called in ("command", "tuned.command") and (words := [*values(node.args)]):
                    places = {"storage": "postgresql://ada:s3cret@db/lab", "artifacts": Path("a b")}
                    given = {key: value for key, value in places.items() if key in known}
                    yield pytest.param(words, given, id=line)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                for found in re.findall(r"`(tuner [^`]+)`|Example: (tuner .+)", node.value):
                    words = shlex.split("".join(found))[1:]
                    # `tuner launch --detach` names a verb, and is not a command to paste.
                    is_whole = len([word for word in words if not word.startswith("-")]) > 1
                    if is_whole and "..." not in " ".join(words):
                        yield pytest.param(words, {}, id=f"{line} {words[0]}")


SUGGESTIONS = [*suggestions()]


@pytest.mark.parametrize(("words", "places"), SUGGESTIONS)
def test_the_command_line_takes_every_command_that_is_suggested(
    words: list[object], places: dict[str, Any]
) -> None:
    split = shlex.split(command(*words, **places))
    assert "***" not in " ".join(split)
    assert "s3cret" not in " ".join(split)
    parse(split)


def test_every_verb_that_has_an_example_is_among_the_suggestions() -> None:
    verbs = {words.values[0][0] for words in SUGGESTIONS}
    assert verbs >= {"check", "launch", "serve", "status", "stop", "export", "report", "storage"}
    with pytest.raises(Exception, match="No such option"):
        parse(["tuner", "stop", "--trials", "7"])


def test_no_other_module_puts_a_command_together() -> None:
    """A name, a path or a URL in a suggested command is quoted in `tuner.commands` alone."""
    verbs = "init|check|launch|worker|serve|status|stop|export|predict|report|dashboard|delete"
    by_hand = re.compile(rf"tuner (?:{verbs}|storage|data)\b[^`\n\")]*\{{")
    assert by_hand.search('f"`tuner stop {name}`"')
    assert by_hand.search("<code>tuner report {{ one.study }}</code>")
    found = [
        f"{path.name}: {line.strip()}"
        for path in sorted((ROOT / "tuner").rglob("*"))
        if path.suffix in (".py", ".jinja")
        for line in path.read_text().splitlines()
        if by_hand.search(line)
    ]
    assert found == []
