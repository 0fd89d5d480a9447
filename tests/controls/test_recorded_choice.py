"""The lab shows what GPUs have recorded, names them, and nothing where none has."""

import dataclasses

import pytest
import torch

from helpers.checkpointing import Plan
from helpers.controls import LayerLab
from helpers.controls import lab as controls
from helpers.controls._recorded import RecordedChoice
from helpers.models import DocsMLP, uniform_mlp
from helpers.recording.recorded import read, write
from tests.recording.made_up import FIXTURE, LAYERS

SETTINGS = {"depth": 3, "width": 16, "activation": "gelu"}
FIRST, SECOND = (f"GPU {i}, torch none, 2000-01-01" for i in (1, 2))
ALONE, PAIRS = Plan.alone(LAYERS), Plan((("layer1", "layer2"),))


@pytest.fixture
def folder(tmp_path):
    """Two recordings that claim to be real, as real ones will; only here."""
    for gpu in ("GPU 1", "GPU 2"):
        real = dataclasses.replace(read(FIXTURE), gpu=gpu, made_up=False)
        write(real, tmp_path / real.file_name)
    return tmp_path


@pytest.fixture
def heard():
    return []


@pytest.fixture
def choice(folder, heard):
    return RecordedChoice(lambda: heard.append("changed"), folder)


def test_it_is_there_where_there_are_recordings(choice, heard):
    assert choice.layout.display == "none" and choice.pairs == {}
    choice.find(uniform_mlp, SETTINGS, 64)
    assert choice.layout.display == ""
    assert choice.options == ((FIRST, FIRST), (SECOND, SECOND))
    assert choice.value == FIRST and ALONE in choice.pairs
    choice.find(uniform_mlp, SETTINGS, 65)
    assert choice.layout.display == "none" and choice.pairs == {}
    assert choice.note(ALONE) == "" and not heard


def test_the_short_line_starts_with_what_tells_gpus_apart(folder):
    real = dataclasses.replace(read(FIXTURE), gpu="NVIDIA L4", made_up=False)
    write(dataclasses.replace(real, date="2000-01-02"), folder / "newer.json")
    choice = RecordedChoice(lambda: None, folder)
    choice.find(uniform_mlp, SETTINGS, 64)
    assert choice.label == "L4, torch none, 2000-01-02"
    assert choice.value == f"NVIDIA {choice.label}"


def test_what_was_chosen_stays_chosen(choice, heard):
    choice.find(uniform_mlp, SETTINGS, 64)
    choice.value = SECOND
    assert heard == ["changed"]
    choice.find(DocsMLP, {}, 32)
    assert choice.value == SECOND and heard == ["changed"]
    assert len(choice.pairs) == 8


def test_another_model_of_the_same_name_is_none_that_was_recorded(choice):
    def uniform_mlp(**settings):
        return torch.nn.Linear(1, 1)

    for factory in (uniform_mlp, uniform_mlp(), lambda: DocsMLP()):
        choice.find(factory, SETTINGS, 64)
        assert choice.options == ()
    choice.find(DocsMLP, {}, None)
    assert choice.options == ()


def test_it_says_what_was_recorded_and_where(choice):
    choice.find(uniform_mlp, SETTINGS, 64)
    note = choice.note(ALONE)
    assert note.startswith(f"; recorded on {FIRST}: ") and " KiB, step " in note
    assert note.endswith(" %), median of 2 runs")
    assert " %)" not in choice.note(Plan())
    assert choice.note(PAIRS) == "", "this plan was not recorded"


def test_a_broken_file_is_named_and_stops_nothing(choice, folder):
    (folder / "broken.json").write_text("{")
    choice.find(uniform_mlp, SETTINGS, 64)
    assert choice.options == ()
    assert "no recording is shown: " in choice.note(ALONE)
    assert "broken.json is no recording" in choice.note(ALONE)


# In the lab


@pytest.fixture
def lab(folder, monkeypatch):
    monkeypatch.setattr(
        controls, "RecordedChoice", lambda changed: RecordedChoice(changed, folder)
    )
    return LayerLab(batch=64, settings=SETTINGS)


def test_the_lab_shows_and_names_a_recording(lab):
    assert lab.recorded in lab.children[0].children
    assert f"recorded on {FIRST}" in lab.readout.value
    lab.plan = ALONE
    before = lab.picture.shown
    assert before["recordedPeaks"] != [[], []] != before["recorded"]
    assert f"recorded on {FIRST}" in lab.readout.value
    lab.recorded.value = SECOND
    assert f"recorded on {SECOND}" in lab.readout.value
    assert lab.picture.shown == before, "both have the same numbers"
    lab.plan = PAIRS
    assert "recorded on" not in lab.readout.value


def test_other_sizes_have_no_recording_and_say_nothing(lab):
    lab.plan = ALONE
    shown = lab.picture.value
    lab.controls["batch"].value = 65
    assert lab.recorded.layout.display == "none"
    assert "recorded" not in lab.readout.value
    lab.controls["batch"].value = 64
    assert f"recorded on {FIRST}" in lab.readout.value and lab.picture.value == shown


@pytest.mark.parametrize("other", [{"device": "cpu"}, {"loss": torch.sum}], ids=list)
def test_another_step_than_the_recorded_one_has_no_recording(lab, other):
    lab = LayerLab(batch=64, settings=SETTINGS, **other)
    assert lab.recorded.layout.display == "none"
    assert "recorded" not in lab.readout.value


def test_a_lab_without_recordings_is_as_before(lab, monkeypatch):
    with_recording = lab.picture.value
    monkeypatch.undo()
    plain = LayerLab(batch=64, settings=SETTINGS)
    assert (
        plain.recorded.layout.display == "none"
        and plain.picture.value != with_recording
    )
