"""I rely on pictures that show what is there: places, sides, sizes, counts and the strongest step."""

import cv2
import numpy as np
import pandas as pd
import pictures
import pytest
import torch

import cspine
import modes


def coloured(image):
    return np.ptp(image.astype(int), axis=2) > 20


@pytest.fixture
def words(monkeypatch):
    """Every (words, x, y) that is written, in order."""
    found, write = [], pictures.text

    def note(image, text, x, y, *rest, **more):
        found.append((text, x, y))
        write(image, text, x, y, *rest, **more)

    monkeypatch.setattr(pictures, "text", note)
    return found


@pytest.fixture
def volume():
    """64 x 40 x 80 voxels of 2 x 1 x 1 mm; bone at the head, the front and the right."""
    hu = np.full((64, 40, 80), -1000, np.int16)
    hu[:12, :10, :20] = 1500
    return cspine.Volume("study", hu, (2.0, 1.0, 1.0), np.eye(4))


@pytest.mark.parametrize("axis", range(3))
def test_coloured_voxels_lie_where_the_mask_is(volume, axis):
    probability = np.zeros((7, 16, 16, 16), np.float32)
    box = np.array([[4, 12], [5, 11], [9, 13]])
    probability[2, 4:12, 5:11, 9:13] = 1
    image = pictures.panel(volume, probability, axis, 10, "", cspine.VERTEBRAE, None)
    rows, columns = [k for k in range(3) if k != axis]
    size_mm = np.multiply(volume.hu.shape, volume.spacing)
    scale = (pictures.PANEL - 48) / size_mm[[rows, columns]].max()
    for k, across in ((rows, 1), (columns, 0)):
        seen = np.flatnonzero(coloured(image).any(across))
        corner = (pictures.PANEL - size_mm[k] * scale) / 2
        expected = corner + box[k] / 16 * size_mm[k] * scale
        assert np.abs([seen[0], seen[-1] + 1] - expected).max() < 3
    y, x = np.argwhere(coloured(image)).mean(0).astype(int)
    blue, green, red = image[y, x].astype(int)
    assert green > blue > red  # the green of C3


@pytest.mark.parametrize("axis, first, second", [(0, "AP", "RL"), (1, "HF", "RL"), (2, "HF", "AP")])
def test_letters_stand_on_the_side_that_they_name(volume, words, axis, first, second):
    image = pictures.panel(volume, np.zeros((7, 16, 16, 16), np.float32), axis, 0, "", "", None)
    at = {word: (x, y) for word, x, y in words if word in "HFAPRL" and word}
    y, x = np.argwhere(image[60:-60, 60:-60, 0] > 150).mean(0) + 60  # head, front, right
    assert at[first[0]][1] < y < pictures.PANEL / 2 < at[first[1]][1]
    assert at[second[0]][0] < x < pictures.PANEL / 2 < at[second[1]][0]


def test_the_true_mask_is_outlined_at_its_place(volume):
    truth = np.zeros(volume.hu.shape, np.uint8)
    truth[20:40, 10:30, 30:60] = 4
    image = pictures.panel(volume, np.zeros((7, 16, 16, 16), np.float32), 0, 8, "", "", truth)
    scale = (pictures.PANEL - 48) / 80
    y, x = np.argwhere((image == 255).all(2)[60:-60, 60:-60]).T + 60
    corner = (pictures.PANEL - 40 * scale) / 2
    assert np.abs([y.min() - corner - 10 * scale, y.max() - corner - 30 * scale]).max() < 3
    assert np.abs([x.min() - 24 - 30 * scale, x.max() - 24 - 60 * scale]).max() < 3
    assert len(x) < 3 * 2 * (20 + 30) * scale  # a line, no area


def test_the_marked_step_is_the_strongest(words):
    rng = np.random.default_rng(0)
    crops = rng.integers(0, 255, (15, 6, 32, 32), np.uint8)
    steps = rng.uniform(0.1, 0.6, 15)
    steps[9] = 0.9
    image = pictures.strip("C4", crops, steps, np.ones((15, 32, 32)))
    rows = np.flatnonzero(coloured(image[:, :6 * pictures.TILE]).any(1))
    assert np.all(rows // (len(image) // 15) == 9)
    assert [w for w, _, _ in words if "strongest" in w] == ["step 10: 0.90, strongest"]
    shown = [w for w, _, _ in words if w.startswith("step ") and ":" in w]
    assert shown[3].startswith(f"step 4: {steps[3]:.2f}")
    centre = image[:pictures.PANEL, -pictures.PANEL:, 0]
    expected = cv2.resize(crops[9, 2], (pictures.PANEL, pictures.PANEL))
    assert np.abs(centre[60:].astype(int) - expected[60:]).max() <= 1


class Corner(torch.nn.Module):
    """A classifier that looks at one corner of the centre slices only."""

    settings = dict(size=32)

    def forward(self, crops):
        return crops[:, :, 2, 4:10, 20:28].mean((2, 3))


def test_the_heat_map_is_hot_where_the_model_looks():
    crops = np.random.default_rng(0).integers(1, 255, (15, 6, 32, 32), np.uint8)
    crops[3] = 255  # among the largest, which alone count
    heat = pictures.heat_map(Corner(), crops, torch.device("cpu"))
    y, x = np.unravel_index(heat[3].argmax(), (32, 32))
    assert heat.shape == (15, 32, 32) and heat.max() == 1
    assert 4 <= y < 10 and 20 <= x < 28 and heat[3, 25:, :12].max() < 0.01


@pytest.mark.parametrize("rows", ((26, 31), (0, 3)))
def test_one_vertebra_at_either_end_of_a_study_is_drawn(rows, volume, tmp_path):
    probability = np.zeros((7, 32, 32, 32), np.float32)
    probability[0, slice(*rows), 10:20, 10:20] = 0.9
    pictures.overview(tmp_path / "o.png", volume, probability, np.full(8, 0.3))
    assert cv2.imread(str(tmp_path / "o.png")).std() > 1


def test_names_that_crowd_are_moved_apart_and_stay_in_the_picture():
    moved = pictures.spread([100, 102, 101, 300])
    assert moved.tolist() == [100, 132, 116, 300]
    low = pictures.spread([pictures.PANEL - 20] * 7)
    assert low.max() <= pictures.PANEL - pictures.MARGIN and np.diff(np.sort(low)).min() >= 16


def test_the_slice_to_look_at_is_marked_and_the_patient_named(volume, words, tmp_path):
    probability = np.zeros((7, 32, 32, 32), np.float32)
    probability[4, 10:14, 10:20, 10:20] = 0.9
    places = {"C5": {"slice": 24}}
    pictures.overview(tmp_path / "o.png", volume, probability, np.full(8, 0.3), places=places)
    marked = [(x, y) for word, x, y in words if word == "C5: slice 24"]
    scale = (pictures.PANEL - 48) / 128  # of 128 mm from head to foot
    assert len(marked) == 1 and abs(marked[0][1] + 3 - 24 - 47 * scale) < 2
    assert "patient" in [word for word, *_ in words]


def test_bars_are_as_tall_as_counts(words):
    counts = {"C1": 4, "C2": 0, "C3": 10, "C4": 5}
    image = pictures.chart("Fractures", counts, ("vertebra", "studies"))
    bars = coloured(image).sum(0)
    slot = (pictures.PANEL - 24) / 4
    tall = np.array([bars[int(12 + slot * (k + 0.5))] for k in range(4)])
    assert np.abs(tall / tall.max() * 10 - [4, 0, 10, 5]).max() < 0.1
    assert {"4", "0", "10", "5", *counts, "Fractures", "vertebra", "studies"} <= {
        w for w, _, _ in words}


def test_curves_rise_and_fall_with_the_numbers(tmp_path):
    history = [dict(epoch=k + 1, train_loss=4 - k, lr=1e-3, score=1 + k) for k in range(4)]
    pictures.draw_curves(tmp_path / "curves.png", history)
    lines = np.hsplit(coloured(cv2.imread(str(tmp_path / "curves.png"))), 3)
    ends = [[np.flatnonzero(line[:, x]).mean() for x in (72, 395)] for line in lines]
    assert ends[0][0] + 100 < ends[0][1]  # the loss falls: further from the top
    assert ends[1][0] > ends[1][1] + 100
    assert abs(ends[2][0] - ends[2][1]) < 2


def test_eda_tells_from_headers_what_the_volumes_are(phantom_data, tmp_path, monkeypatch, capsys):
    drawn = {}
    monkeypatch.setattr(pictures, "chart", lambda title, counts, axes: drawn.update(
        {axes[0]: counts}) or np.zeros((4, 4, 3), np.uint8))
    assert modes.main(["eda", "--data", str(phantom_data), "--out", str(tmp_path)]) == 0
    table = pd.read_csv(tmp_path / "studies.csv").set_index(cspine.STUDY)
    assert len(table) == 6 and table["mask"].all() and table.C1.notna().sum() == 4
    for folder in phantom_data.glob("*_images/*"):
        volume, row = cspine.read_volume(folder), table.loc[folder.name]
        assert row.slices == len(volume.hu)
        assert row.spacing_mm == pytest.approx(volume.spacing[0], rel=1e-3)
        assert row.extent_mm == pytest.approx(volume.spacing[0] * len(volume.hu), rel=1e-3)
    labels = pd.read_csv(phantom_data / "train.csv")
    assert drawn["fractured vertebra"] == labels[list(cspine.VERTEBRAE)].sum().to_dict()
    assert drawn["fractured together"]["C1+C7"] == (labels.C1 & labels.C7).sum()
    for counts in (drawn["slices"], drawn["order"], drawn["extent mm"]):
        assert sum(counts.values()) == 6
    assert "Unusual" in capsys.readouterr().out


def test_eda_takes_an_empty_label_as_unknown(phantom_data, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(pictures, "chart", lambda title, counts, axes: drawn.update(
        {axes[0]: counts}) or np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "train_images").symlink_to(phantom_data / "train_images")
    table = pd.read_csv(phantom_data / "train.csv").astype({"C3": object})
    table[[*cspine.VERTEBRAE]] = 0
    table.loc[0, "C3"], table.loc[1, ["C1", "C7"]] = np.nan, 1
    table.to_csv(tmp_path / "train.csv", index=False)
    options = ["--data", str(tmp_path), "--weights", str(tmp_path), "--out", str(tmp_path / "o")]
    assert modes.main(["eda", *options]) == 0
    assert drawn["fractured vertebra"] == dict.fromkeys(cspine.VERTEBRAE, 0) | dict(C1=1, C7=1)
    assert drawn["fractured vertebrae per patient"] == {0: 3, 2: 1}


HEAD = "epoch,score,train_loss,lr\n"


@pytest.mark.parametrize("text, drawn, said", (
    (HEAD + "1,0.6,0.7,1e-3\n2,0.", 1, ""), ("stage,step\nlong,100\n", 0, ""),
    ("", 0, "not drawn"), (HEAD, 0, "not drawn"), (HEAD + "1,x,0.7,1e-3\n2,0.5,0.6,1e-4\n", 0,
                                                  "not drawn")))
def test_a_damaged_log_is_told_of_and_costs_the_others_nothing(
        text, drawn, said, phantom_data, tmp_path, monkeypatch, capsys):
    """A training of other stages than epochs has no such curves."""
    monkeypatch.setattr(pictures, "chart", lambda *given: np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "patient_fold0_log.csv").write_text(text)
    (tmp_path / "vertebra_fold0_log.csv").write_text(HEAD + "1,0.6,0.7,1e-3\n")
    assert modes.main(["eda", "--data", str(phantom_data), "--weights", str(tmp_path),
                       "--out", str(tmp_path)]) == 0
    out, errors = capsys.readouterr()
    assert f"the curves of {1 + drawn} trainings" in out
    lines = [line for line in errors.splitlines() if "_log.csv" in line]
    assert len(lines) == bool(said) and all(said in line for line in lines)
    assert (tmp_path / "vertebra_fold0_curves.png").exists()


@pytest.mark.parametrize("numbers, order", [
    (range(1, 21), "head first"), (range(20, 0, -1), "foot first"),
    (np.random.default_rng(0).permutation(20) + 1, "mixed")])
def test_the_order_of_files_is_told(write_series, numbers, order):
    folder = write_series(np.zeros((20, 8, 8), np.int16), step=-0.7, numbers=numbers)
    row = pictures.describe_study(folder)
    assert row["order"] == order and row["spacing_mm"] == pytest.approx(0.7)


def test_what_is_unusual_is_said_and_nothing_else():
    table = pd.DataFrame({cspine.STUDY: [f"s{k}" for k in range(20)], "slices": [300] * 20,
                          "spacing_mm": np.linspace(0.5, 1, 20), "order": ["head first"] * 20})
    assert list(pictures.unusual(table)) == []
    table.loc[3, "spacing_mm"], table.loc[7, "order"] = 5.0, "foot first"
    spacing, order = pictures.unusual(table)
    assert spacing.startswith("spacing_mm: 1 of 20") and "5.0 (s3)" in spacing
    assert order.startswith("order: 1 of 20") and "foot first (s7)" in order


@pytest.fixture
def weights(tmp_path):
    """A segmenter and a classifier, untrained."""
    torch.manual_seed(0)
    models = dict(segmenter=cspine.Segmenter("resnet10t", 32),
                  vertebra=cspine.VertebraClassifier("lcnet_050", 64, hidden=8))
    for kind, model in models.items():
        cspine.save_checkpoint(tmp_path / f"{kind}_fold0.pt", kind, cspine.RECIPES[kind],
                               settings=model.settings, tensors=model.state_dict())
    return tmp_path


def test_show_gives_no_dice_of_what_the_mask_has_not(phantom_data, weights, tmp_path, monkeypatch,
                                                     capsys):
    monkeypatch.setattr(pictures, "true_mask", lambda *_: (None, np.r_[np.nan, np.full(6, 0.5)]))
    uid = pd.read_csv(phantom_data / "test.csv")[cspine.STUDY][0]
    monkeypatch.setattr(cspine.vertebra_slices, "__defaults__", (64, "last", 1.0))  # crops
    assert modes.main(["show", uid, "--data", str(phantom_data), "--weights", str(weights),
                       "--out", str(tmp_path)]) == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert "Dice" not in first and all(line.endswith("Dice 0.500") for line in others)


def test_show_draws_a_study_and_says_what_it_sees(phantom_data, weights, tmp_path, monkeypatch, capsys):
    def segment(models, volume, device, report):  # the true masks of C1 to C6
        report("out of order")
        path = phantom_data / "segmentations" / f"{volume.uid}.nii"
        labels = cspine.read_mask(path, volume, (64,) * 3)
        return np.stack([(labels == v) & (v < 7) for v in range(1, 8)]).astype(np.float32)

    monkeypatch.setattr(pictures, "segment", segment)
    monkeypatch.setattr(pictures, "not_in_hu", lambda hu: "no CT")
    monkeypatch.setattr(cspine.vertebra_slices, "__defaults__", (64, "last", 1.0))  # crops
    uid = pd.read_csv(phantom_data / "test.csv")[cspine.STUDY][0]
    out = tmp_path / "pictures"
    assert modes.main(["show", uid, "--data", str(phantom_data), "--weights", str(weights),
                        "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert f"study {uid}: no CT" in printed.err and f"study {uid}: out of order" in printed.err
    lines = printed.out.splitlines()
    assert [line[:3] for line in lines] == [f"{v}:" for v in cspine.VERTEBRAE]
    seen = [line for line in lines if ": seen, " in line]
    assert seen and all(line.endswith("Dice 1.000") for line in seen)
    assert "not seen" in lines[6]
    image = cv2.imread(str(out / "overview.png"))
    assert image.shape == (2 * pictures.PANEL, 3 * pictures.PANEL, 3)
    for name in cspine.VERTEBRAE:
        assert (out / f"{name}.png").stat().st_size > 1000


def test_show_of_an_unknown_study_is_one_line(phantom_data, weights, capsys):
    assert modes.main(["show", "nobody", "--data", str(phantom_data)]) == 2
    assert "nobody" in capsys.readouterr().err
