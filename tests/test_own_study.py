"""I rely on: one's own CT, DICOM or NIfTI, gets names, masks that overlay, and a slice to look at."""

import gzip
import io
import json
import re
import shutil
import threading
import warnings
from itertools import permutations, product

import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
from pydicom.dataset import Dataset

import cspine
from small_kernel import make_study, make_weights
from test_masks import nifti

pytestmark = pytest.mark.usefixtures("one_thread")
EDGE = 32  # cells of the small segmenter's cube
LPS = np.diag([-1.0, -1.0, 1.0])  # of a NIfTI's axes


def turned(degrees):
    """A rotation (3, 3) about z, then about x."""
    angles = torch.zeros(3, 3, dtype=torch.float64)
    angles[0, 1], angles[1, 2] = np.radians(degrees)
    return torch.matrix_exp(angles - angles.T).numpy()


def volume_of(labels, grid=((0, 1, 2), (True, False, False)), degrees=(0, 0)):
    """A Volume that holds labels, 0.8 x 0.6 x 0.5 mm a voxel, head first, perhaps oblique."""
    affine = np.eye(4)
    affine[:3, :3] = turned(degrees) @ [[0, 0, 0.5], [0, 0.6, 0], [-0.8, 0, 0]]
    affine[:3, 3] = 10, -20, 30
    return cspine.Volume("u", np.zeros(labels.shape, np.int16), (0.8, 0.6, 0.5), affine, grid=grid)


def two_boxes():
    labels = np.zeros((20, 24, 28), np.uint8)
    labels[3:8, 5:20, 7:15] = 3
    labels[9:12, 2:9, 20:27] = 5
    return labels


# ----------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("axes", [*permutations(range(3))])
@pytest.mark.parametrize("degrees", ((0, 0), (20, -10)))
def test_a_mask_reads_back_as_it_was_by_sform_and_by_qform(axes, degrees, tmp_path):
    path, labels = tmp_path / "m.nii.gz", two_boxes()
    for flip in product((False, True), repeat=3):
        volume = volume_of(labels, (axes, flip), degrees)
        cspine.write_nifti(path, labels, volume)
        assert np.array_equal(cspine.read_mask(path, volume), labels)
        raw = bytearray(gzip.decompress(path.read_bytes()))
        assert raw[252:256] == b"\1\0\1\0"  # the codes of qform and sform
        raw[254:256] = b"\0\0"
        (tmp_path / "q.nii").write_bytes(raw)
        assert np.array_equal(cspine.read_mask(tmp_path / "q.nii", volume), labels)


def test_nibabel_reads_the_same_mask(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    path, labels = tmp_path / "m.nii.gz", two_boxes()
    volume = volume_of(labels, degrees=(20, -10))
    cspine.write_nifti(path, labels, volume)
    image = nibabel.load(path)
    assert np.array_equal(np.asarray(image.dataobj), labels[::-1].T)
    assert np.allclose(image.get_sform(), image.get_qform(), atol=1e-4)
    assert image.header.get_xyzt_units()[0] == "mm" and image.get_data_dtype() == np.uint8


def test_the_header_is_pinned(tmp_path):
    """By the offsets of nifti1.h: foot to head, as a viewer reads the series itself."""
    path, labels = tmp_path / "m.nii.gz", two_boxes()
    cspine.write_nifti(path, labels, volume_of(labels))
    raw = gzip.decompress(path.read_bytes())
    assert np.frombuffer(raw, "<i2", 4, 40).tolist() == [3, 28, 24, 20]
    srow = np.frombuffer(raw, "<f4", 12, 280).reshape(3, 4)
    assert np.allclose(srow, [[-0.5, 0, 0, -10], [0, -0.6, 0, 20], [0, 0, 0.8, 30 - 19 * 0.8]])
    assert len(raw) == 352 + labels.size and raw[344:348] == b"n+1\0"


def test_a_file_of_others_is_not_overwritten(tmp_path):
    path, labels = tmp_path / "m.nii.gz", two_boxes()
    cspine.write_nifti(path, labels, volume_of(labels))
    cspine.write_nifti(path, labels, volume_of(labels))  # its own is
    for other in (nifti(labels), gzip.compress(nifti(labels))):
        path.write_bytes(other)
        with pytest.raises(cspine.UserError, match="not overwritten"):
            cspine.write_nifti(path, labels, volume_of(labels))
        assert path.read_bytes() == other


def test_the_largest_piece_is_kept_whole():
    mask = np.zeros((8, 9, 9), bool)
    mask[:, 1, 1] = mask[7, 1, 1:8] = mask[:, 1, 7] = True  # a U: parts that meet below
    expected = mask.copy()
    mask[2:4, 5:8, 3:6] = True  # a block of 18 cells, fewer than 21
    assert np.array_equal(cspine.largest_piece(mask), expected)


@pytest.mark.parametrize("degrees", ((0, 0), (20, -10)))
@pytest.mark.parametrize("flip", [*product((False, True), repeat=3)])
def test_masks_lie_where_the_probabilities_do(degrees, flip, tmp_path):
    """In the study and, by its file's sform, in space: also flipped, oblique, foot first."""
    probability = np.zeros((7, EDGE, EDGE, EDGE), np.float32)
    probability[2, 4:10, 8:20, 10:22] = 0.9
    probability[3, 12:18, 8:20, 10:22] = 0.9
    probability[3, 26:28, 2:4, 2:4] = 0.9  # a stray
    volume = volume_of(np.zeros((60, 96, 50), np.uint8), ((0, 1, 2), flip), degrees)
    labels = cspine.vertebra_labels(volume, probability)
    assert set(np.unique(labels)) == {0, 3, 4} and not labels[45:].any()
    path = tmp_path / "m.nii.gz"
    cspine.write_nifti(path, labels, volume)
    stored, _, _, voxel_from_lps, _ = cspine.read_nifti(path)
    lps_from_voxel = np.linalg.inv(voxel_from_lps)
    for v, middle in ((3, 7), (4, 15)):
        centre = np.argwhere(labels == v).mean(0)
        expected = np.array([middle, 14, 16]) / EDGE * labels.shape - 0.5
        assert abs(centre - expected).max() < 0.5
        in_file = np.argwhere(stored == v).mean(0)
        lps = (lps_from_voxel @ [*in_file, 1] - volume.affine @ [*expected, 1])[:3]
        assert np.linalg.norm(lps) < 0.5 * np.linalg.norm(volume.spacing)
        share = (labels == v).mean() / (6 * 12 * 12 / EDGE**3)
        assert 0.9 < share < 1.15


def test_measures_are_those_of_boxes_and_the_lordosis_that_of_wedges():
    """Bodies of 20 mm, a canal, a spine; the lower ends of C2 and C7 fall by known slopes."""
    labels = np.zeros((200, 120, 60), np.uint8)
    for v, top, slope in ((2, 20, 0.3), (7, 140, -0.2)):
        for y in range(20, 54):
            end = top + 25 + round(slope * (y - 37) * 0.6 / 0.8)
            labels[top:end, y, 10:50] = v
        labels[top:top + 12, 75:100, 26:34] = v
    volume = volume_of(labels)
    places = {"C2": {}, "C7": {}}
    lordosis = cspine.measure(labels, volume, places)
    expected = np.degrees(np.arctan(0.3) + np.arctan(0.2))
    assert lordosis == pytest.approx(expected, abs=1.5)
    mine = labels == 2
    assert places["C2"]["cm3"] == pytest.approx(mine.sum() * 0.24 / 1000)
    assert places["C2"]["width_mm"] == 20 and places["C2"]["depth_mm"] == pytest.approx(48)
    z, y, x = np.argwhere(mine).mean(0)
    expected = [10 + 0.5 * x, -20 + 0.6 * y, 30 - 0.8 * z]
    assert np.allclose(places["C2"]["centroid_lps_mm"], expected)


def test_where_to_look_is_the_middle_of_the_strongest_step():
    """By hand: C3 and a cell on either side lie in the slices 21 to 50; step 10 is in slice 40."""
    probability = np.zeros((7, EDGE, EDGE, EDGE), np.float32)
    probability[2, 8:16, 4:10, 20:30] = 0.9
    volume = volume_of(np.zeros((96, 64, 128), np.uint8), degrees=(20, -10))
    one, other = np.full((2, 7, 15), 0.2)
    one[2, [3, 9]], other[2, 9] = (0.6, 0.5), 0.9
    outputs = [cspine.Output(one, np.nan), cspine.Output(other, np.nan)]
    places = cspine.strongest_steps(volume, probability, outputs, 1.0)
    assert [*places] == ["C3"] and places["C3"]["slice"] == 41
    assert np.allclose(places["C3"]["lps_mm"], (volume.affine @ [40, 13.5, 99.5, 1])[:3])
    assert np.allclose(places["C3"]["steps"], (one[2] + other[2]) / 2)


def test_a_voxel_of_two_vertebrae_is_the_likelier_ones():
    volume = volume_of(np.zeros((EDGE, EDGE, EDGE), np.uint8))
    for chances, border in (((0.9, 0.7), 12), ((0.7, 0.9), 10)):
        probability = np.zeros((7, EDGE, EDGE, EDGE), np.float32)
        probability[2, 4:12, 8:20, 8:20], probability[3, 10:18, 8:20, 8:20] = chances
        labels = cspine.vertebra_labels(volume, probability)
        assert (labels[4:border, 8:20, 8:20] == 3).all()
        assert (labels[border:18, 8:20, 8:20] == 4).all()


# --------------------------------------------------------------------------------------- predict


@pytest.fixture
def predict(tmp_path, monkeypatch):
    """predict(path or option, ...) -> (exit status, answers.csv or None), in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    small = 32, *cspine.vertebra_slices.__defaults__[1:]
    monkeypatch.setattr(cspine.vertebra_slices, "__defaults__", small)
    monkeypatch.setattr(cspine, "LEAST_CM3", 0.0)  # make_weights' vertebrae are faint
    make_weights(tmp_path / "weights")

    def run(*arguments):
        given = [*map(str, arguments), "--weights", "weights", "--workers", "1"]
        status = cspine.main(["predict", *given])
        path = tmp_path / "answers" / "answers.csv"
        return status, pd.read_csv(path) if path.exists() else None
    return run


def write_ct(path, volume, change=lambda hu: hu):
    """A Volume as NIfTI, int16, foot to head."""
    affine = volume.affine[:3] * [[-1], [-1], [1]]
    last = len(volume.hu) - 1
    rows = np.c_[affine[:, [2, 1]], -affine[:, 0], affine[:, 3] + last * affine[:, 0]]
    data = nifti(change(volume.hu[::-1].T.astype(int)), code=4, sform=rows)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def ct(tmp_path):
    """A small study as DICOM files and as NIfTI."""
    make_study(tmp_path / "dicom")
    volume = cspine.read_volume(tmp_path / "dicom")
    write_ct(tmp_path / "ct.nii.gz", volume)
    return volume


def test_dicom_and_nifti_of_one_ct_have_the_same_answers(predict, ct, tmp_path, capsys):
    status, table = predict("dicom", "ct.nii.gz", "--json", "--masks", "masks")
    out = capsys.readouterr().out
    assert status == 0 and list(table.study) == ["dicom", "ct"]
    columns = [*cspine.TARGETS, "C3_slice", "slices"]
    assert np.allclose(table.loc[0, columns].astype(float), table.loc[1, columns].astype(float))
    assert table.C3_lps_mm[0] == table.C3_lps_mm[1]
    assert table.note.str.contains("not for diagnosis").all() and "not for diagnosis" in out
    worst = table.loc[0, [*cspine.VERTEBRAE]].astype(float).idxmax()
    place, chance = table[f"{worst}_slice"][0], table[worst][0]
    look = f"look at slice {place} of 20 from the head, {place}.dcm: {worst}, {chance:.2f}"
    assert f"dicom: {look}" in out.splitlines()
    content = json.loads((tmp_path / "answers" / "answers.json").read_text())
    place = content["studies"][0]["vertebrae"]["C3"]
    assert place["file"] == f"{place['slice']}.dcm" and len(place["steps"]) == 15
    assert place["sop_instance_uid"] == f"1.2.3.9.{place['slice']}"


def test_an_older_json_of_other_studies_is_told_of(predict, ct, tmp_path, capsys):
    path = tmp_path / "answers" / "answers.json"
    path.parent.mkdir()
    path.write_text("{}")
    status, table = predict("dicom")
    assert status == 0 and len(table) == 1 and path.read_text() == "{}"
    assert "answers/answers.json is of an earlier run, and stays" in capsys.readouterr().err
    predict("dicom", "--json")
    assert "earlier run" not in capsys.readouterr().err and path.read_text() != "{}"


def test_the_turned_volume_equals_the_series(ct, tmp_path):
    other = cspine.read_volume(tmp_path / "ct.nii.gz")
    assert np.array_equal(other.hu, ct.hu) and np.allclose(other.affine, ct.affine, atol=1e-4)
    assert [file for file, _ in ct.sources] == [f"{k + 1}.dcm" for k in range(20)]


@pytest.mark.parametrize("axes", [*permutations(range(3))])
def test_the_mask_of_a_nifti_has_its_very_voxels(axes, ct, tmp_path):
    affine = (ct.affine[:3] * [[-1], [-1], [1]])[:, [*axes, 3]]
    path, stored = tmp_path / "turned.nii", ct.hu.transpose(axes)
    path.write_bytes(nifti(stored, code=4, sform=affine))
    volume = cspine.read_volume(path)
    cspine.write_nifti(tmp_path / "mask.nii.gz", np.uint8(volume.hu > 500), volume)
    mask, _, _, voxel_from_lps, _ = cspine.read_nifti(tmp_path / "mask.nii.gz")
    assert np.array_equal(mask, stored > 500)
    assert np.allclose(voxel_from_lps, cspine.read_nifti(path)[3], atol=1e-4)


@pytest.mark.parametrize("placed", [dict(qform=0.3, code=(1, 2)), dict(code=(0, 0))])
def test_the_mask_of_a_nifti_is_placed_by_each_of_the_forms_that_the_ct_has(placed, ct, tmp_path):
    """Viewers differ in which of two forms they trust: each has the CT's own."""
    affine = ct.affine[:3, [2, 1, 0, 3]] * [[-1], [-1], [1]]
    raw = bytearray(nifti(ct.hu.T, code=4, sform=affine))
    raw[252:256] = np.array(placed["code"], "<i2").tobytes()
    raw[256:280] = np.array([0.1, 0.2, placed.get("qform", 0), 4, 5, 6], "<f4").tobytes()
    (tmp_path / "two.nii").write_bytes(raw)
    volume = cspine.read_volume(tmp_path / "two.nii")
    assert volume.header.base.base is None  # else the whole file would stay in memory
    cspine.write_nifti(tmp_path / "mask.nii.gz", np.uint8(volume.hu > 500), volume)
    mask = gzip.decompress((tmp_path / "mask.nii.gz").read_bytes())
    for part in (slice(76, 92), slice(252, 328)):  # pixdim; both codes and both forms
        assert mask[part] == raw[part]


def test_the_mask_of_a_tilted_series_has_a_qform_of_its_slices_own_axes(tmp_path):
    """ITK reads the qform where the sform is sheared, and shows the CT by these axes."""
    volume = volume_of(two_boxes())
    tilt = np.radians(20)
    down = volume.affine[:3, 0].copy()
    volume.affine[:3, 1] = 0.6 * np.array([0, np.cos(tilt), -np.sin(tilt)])
    cspine.write_nifti(tmp_path / "m.nii.gz", two_boxes(), volume)
    raw = bytearray(gzip.decompress((tmp_path / "m.nii.gz").read_bytes()))
    raw[254:256] = b"\0\0"
    header = np.frombuffer(bytes(raw[:348]), cspine.NIFTI_HEADER.newbyteorder("<"))[0]
    x, y, z = (column / np.linalg.norm(column) for column in cspine.nifti_affine(header)[:3, :3].T)
    assert np.allclose(x, [-1, 0, 0], atol=1e-3)
    assert np.allclose(y, [0, -np.cos(tilt), -np.sin(tilt)], atol=1e-3)
    assert np.allclose(abs(z @ down) / 0.8, np.cos(tilt), atol=1e-3)


def test_an_empty_path_and_an_out_that_names_a_csv_are_refused(predict, ct, capsys):
    assert predict("") == (2, None)
    assert "an empty PATH" in capsys.readouterr().err
    assert predict("dicom", "--out", "result.csv")[0] == 2
    assert "result.csv: with a PATH, --out and --masks are folders" in capsys.readouterr().err


def test_a_folder_of_studies_and_one_that_fails(predict, ct, tmp_path, capsys):
    (tmp_path / "all" / "empty").mkdir(parents=True)
    (tmp_path / "dicom").rename(tmp_path / "all" / "good")
    status, table = predict("all")
    assert status == 0 and list(table.status) == ["failed", "ok"]
    assert table.C1.isna()[0] and "usable slices" in table.warnings[0]


def test_files_beside_folders_of_studies_are_said_to_be_left_out(ct, tmp_path, capsys):
    (tmp_path / "all").mkdir()
    (tmp_path / "dicom").rename(tmp_path / "all" / "good")
    (tmp_path / "all" / "enhanced.dcm").write_bytes(b"")
    assert cspine.studies_in(tmp_path / "all") == [tmp_path / "all" / "good"]
    assert "other files in it, left out: 1" in capsys.readouterr().err


def test_what_is_no_study_of_the_users_is_left_alone(ct, tmp_path):
    """Hidden files, a Mac's, our own answers, and links that lead back."""
    home = tmp_path / "home"
    for name in ("good", ".git", "__MACOSX", "answers"):
        (home / name).mkdir(parents=True)
    for name in ("n.nii.gz", "._n.nii.gz"):
        (home / name).write_bytes((tmp_path / "ct.nii.gz").read_bytes())
    for k in range(20):
        (home / f"{k}.json").write_text("{}")  # as dcm2niix writes
    (home / "self").symlink_to(home)
    found = cspine.named_studies([home], {(home / "answers").resolve()})
    assert found == {"good": home / "good", "n": home / "n.nii.gz"}


def test_a_study_without_preambles_stays_one_beside_a_folder(ct, tmp_path):
    study = tmp_path / "dicom"
    for path in study.iterdir():
        path.write_bytes(path.read_bytes()[132:])
    (study / "masks").mkdir()
    (study / "masks" / "x.nii.gz").write_bytes(b"")
    assert cspine.studies_in(study) == [study]
    assert cspine.named_studies([study], {study / "masks"}) == {"dicom": study}


def test_a_way_up_is_followed_as_the_system_does(ct, tmp_path):
    (tmp_path / "a" / "inner").mkdir(parents=True)
    (tmp_path / "a" / "ct.nii.gz").write_bytes(b"")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "link").symlink_to(tmp_path / "a" / "inner")
    found = cspine.named_studies([f"{tmp_path}/b/link/../ct.nii.gz"])
    assert [*found.values()] == [tmp_path / "a" / "ct.nii.gz"]


def test_studies_have_names_that_tell_them_apart_and_stay_inside(ct, tmp_path, monkeypatch):
    (tmp_path / "neck").mkdir()
    (tmp_path / "neck.nii.gz").write_bytes(b"")
    found = cspine.named_studies([tmp_path / "neck", tmp_path / "neck.nii.gz"])
    assert len(found) == 2 and not any("/" in name for name in found)
    monkeypatch.chdir(tmp_path / "neck")
    assert [*cspine.named_studies([".."])][0][0] != "."


def test_masks_over_files_of_others_are_refused_before_the_work(predict, ct, tmp_path, capsys):
    (tmp_path / "cts").mkdir()
    (tmp_path / "ct.nii.gz").rename(tmp_path / "cts" / "ct.nii.gz")
    status, table = predict("cts/ct.nii.gz", "--masks", "cts")
    assert status == 2 and table is None
    assert "not a mask of ours" in capsys.readouterr().err


def test_an_earlier_mask_does_not_stay_beside_a_study_that_fails(predict, ct, tmp_path):
    shutil.copytree(tmp_path / "dicom", tmp_path / "other")
    assert predict("dicom", "other", "--masks", "masks")[0] == 0
    for path in [*(tmp_path / "dicom").iterdir()][:10]:
        path.unlink()
    assert list(predict("dicom", "other", "--masks", "masks")[1].status) == ["failed", "ok"]
    assert [path.name for path in (tmp_path / "masks").iterdir()] == ["other.nii.gz"]
    assert predict("other", "--masks", "masks", "--device", "none")[0] == 2
    (tmp_path / "link").symlink_to(tmp_path / "masks")
    for folder in ("masks", "masks/../masks", "link"):
        assert predict("masks/other.nii.gz", "--masks", folder)[0] == 2  # its own input
        assert (tmp_path / "masks" / "other.nii.gz").exists()


def test_what_concerns_the_whole_study_is_said_before_its_files(predict, ct, tmp_path):
    """Of many words the screen shows the first."""
    for k in range(8):
        (tmp_path / "dicom" / f"capture{k}.dcm").write_bytes(b"no image")
    (tmp_path / "dicom" / "9.dcm").unlink()
    _, table = predict("dicom")
    assert table.warnings[0].startswith("uneven positions: 19 slices")
    assert table.warnings[0].count("no DICOM image") == 8


def test_uids_that_break_the_rules_are_read_without_a_word(predict, ct, tmp_path, capsys):
    """As of data without names; pydicom would warn twice a file."""
    mode = pydicom.config.settings.reading_validation_mode
    for path in (tmp_path / "dicom").iterdir():
        path.write_bytes(path.read_bytes().replace(b"1.2.3.9.", b"ANON_9._"))
    with warnings.catch_warnings(action="error"):
        assert predict("dicom")[0] == 0
    assert "ANON" not in capsys.readouterr().err
    assert pydicom.config.settings.reading_validation_mode == mode


def test_what_was_odd_is_said_below_the_table(predict, ct, tmp_path, capsys):
    (tmp_path / "dicom" / "3.dcm").write_bytes(b"damaged")
    status, table = predict("dicom")
    assert status == 0 and "left out" in table.warnings[0]
    assert re.search("study dicom: uneven.*; 3.dcm: no DICOM image", capsys.readouterr().err)


BAD = {
    "labels": (lambda hu: np.clip(hu, 0, 7), "no CT in HU"),
    "unsigned": (lambda hu: hu + 1024, "no CT in HU"),
    "thousandths": (lambda hu: hu // 1000, "no CT in HU"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_nifti_that_is_no_ct_is_refused_by_its_values(name, predict, ct, tmp_path, capsys):
    change, words = BAD[name]
    write_ct(tmp_path / "bad.nii", ct, change)
    status, table = predict("bad.nii")
    lines = capsys.readouterr().err.splitlines()
    assert status == 2 and table is None and len(lines) == 1 and words in lines[0]


def test_bad_paths_are_one_line(predict, ct, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").write_text("")
    for arguments, words in ((["nowhere"], "no such file"), (["empty"], "usable slices"),
                             (["dicom", "--out", "taken/x"], "cannot write"),
                             (["dicom", "--out", "taken"], "are folders"),
                             (["--json"], "go with a PATH"),
                             (["dicom", "--resume"], "for the competition")):
        status, _ = predict(*arguments)
        lines = capsys.readouterr().err.splitlines()
        assert status == 2 and len(lines) == 1 and words in lines[0], lines


def test_without_a_neck_there_is_no_prior(predict, ct, tmp_path, capsys):
    make_weights(tmp_path / "weights", unseen=cspine.VERTEBRAE)
    status, table = predict("dicom")
    assert status == 2 and table is None
    assert capsys.readouterr().err.endswith("no cervical vertebra seen\n")
    (tmp_path / "dicom" / "9.dcm").unlink()
    predict("dicom")  # perhaps that is why
    assert "no cervical vertebra seen; uneven positions" in capsys.readouterr().err


def test_what_is_faint_everywhere_is_no_vertebra(predict, ct, monkeypatch, capsys):
    monkeypatch.setattr(cspine, "LEAST_CM3", 1.0)
    status, table = predict("dicom")
    assert status == 2 and table is None
    assert "no cervical vertebra seen" in capsys.readouterr().err


def test_what_is_not_in_view_stays_empty(predict, ct, tmp_path):
    make_weights(tmp_path / "weights", unseen=("C1",))
    _, table = predict("dicom")
    assert table.C1.isna()[0] and table.C2.notna()[0] and table.status[0] == "partial"


def test_what_cannot_be_looked_into_is_left_out(ct, tmp_path, monkeypatch, capsys):
    """lost+found, or what belongs to another user."""
    (tmp_path / "all" / "lost+found").mkdir(parents=True)
    (tmp_path / "dicom").rename(tmp_path / "all" / "good")
    listed = cspine.Path.iterdir

    def iterdir(path):
        if path.name == "lost+found":
            raise PermissionError(13, "Permission denied")
        return listed(path)
    monkeypatch.setattr(cspine.Path, "iterdir", iterdir)
    assert [*cspine.named_studies([str(tmp_path / "all")])] == ["good"]
    assert "lost+found: Permission denied; left out" in capsys.readouterr().err


def test_one_study_that_ends_in_a_fault_does_not_end_the_others(
        predict, ct, tmp_path, monkeypatch, capsys):
    answer = cspine.answer_study

    def burst(volume, *others):
        if volume.uid == "dicom":
            raise RuntimeError("can't allocate memory")
        return answer(volume, *others)
    monkeypatch.setattr(cspine, "answer_study", burst)
    status, table = predict("dicom", "ct.nii.gz")
    assert status == 0 and list(table.status) == ["failed", "ok"]
    assert "RuntimeError" in table.warnings[0] and "allocate" in capsys.readouterr().err


def test_a_stray_that_is_no_vertebra_is_not_in_the_mask_either(predict, ct, tmp_path, monkeypatch):
    """One of C2, which is too small to be told of."""
    labels = np.zeros(ct.hu.shape, np.uint8)
    labels[2:6], labels[9, 9:11, 9], labels[12:16] = 1, 2, 3
    monkeypatch.setattr(cspine, "vertebra_labels", lambda *given: labels.copy())
    monkeypatch.setattr(cspine, "LEAST_CM3", 2.5 * abs(np.linalg.det(ct.affine)) / 1000)
    _, table = predict("dicom", "--masks", "masks")
    assert table.C1.notna()[0] and table.C2.isna()[0]
    written = cspine.read_mask(tmp_path / "masks" / "dicom.nii.gz", ct)
    assert np.array_equal(written, np.where(labels == 2, 0, labels))


def test_a_study_whose_file_hangs_ends_and_the_others_are_answered(
        ct, tmp_path, monkeypatch, capsys):
    """A clock of a twentieth of a second stands for ten minutes."""
    folder = tmp_path / "all"
    folder.mkdir()
    for name in "ab":
        shutil.copy(tmp_path / "ct.nii.gz", folder / f"{name}.nii.gz")
    real, free = cspine.read_volume, threading.Event()

    def read(path, workers):
        if path.name.startswith("a"):
            free.wait(60)
        return real(path, workers)

    waits = []

    def wait(futures, seconds):
        if seconds == cspine.ALONE_S:  # after which the next study is read, too
            return real_wait(futures, 0.05)
        waits.append(seconds)
        hangs = len(waits) == 1
        return real_wait(futures, 0.05 if hangs else 60)

    real_wait = cspine.wait
    monkeypatch.setattr(cspine, "read_volume", read)
    monkeypatch.setattr(cspine, "wait", wait)
    rows = {}

    def answer(volume, *given):
        rows[volume.uid] = 1
        raise cspine.StudyError("enough for this test")

    monkeypatch.setattr(cspine, "answer_somewhere", answer)
    weights = make_weights(tmp_path / "weights")
    command = ["predict", folder, "--weights", weights, "--out", tmp_path / "out"]
    assert cspine.main([*map(str, command), "--device", "cpu"]) == 2
    free.set()
    said = capsys.readouterr().err
    assert "study a: a: reading it took over 600 s" in said.replace(".nii.gz", "")
    assert len(rows) == 1 and set(waits) == {cspine.MAX_READ_S}


@pytest.mark.parametrize("axis", range(3))
def test_a_nifti_of_few_voxels_along_any_axis_is_no_study(axis, tmp_path):
    shape = [20, 20, 20]
    shape[axis] = 15
    hu = np.random.default_rng(0).integers(-1000, 1000, shape)
    (tmp_path / "ct.nii").write_bytes(nifti(hu, code=4, sform=np.c_[LPS, [0, 0, 0]]))
    with pytest.raises(cspine.StudyError, match="each axis needs at least 16"):
        cspine.read_volume(tmp_path / "ct.nii")


def test_voxels_that_are_no_numbers_are_air(tmp_path):
    """As some programs write what lies outside of the scanner's circle."""
    hu = np.random.default_rng(0).integers(-1000, 1000, (20, 18, 16)).astype(float)
    hu[0] = np.nan
    (tmp_path / "ct.nii").write_bytes(nifti(hu, code=16, sform=np.c_[LPS, [0, 0, 0]]))
    volume = cspine.read_volume(tmp_path / "ct.nii")
    assert (volume.hu[:, :, 0] == cspine.AIR_HU).all()
    assert np.array_equal(volume.hu[::-1, :, 1:].T, hu[1:])


@pytest.mark.parametrize("little", [True, False])
def test_a_file_without_preamble_and_meta_begins_as_dicom(little, ct, tmp_path):
    study = tmp_path / "dicom"
    for path in study.iterdir():
        data = pydicom.dcmread(io.BytesIO(path.read_bytes()))
        del data.file_meta
        bare = Dataset({element.tag: element for element in data})
        pydicom.dcmwrite(path, bare, implicit_vr=little, little_endian=little)
    (study / "masks").mkdir()
    (study / "masks" / "x.nii.gz").write_bytes(b"")
    assert cspine.studies_in(study) == [study]


def body_of(depth, ends=lambda y: 40, rows=range(20, 54)):
    """Voxels (N, 3) of a body `depth` rows deep that ends below at `ends`, 6 mm wide."""
    mask = np.zeros((80, 120, 60), bool)
    for y in range(20, 20 + depth):
        mask[20:ends(y), y, 24:36] = True
    mask[20:40, 100:110, 24:36] = True  # a spine, behind the canal
    return np.argwhere(mask), volume_of(mask)


@pytest.mark.parametrize("rows, measured", [(4, False), (5, True), (49, True), (51, False)])
def test_a_line_is_fitted_to_what_may_be_a_body(rows, measured):
    """Five rows at least and 30 mm at most: deeper, no canal divides body and arch."""
    assert (cspine.endplate_angle(*body_of(rows)) is not None) == measured


def test_rounded_edges_of_an_endplate_do_not_tilt_it():
    """The front edge is bevelled; the endplate between the edges is level."""
    voxels, volume = body_of(40, lambda y: 40 - max(0, 26 - y))
    assert cspine.endplate_angle(voxels, volume) == pytest.approx(0, abs=0.1)


def test_a_lower_end_is_that_of_the_middle_3_mm_to_either_side():
    voxels, volume = body_of(34)
    aside = [[z, y, x] for z in range(20, 60) for y in range(30, 40) for x in (22, 37)]
    both = np.concatenate([voxels, aside])  # 7.5 columns, 3.75 mm, from the middle
    assert cspine.endplate_angle(both, volume) == pytest.approx(0, abs=0.1)
    near = [[z, y, x] for z in range(20, 60) for y in range(30, 40) for x in (24, 35)]
    assert cspine.endplate_angle(np.concatenate([voxels, near]), volume) != pytest.approx(0, abs=0.1)


def test_the_volume_of_a_mask_is_that_of_sheared_voxels_too():
    """A gantry tilted by 30 degrees: the slices lie nearer to each other than their origins."""
    volume = volume_of(np.zeros((20, 20, 20), np.uint8))
    affine = volume.affine.copy()
    affine[1, 0] = 0.8 * np.tan(np.radians(30))
    places = {"C3": {}}
    spacing = tuple(np.linalg.norm(affine[:3, :3], axis=0))
    tilted = volume._replace(affine=affine, spacing=spacing)
    cspine.measure(np.full((20, 20, 20), 3, np.uint8), tilted, places)
    assert places["C3"]["cm3"] == pytest.approx(8000 * 0.8 * 0.6 * 0.5 / 1000)


def test_a_study_some_of_whose_vertebrae_are_too_small_is_partial(
        predict, ct, monkeypatch):
    labels = np.zeros(ct.hu.shape, np.uint8)
    labels[2:6], labels[12:16] = 1, 3
    monkeypatch.setattr(cspine, "LEAST_CM3", 1e-6)
    monkeypatch.setattr(cspine, "vertebra_labels", lambda *given: labels.copy())
    _, table = predict("dicom")
    assert table.status[0] == "partial" and table.seen[0] == "C1+C3"


def test_a_step_is_the_strongest_by_the_models_that_answer():
    probability = np.zeros((7, EDGE, EDGE, EDGE), np.float32)
    probability[2, 8:16, 4:10, 20:30] = 0.9
    volume = volume_of(np.zeros((96, 64, 128), np.uint8))
    steps = np.full((7, 15), 0.2)
    steps[2, 9] = 0.6
    outputs = [cspine.Output(steps, np.nan), cspine.Output(np.full((7, 15), np.nan), np.nan)]
    place = cspine.strongest_steps(volume, probability, outputs, 1.0)["C3"]
    assert place["slice"] == 41 and place["steps"] == pytest.approx(steps[2])
    steps[2, 3] = np.nan  # no model answers this step: it was taken for the strongest
    place = cspine.strongest_steps(volume, probability, outputs, 1.0)["C3"]
    assert place["slice"] == 41 and place["steps"] == pytest.approx(np.nan_to_num(steps[2]))


def test_masks_go_with_a_path(tmp_path, capsys):
    assert cspine.main(["predict", "--masks", str(tmp_path / "masks")]) == 2
    assert "--masks go with a PATH" in capsys.readouterr().err
    assert not (tmp_path / "masks").exists()
