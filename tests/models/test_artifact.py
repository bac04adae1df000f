"""A model directory: whole or not at all, the same bytes for the same model, and refused by name where it is wrong."""

from __future__ import annotations

import dataclasses
import json
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest

from flowsage.collector.errors import ModelError
from flowsage.models import artifact
from flowsage.models.detector import Detector, DetectorConfig
from flowsage.models.profiles import FEATURES, feature_names
from tests.models.test_detector import EARLY, WINDOW_NS, flows, run

CONFIG = DetectorConfig(meeting=EARLY)
TRAINED = {"until_ns": 1_700_000_000 * 10**9, "first_ns": 1_600_000_000 * 10**9, "flows": 6_000}


@pytest.fixture(scope="module")
def trained() -> Detector:
    detector = Detector(CONFIG)
    batch = flows()
    run(detector, batch.take(np.flatnonzero(batch.start_ns // WINDOW_NS < batch.start_ns[-1] // WINDOW_NS - 2)))
    return detector


def readable_by_the_umask(folder: Path) -> int:
    """Mode of a file that is made here without further ado."""
    (folder / "any").touch()
    return stat.S_IMODE((folder / "any").stat().st_mode)


@pytest.fixture(scope="module")
def saved(trained: Detector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "model"
    artifact.save(path, trained, trained=TRAINED)
    return path


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def test_a_model_goes_on_where_the_one_that_was_saved_goes_on(saved: Path, trained: Detector) -> None:
    again, manifest = artifact.load(saved, CONFIG)
    assert manifest.trained == TRAINED
    batch = flows()
    rest = batch.take(np.flatnonzero(batch.start_ns // WINDOW_NS >= batch.start_ns[-1] // WINDOW_NS - 2))
    arrays, values = trained.state()
    for one, other in zip(run(Detector.restore(CONFIG, arrays, values), rest), run(again, rest), strict=True):
        assert np.array_equal(one.scores.flow_score, other.scores.flow_score)
        assert np.array_equal(one.tails, other.tails, equal_nan=True)


def test_the_directory_is_what_its_readers_expect(saved: Path, trained: Detector, tmp_path: Path) -> None:
    names = {"model.safetensors", "history.safetensors", "calibration.safetensors", "config.json", "README.md"}
    assert {p.name for p in saved.iterdir()} == names
    config = json.loads((saved / "config.json").read_text())
    assert config["schema"]["features"]["host"] == feature_names()
    assert len(feature_names()) == FEATURES
    assert set(config["files"]) == names - {"config.json"}
    assert "## Limits" in (saved / "README.md").read_text()
    assert {stat.S_IMODE((saved / name).stat().st_mode) for name in names} == {readable_by_the_umask(tmp_path)}
    again = tmp_path / "again"
    artifact.save(again, trained, trained=TRAINED)
    assert all((again / name).read_bytes() == (saved / name).read_bytes() for name in names)


@pytest.mark.parametrize("name", ["model.safetensors", "history.safetensors", "calibration.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_a_damaged_file_is_refused_by_name(model: Path, name: str, damage: str) -> None:
    file = model / name
    data = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(data[:-100])
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    else:
        file.unlink()
    with pytest.raises(ModelError, match=name):
        artifact.load(model, CONFIG)


@pytest.mark.parametrize("text", ["", "{}", '{"format": 1', '{"format": 99}'])
def test_a_damaged_or_foreign_config_is_refused(model: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json|format 99"):
        artifact.load(model, CONFIG)


def test_a_config_that_was_edited_is_refused(model: Path) -> None:
    body = json.loads((model / "config.json").read_text())
    body["trained"]["until_ns"] -= 1
    (model / "config.json").write_text(json.dumps(body))
    with pytest.raises(ModelError, match="does not match its checksum"):
        artifact.load(model, CONFIG)


def test_a_folder_that_is_no_model_is_refused_and_never_overwritten(trained: Detector, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot read the model directory"):
        artifact.load(tmp_path / "none", CONFIG)
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(ModelError, match="no model directory"):
        artifact.load(tmp_path, CONFIG)
    with pytest.raises(ModelError, match="is no model directory"):
        artifact.save(tmp_path, trained, trained=TRAINED)
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"window_ns": 6 * 10**9}, "windows.window 60s, here it is 6s"),
        ({"history": dataclasses.replace(CONFIG.history, undirected=True)}, "model.undirected false, here it is true"),
        ({"meeting": dataclasses.replace(EARLY, width=32)}, "architecture (width) 48, here it is 32"),
        ({"alarms": dataclasses.replace(CONFIG.alarms, time_scale=60.0)}, "alarms.time_scale 1.0, here it is 60.0"),
    ],
)
def test_another_feature_schema_is_refused_in_a_sentence(saved: Path, change: dict[str, object], words: str) -> None:
    with pytest.raises(ModelError) as refused:
        artifact.load(saved, dataclasses.replace(CONFIG, **change))  # type: ignore[arg-type]
    assert words in str(refused.value)


def test_features_in_another_order_are_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = feature_names()
    monkeypatch.setattr(artifact, "feature_names", lambda: [names[1], names[0], *names[2:]])
    with pytest.raises(ModelError, match=r"features \(host\) 'services out 0' at place 1, here it is 'services out 1'"):
        artifact.load(model, CONFIG)


def test_the_graph_of_a_model_can_be_left_aside_but_not_made_up(saved: Path, tmp_path: Path) -> None:
    plain = dataclasses.replace(CONFIG, graph=False)
    assert artifact.load(saved, plain)[0].prior is None
    artifact.save(tmp_path / "plain", Detector(plain), trained=TRAINED)
    with pytest.raises(ModelError, match="a prior of first meetings false, here it is true"):
        artifact.load(tmp_path / "plain", CONFIG)


def test_a_new_model_takes_the_place_of_the_old_one_in_one_step(model: Path, trained: Detector) -> None:
    before, inode = artifact.stamp(model), model.stat().st_ino
    open_now = artifact._Folder(model)
    artifact.save(model, trained, trained=TRAINED | {"flows": 7_000})
    assert artifact.stamp(model) != before
    assert model.stat().st_ino != inode
    assert artifact.read_manifest(model).trained["flows"] == 7_000
    assert [p.name for p in model.parent.iterdir()] == ["model"]
    open_now.__exit__()


def test_a_writer_that_dies_leaves_the_old_model(
    model: Path, trained: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifact, "_put", die)
    with pytest.raises(ModelError, match="No space left on device"):
        artifact.save(model, trained, trained=TRAINED | {"flows": 7_000})
    assert artifact.read_manifest(model).trained == TRAINED
    monkeypatch.undo()
    artifact.save(model, trained, trained=TRAINED | {"flows": 8_000})
    assert artifact.read_manifest(model).trained["flows"] == 8_000
    assert [p.name for p in model.parent.iterdir()] == ["model"]
