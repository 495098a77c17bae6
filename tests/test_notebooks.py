"""I rely on: my weights get to Kaggle by two commands."""

import json

import modes
from small_kernel import make_weights


def test_the_models_and_nothing_else_become_a_data_set(tmp_path, capsys):
    weights = make_weights(tmp_path / "w", patient=False)
    for name in ("vertebra_fold0_last.pt", "vertebra_fold0_log.csv", "calibration.json"):
        (weights / name).write_text("{}")
    out = tmp_path / "kernel"
    assert modes.main(["notebook", "--weights", str(weights), "--out", str(out),
                       "--weights-dataset", "me/my-weights"]) == 0
    assert {path.name for path in (out / "weights").iterdir()} == {
        "segmenter_fold0.pt", "vertebra_fold0.pt", "calibration.json", "dataset-metadata.json"}
    meta = json.loads((out / "weights" / "dataset-metadata.json").read_text())
    assert meta["id"] == "me/my-weights" and meta["licenses"] and 6 <= len(meta["title"]) <= 50
    assert capsys.readouterr().out.splitlines() == [
        f"kaggle datasets create -p {out / 'weights'}", f"kaggle kernels push -p {out}"]
