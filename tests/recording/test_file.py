"""A recording's file: written whole or not at all, and read with care.

What is read here was made up on a CPU: see made_up.py.
"""

import dataclasses
import errno
import json
import multiprocessing
import os

import pytest

from helpers.recording import FOLDER, RecordingError, all_recorded, recordings
from helpers.recording.recorded import read, write
from tests.recording.made_up import FIXTURE, GPU, GROUPS, SETTINGS, blank

COMMITTED = sorted(FOLDER.glob("*.json"))


@pytest.fixture(scope="module")
def made_up():
    return read(FIXTURE)


def test_no_recording_is_made_up():
    for path in COMMITTED:
        found = read(path)
        assert not found.made_up and found.repeats >= 20
        assert path.name == found.file_name


def test_the_fixture_says_that_it_is_made_up_and_no_reader_sees_it(made_up, tmp_path):
    assert made_up.made_up and made_up.gpu == GPU and made_up.date == "2000-01-01"
    assert FIXTURE.parent != FOLDER
    write(made_up, tmp_path / "one.json")
    assert recordings(tmp_path) == []
    assert all_recorded("uniform_mlp", SETTINGS, 64, tmp_path) == []


def test_the_fixture_holds_every_plan_of_every_group(made_up):
    groups = [dataclasses.replace(group, measured=()) for group in made_up.groups]
    assert groups == GROUPS
    assert all([r.plan for r in g.measured] == list(g.plans) for g in made_up.groups)


# Written


def test_what_is_written_is_read(made_up, tmp_path):
    path = tmp_path / "deep" / "one.json"
    write(made_up, path)
    assert read(path) == made_up
    assert path.read_text() == FIXTURE.read_text()
    assert list(path.parent.iterdir()) == [path]
    empty = blank()
    write(empty, path)
    assert read(path) == empty


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_the_file_whole(failing, tmp_path, monkeypatch):
    path = tmp_path / "one.json"
    write(blank(), path)
    before = path.read_bytes()

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        write(blank(driver="1"), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path], "nothing is left behind"


def write_for_ever(recording, path) -> None:
    while True:
        write(recording, path)


def test_a_run_that_is_killed_leaves_the_file_whole(made_up, tmp_path):
    path = tmp_path / "one.json"
    write(made_up, path)
    for moment in range(3):
        before = path.stat().st_mtime_ns
        run = multiprocessing.get_context("fork").Process(
            target=write_for_ever, args=(made_up, path)
        )
        run.start()
        try:
            for _ in range(10 + moment):
                assert read(path) == made_up
        finally:
            run.kill()
            run.join()
        assert read(path) == made_up and path.stat().st_mtime_ns > before
    assert recordings(tmp_path) == [], "and no part of a file counts as one"


def test_files_are_named_by_gpu_and_torch():
    h100 = blank(gpu="NVIDIA H100 80GB HBM3", torch="2.13.0+cu130")
    assert h100.file_name == "nvidia-h100-80gb-hbm3-torch-2.13.0-cu130.json"
    pairs = [(gpu, torch) for gpu in "AB" for torch in ("2.11.0", "2.13.0")]
    assert len({blank(gpu=gpu, torch=torch).file_name for gpu, torch in pairs}) == 4


# Read


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_a_file_that_was_cut_short_is_named(share, tmp_path):
    text, path = FIXTURE.read_text(), tmp_path / "cut.json"
    path.write_text(text[: int(share * len(text))])
    with pytest.raises(RecordingError, match="cut.json is no recording, or only a p"):
        read(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", r"foreign.json should be an object, and is \[\]"),
        ("null", "foreign.json should be an object, and is None"),
        ('{"a": 1}', "foreign.json lacks the field 'format'"),
        ('{"format": 1}', "lacks the field 'gpu'"),
    ],
)
def test_another_json_is_no_recording(text, words, tmp_path):
    path = tmp_path / "foreign.json"
    path.write_text(text)
    with pytest.raises(RecordingError, match=f"foreign.json is no recording.*{words}"):
        read(path)


def test_bytes_that_are_no_text_and_files_that_are_none_are_named(tmp_path):
    path = tmp_path / "picture.json"
    path.write_bytes(b"\x89PNG\r\n\xff\xfe")
    with pytest.raises(RecordingError, match="picture.json is no recording"):
        read(path)
    with pytest.raises(RecordingError, match=r"gone.json is no.*No such file"):
        read(tmp_path / "gone.json")


@pytest.fixture(scope="module")
def small_text(made_up, tmp_path_factory):
    """A recording with a part of each kind, so that it is read in no time."""
    group = made_up.groups[2]
    short = dataclasses.replace(group, measured=group.measured[:2])
    path = tmp_path_factory.mktemp("small") / "small.json"
    write(dataclasses.replace(made_up, groups=(short,)), path)
    return path.read_text()


REPORT = "'groups' 1, 'measured' 2"
PLACES = {
    "": lambda values: values,
    "'groups' 1": lambda values: values["groups"][0],
    "'groups' 1, 'step'": lambda values: values["groups"][0]["step"],
    REPORT: lambda values: values["groups"][0]["measured"][1],
    f"{REPORT}, 'categories'": lambda v: v["groups"][0]["measured"][1]["categories"],
}


def refusal(text, where, change, tmp_path) -> str:
    """Read a file after a change of the object at a place; return what is said."""
    values, path = json.loads(text), tmp_path / "wrong.json"
    change(PLACES[where](values))
    path.write_text(json.dumps(values))
    with pytest.raises(RecordingError) as raised:
        read(path)
    said = str(raised.value)
    assert said.startswith(f"{path} is no recording") and "\n" not in said
    return said


@pytest.mark.parametrize("where", PLACES)
def test_a_field_that_is_missing_unknown_or_of_another_kind_is_named(
    where, small_text, tmp_path
):
    called = ", ".join(["wrong.json", where] if where else ["wrong.json"])
    for name in PLACES[where](json.loads(small_text)):

        def said(change, name=name) -> str:
            return refusal(small_text, where, change, tmp_path)

        missing = said(lambda values, name=name: values.pop(name))
        assert f"({called} lacks the field '{name}')" in missing
        for spoilt in (-1.5, [["x"], 3], {"no": 1}):
            wrong = said(lambda v, name=name, new=spoilt: v.update({name: new}))
            assert f"({called}, '{name}'" in wrong or f"({called}: " in wrong
    other = said(lambda values: values.update(extra=1))
    assert f"({called} has a field 'extra', which none has)" in other


@pytest.mark.parametrize(
    ("where", "changes", "words"),
    [
        ("", {"format": 1}, "'format' should be one of 2, and is 1"),
        ("", {"gpu": ""}, "'gpu' should be a text, and is ''"),
        ("", {"made_up": 1}, "'made_up' should be true or false, and is 1"),
        ("", {"groups": [3]}, "'groups' 1 should be an object, and is 3"),
        ("'groups' 1", {"plans": [[[]]]}, "'plans' 1: a segment needs at least one"),
        (
            "'groups' 1",
            {"plans": [["ab"]]},
            "'plans' 1, 'segments' 1 should be a list",
        ),
        ("'groups' 1, 'step'", {"settings": {"heads": 3}}, "'step': got an unexp"),
        ("'groups' 1, 'step'", {"model": "Net"}, "'model' should be one of 'DocsMLP'"),
        (REPORT, {"plan": [["layer9"]]}, "'measured' has a plan that is none of"),
        (REPORT, {"peak_bytes": True}, "'peak_bytes' should be a whole number from 0"),
        (REPORT, {"step_ms": 0}, "'step_ms' should be a number above 0, and is 0"),
        (
            REPORT,
            {"step_ms_quartiles": [1]},
            "'step_ms_quartiles' should be a list of 2",
        ),
    ],
)
def test_what_is_wrong_is_said(where, changes, words, small_text, tmp_path):
    said = refusal(small_text, where, lambda v: v.update(changes), tmp_path)
    assert words in said


def test_a_time_that_is_not_there_is_none(small_text, tmp_path):
    values, path = json.loads(small_text), tmp_path / "one.json"
    values["groups"][0]["measured"][1] |= {"step_ms": None, "step_ms_quartiles": None}
    path.write_text(json.dumps(values))
    assert read(path).groups[0].measured[1].step_ms is None


def test_a_file_that_changes_is_read_anew(made_up, tmp_path):
    path = tmp_path / "one.json"
    write(dataclasses.replace(made_up, made_up=False), path)
    assert len(recordings(tmp_path)) == 1
    path.write_text("{")
    with pytest.raises(RecordingError, match="only a part"):
        recordings(tmp_path)
