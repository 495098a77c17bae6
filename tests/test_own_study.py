"""I rely on: one's own CT, DICOM or NIfTI, gets names, masks that overlay, and a slice to look at."""

import gzip
import json
import shutil
import threading
from itertools import permutations, product

import numpy as np
import pandas as pd
import pytest
import torch

import cspine
from small_kernel import make_study, make_weights
from test_masks import nifti

pytestmark = pytest.mark.usefixtures("one_thread")
EDGE = 32  # cells of the small segmenter's cube


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
    stored, _, _, voxel_from_lps = cspine.read_nifti(path)
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
    mask, _, _, voxel_from_lps = cspine.read_nifti(tmp_path / "mask.nii.gz")
    assert np.array_equal(mask, stored > 500)
    assert np.allclose(voxel_from_lps, cspine.read_nifti(path)[3], atol=1e-4)


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


def test_what_was_odd_is_said_below_the_table(predict, ct, tmp_path, capsys):
    (tmp_path / "dicom" / "3.dcm").write_bytes(b"damaged")
    status, table = predict("dicom")
    assert status == 0 and "left out" in table.warnings[0]
    assert "study dicom: 3.dcm" in capsys.readouterr().err


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
    assert "no cervical vertebra seen" in capsys.readouterr().err


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
