"""I rely on: a training begins from ImageNet by itself, and a preset is a table that I may overrule."""

import dataclasses
import importlib.util
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from torch import nn

import cspine
from cspine import MODES, PRESETS, VertebraClassifier, build_parser, imagenet_file
from bench import MASKED_STUDIES, TRAINED_STUDIES, values_kept
from kaggle_training import CARD_TFLOPS, crops_gb, planned_hours, training_flops
from small_kernel import make_study, make_weights

CPU = torch.device("cpu")

TIMM = "tf_efficientnetv2_s"


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


# ---- --init auto ----


@pytest.mark.parametrize("place", [
    f"timm-weights/{TIMM}-eb54923e.pth", "weights/tf-efficientnetv2-s.in21k_ft_in1k/model.safetensors",
    "tf-efficientnet/pytorch/tf-efficientnetv2-s/1/pytorch_model.bin",
    "models/timm/tf-efficientnet/pytorch/tf-efficientnetv2-s/1/model.safetensors",
    f"models--timm--{TIMM}.in21k_ft_in1k/snapshots/5ae3/model.safetensors",
    f"datasets/me/timm/{TIMM}_21ft1k-d7dafa41.pth"])
def test_kaggles_layouts_are_searched(place, tmp_path, monkeypatch):
    monkeypatch.setattr(cspine, "KAGGLE", tmp_path)
    assert imagenet_file(TIMM, tmp_path / "data") is None
    path = touch(tmp_path / "input" / place)
    assert imagenet_file(TIMM, tmp_path / "data") == path
    assert imagenet_file("convnext_nano", tmp_path / "data") is None


@pytest.mark.parametrize("mount", ["input/competitions", "input"])
def test_the_competitions_data_is_found_where_kaggle_mounts_it(mount, tmp_path, monkeypatch):
    """Today's place, and that of earlier years; by the file itself, as pasted."""
    monkeypatch.setenv("KAGGLE_ROOT", str(tmp_path))
    name = Path(cspine.KAGGLE_DATA).name
    (tmp_path / mount / name).mkdir(parents=True)
    spec = importlib.util.spec_from_file_location("another", cspine.__file__)
    another = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "another", another)
    spec.loader.exec_module(another)
    assert Path(another.Shared().data) == tmp_path / mount / name


def test_a_name_with_a_tag_is_found_and_a_longer_name_is_another_network(tmp_path, monkeypatch):
    monkeypatch.setattr(cspine, "KAGGLE", tmp_path)
    longer = touch(tmp_path / "input" / "convnext_nano_ols.d1h_in1k.safetensors")
    assert imagenet_file("convnext_nano_ols", tmp_path) == longer
    tagged = touch(tmp_path / "input" / "convnext_nano.in12k_ft_in1k-a-long-name.safetensors")
    assert imagenet_file("convnext_nano", tmp_path) == tagged
    exact = touch(tmp_path / "input" / "convnext_nano.in12k_ft_in1k" / "model.safetensors")
    assert imagenet_file("convnext_nano.in12k_ft_in1k", tmp_path) == exact


@pytest.mark.parametrize("weaker, best", [
    ("convnext_nano.in12k", "convnext_nano.in12k_ft_in1k"),
    ("convnext_nano.d1h_in1k", "convnext_nano.in12k_ft_in1k"),
    (f"{TIMM}.in1k", f"{TIMM}.in21k_ft_in1k"),
    (TIMM, f"{TIMM}_in21ft1k"), ("convnext_nano.d1h_in1k", "convnext_nano_in12k_ft_in1k")])
def test_of_several_trainings_the_one_tuned_after_more_than_imagenet_1k_is_taken(
        weaker, best, tmp_path, monkeypatch):
    monkeypatch.setattr(cspine, "KAGGLE", tmp_path)
    touch(tmp_path / "input" / f"{weaker}.safetensors")
    path = touch(tmp_path / "input" / f"{best}.safetensors")
    assert imagenet_file(weaker.split(".")[0], tmp_path) == path


def test_processes_of_unlike_devices_are_refused_before_they_wait_for_each_other(
        tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    backends = []
    monkeypatch.setattr(cspine.dist, "init_process_group", backends.append)
    monkeypatch.setattr(cspine, "over_ranks", lambda kind: [kind, "cuda"])
    with pytest.raises(cspine.UserError, match="lower --nproc_per_node"):
        cspine.join_processes(CPU)
    assert backends == ["gloo"]


def test_each_process_sets_its_card_before_the_cards_speak(monkeypatch):
    """NCCL takes the current card, and has no way for objects: these go by gloo."""
    calls = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(cspine.dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(cspine.dist, "init_process_group", calls.append)
    monkeypatch.setattr(cspine, "over_ranks", lambda kind: [kind])
    cspine.join_processes(torch.device("cuda:1"))
    assert calls == [torch.device("cuda:1"), "cpu:gloo,cuda:nccl"]


@pytest.mark.parametrize("place", [
    "a/b/c/d/e/f/g/tf_efficientnetv2_s.pth", "x/tf_efficientnetv2_small.pth", "x/efficientnetv2_s.pth",
    "x/tf_efficientnetv2_s.txt", "x/train_images/tf_efficientnetv2_s.pth"])
def test_what_is_no_such_file_or_lies_too_deep_is_not_taken(place, tmp_path, monkeypatch):
    monkeypatch.setattr(cspine, "KAGGLE", tmp_path)
    touch(tmp_path / "input" / place)
    assert imagenet_file(TIMM, tmp_path / "data") is None


def test_a_file_in_data_is_found_too(tmp_path, monkeypatch):
    monkeypatch.setattr(cspine, "KAGGLE", tmp_path / "none")
    path = touch(tmp_path / "data" / f"{TIMM}.in1k" / "model.safetensors")
    touch(tmp_path / "data" / "train_images" / f"{TIMM}.safetensors")
    assert imagenet_file(TIMM, tmp_path / "data") == path


def test_weights_are_taken_and_not_the_optimisers_state_beside_them(tmp_path, monkeypatch):
    monkeypatch.setattr(cspine, "KAGGLE", tmp_path)
    folder = tmp_path / "input" / f"{TIMM}.in21k_ft_in1k"
    touch(folder / "optimizer.bin")
    assert imagenet_file(TIMM, tmp_path) is None
    path = touch(folder / "pytorch_model.bin")
    assert imagenet_file(TIMM, tmp_path) == path
    path = touch(folder / "a_rather_longer_name_of_model.safetensors")
    assert imagenet_file(TIMM, tmp_path) == path


def test_the_deepest_name_is_the_files(tmp_path, monkeypatch):
    """Kaggle's models have their variations in folders below them."""
    monkeypatch.setattr(cspine, "KAGGLE", tmp_path)
    folder = tmp_path / "input" / "convnext_nano" / "pytorch"
    touch(folder / "ols" / "1" / "convnext_nano_ols.pth")
    assert imagenet_file("convnext_nano", tmp_path) is None
    own = touch(folder / "d1h" / "1" / "model.pth")
    assert imagenet_file("convnext_nano", tmp_path) == own


@pytest.mark.parametrize("beside", [False, True])
def test_a_longer_name_in_kaggles_hyphens_is_another_network_also_alone(
        beside, tmp_path, monkeypatch):
    monkeypatch.setattr(cspine, "KAGGLE", tmp_path)
    touch(tmp_path / "input" / "convnext-nano-ols.d1h-in1k" / "model.safetensors")
    own = tmp_path / "input" / "convnext-nano-a-much-longer-name" / "model.safetensors"
    found = touch(own) if beside else None
    assert imagenet_file("convnext_nano", tmp_path) == found


def test_a_folder_named_after_two_networks_holds_the_files_of_both(tmp_path, monkeypatch):
    monkeypatch.setattr(cspine, "KAGGLE", tmp_path)
    folder = tmp_path / "input" / "convnext-nano-ols-and-others"
    touch(folder / "convnext_nano_ols.d1h_in1k.safetensors")
    own = touch(folder / "convnext_nano.d1h_in1k.safetensors")
    assert imagenet_file("convnext_nano", tmp_path) == own


def test_a_patient_classifier_begins_from_its_folds_vertebra_classifier(tmp_path, capsys):
    make_weights(tmp_path, folds=2, patient=False)
    for fold in (0, 1):
        path = tmp_path / f"vertebra_fold{fold}_heldout.csv"
        path.write_text(f"{cspine.STUDY}\na{fold}\nb{fold}\n")
    options = Namespace(init="auto", name="", weights=tmp_path, data=tmp_path, hidden=8,
                        backbone="mobilenetv3_small_050", folds=5)
    found = [cspine.init_file(options, "patient", fold, [f"b{fold}"]) for fold in (0, 1, 2)]
    assert found == [tmp_path / "vertebra_fold0.pt", tmp_path / "vertebra_fold1.pt", None]
    assert cspine.init_file(options, "vertebra", 0, ["b0"]) is None
    assert not capsys.readouterr().err
    assert cspine.init_file(options, "patient", 0, ["b0", "b1"]) is None  # it has seen b1
    assert "it may have seen studies held out here" in capsys.readouterr().err
    options.hidden = 16
    assert cspine.init_file(options, "patient", 0, ["b0"]) is None
    assert "not started from: its --hidden is 8" in capsys.readouterr().err


def test_a_vertebra_classifier_of_one_fold_has_seen_every_study(tmp_path):
    """What it calls held out it was trained on."""
    make_weights(tmp_path, patient=False)
    held_out = tmp_path / "vertebra_fold0_heldout.csv"
    held_out.write_text(f"{cspine.STUDY},trained_on\na,1\nb,1\n")
    options = Namespace(init="auto", name="", weights=tmp_path, data=tmp_path, hidden=8,
                        backbone="mobilenetv3_small_050", folds=5)
    assert cspine.init_file(options, "patient", 0, ["a"]) is None
    options.folds = 1  # where nothing is held out
    assert cspine.init_file(options, "patient", 0, ["a"]) == tmp_path / "vertebra_fold0.pt"
    options.folds = 5
    held_out.write_text(f"{cspine.STUDY}\na\nb\n")
    assert cspine.init_file(options, "patient", 0, ["a"]) == tmp_path / "vertebra_fold0.pt"


def test_a_training_does_not_start_from_a_file_that_it_overwrites(tmp_path):
    make_weights(tmp_path / "w", patient=False)
    path = tmp_path / "w" / "vertebra_fold0.pt"
    options = Namespace(init=str(path), name="", weights=str(tmp_path / "w"))
    with pytest.raises(cspine.UserError, match="may be overwritten: copy it elsewhere"):
        cspine.init_file(options, "vertebra", 1, [])
    assert cspine.init_file(options, "patient", 0, []) == path
    options.name = "other"
    assert cspine.init_file(options, "vertebra", 1, []) == path
    options.name = ""
    options.weights = str(tmp_path / "other")
    assert cspine.init_file(options, "vertebra", 0, []) == path


def test_a_patient_classifier_begins_from_a_fold_of_its_backbone_by_any_name(tmp_path):
    """gold-second's from gold's; one of its own name comes first, one of another fold never."""
    make_weights(tmp_path, patient=False)
    first, second = tmp_path / "vertebra_fold0.pt", tmp_path / "vertebra_second_fold0.pt"
    options = Namespace(init="auto", name="second", weights=tmp_path, data=tmp_path, hidden=8,
                        backbone="mobilenetv3_small_050", folds=5)
    for path in (first, second):
        path.with_name(f"{path.stem}_heldout.csv").write_text(f"{cspine.STUDY}\na\n")
    assert cspine.init_file(options, "patient", 0, ["a"]) == first
    assert cspine.init_file(options, "patient", 1, ["a"]) is None
    second.write_bytes(first.read_bytes())
    assert cspine.init_file(options, "patient", 0, ["a"]) == second


def test_a_first_set_goes_on_when_the_second_has_a_fold_of_its_backbone(tmp_path):
    """gold-second's vertebra classifiers are of the backbone of gold's patient classifiers,
    which refused to go on: "made with other --init"."""
    make_weights(tmp_path, patient=False)
    second = (tmp_path / "vertebra_fold0.pt").rename(tmp_path / "vertebra_second_fold0.pt")
    second.with_name(f"{second.stem}_heldout.csv").write_text(f"{cspine.STUDY}\na\n")
    options = Namespace(init="auto", name="", weights=tmp_path, data=tmp_path, hidden=8,
                        backbone="mobilenetv3_small_050", folds=5)
    assert cspine.init_file(options, "patient", 0, ["a"]) is None
    options.name = "third"
    assert cspine.init_file(options, "patient", 0, ["a"]) == second


def test_where_neither_the_own_name_nor_none_is_there_another_will_do(tmp_path, capsys):
    """And one that only another --hidden keeps from it is told of; another backbone is not."""
    make_weights(tmp_path, patient=False)
    third = (tmp_path / "vertebra_fold0.pt").rename(tmp_path / "vertebra_third_fold0.pt")
    third.with_name(f"{third.stem}_heldout.csv").write_text(f"{cspine.STUDY}\na\n")
    options = Namespace(init="auto", name="second", weights=tmp_path, data=tmp_path, hidden=8,
                        backbone="mobilenetv3_small_050", folds=5)
    assert cspine.init_file(options, "patient", 0, ["a"]) == third
    options.backbone = "test_resnet"
    assert cspine.init_file(options, "patient", 0, ["a"]) is None
    assert not capsys.readouterr().err
    options.backbone, options.hidden = "mobilenetv3_small_050", 16
    assert cspine.init_file(options, "patient", 0, ["a"]) is None
    assert capsys.readouterr().err == f"{third}: not started from: its --hidden is 8\n"


def test_from_scratch_is_said_once_and_loudly_but_not_where_it_is_wanted(capsys):
    for init, lines in (("auto", 1), ("none", 0)):
        options = Namespace(init=init, backbone=TIMM)
        cspine.say_start(options, {0: None, 1: None})
        said = capsys.readouterr().err
        assert said.count("\n") == lines == said.count(f"NO IMAGENET WEIGHTS of {TIMM}")
    cspine.say_start(Namespace(init="auto"), {0: Path("a.pth"), 1: Path("a.pth")})
    assert not capsys.readouterr().err


# ---- Presets ----


def parsed(*arguments):
    """The values of a mode's options as run_mode makes them."""
    parser = build_parser(MODES, preset=cspine.preset_given(arguments))
    options = vars(parser.parse_args(arguments))
    others = "preset", "given", "begun"
    return {name: options[name] for name in options if name not in others}


@pytest.mark.parametrize("preset, mode", [(p, m) for p in PRESETS for m in PRESETS[p]])
def test_a_presets_values_are_options_of_their_modes_and_inside_their_limits(preset, mode):
    options = parsed(mode, "--preset", preset)
    assert PRESETS[preset][mode].items() <= options.items()
    given = []
    for name, value in PRESETS[preset][mode].items():
        given += ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]
    assert parsed(mode, *given) == options


def test_what_is_given_wins_also_if_it_is_the_default():
    options = parsed("train-cls", "--preset", "gold", "--epochs", "20", "--thin", "1")
    assert (options["epochs"], options["thin"], options["size"]) == (20, 1, 384)
    assert not parsed("train-patient", "--preset", "gold", "--no-checkpoint")["checkpoint"]
    plain = parsed("train-cls")
    own = dataclasses.asdict(cspine.RECIPES["vertebra"])
    assert own.items() <= plain.items()
    assert parsed("train-cls", "--preset", "standard") == plain


def test_gold_is_what_its_sources_ask_for():
    recipe = parsed("train-seg", "--preset", "gold")
    assert 87 * 4 // 5 // recipe["batch_size"] * recipe["epochs"] >= 8000
    for mode in ("train-cls", "train-patient"):
        recipe = parsed(mode, "--preset", "gold")
        second = parsed(mode, "--preset", "gold-second")
        assert recipe["size"] == parsed("extract", "--preset", "gold")["size"] == 384
        assert recipe["mixup"] == 0.5 and 0.2 <= recipe["drop_path"] <= 0.3
        assert recipe["backbone"] != second["backbone"] and second["name"] == "second"
        assert recipe["augment"] == second["augment"] == "strong"
        assert recipe["lr"] < parsed(mode)["lr"] and recipe["dropout"] == 0.3


def test_a_training_is_augmented_as_its_recipe_says(monkeypatch):
    ranges = []
    monkeypatch.setattr(cspine, "augment_crops", lambda *given: ranges.append(given[3]) or given[0])
    crops, labels = torch.rand(1, 15, 6, 8, 8), torch.zeros(1, 1)
    for name in ("mild", "strong"):
        recipe = cspine.ClassifierRecipe(augment=name, mixup=0)
        rngs = [np.random.default_rng(0)]
        cspine.classifier_batch(lambda x: x.mean((2, 3, 4)), (crops, labels), rngs, recipe)
    assert ranges == [cspine.CROP_RANGES["mild"], cspine.CROP_RANGES["strong"]]


def test_mixup_mixes_images_and_losses_by_one_share_and_labels_never(monkeypatch):
    """A mixed label would count as a positive."""
    def model(images):
        shown.append(images)
        return 4 * images.mean((2, 3, 4)) - 1

    shown = []
    monkeypatch.setattr(cspine, "augment_crops", lambda crops, *_: crops)
    crops, labels = torch.zeros(2, 15, 6, 8, 8), torch.tensor([[1.0], [0.0]])
    crops[1] = 1
    for mixup in (1.0, 0.0):
        rngs = [np.random.default_rng(k) for k in (0, 1)]
        recipe = cspine.ClassifierRecipe(mixup=mixup)
        loss = cspine.classifier_batch(model, (crops, labels), rngs, recipe)
        share = shown[-1][1].mean()  # of a sample in its own place
        assert torch.allclose(shown[-1][0], 1 - share)
        assert 0.05 < share < 0.45 or 0.55 < share < 0.95 if mixup else share == 1
        own, other = (cspine.classifier_loss(model(shown[-1]), y) for y in (labels, labels.flip(0)))
        assert torch.allclose(loss, share * own + (1 - share) * other)


@pytest.mark.parametrize("wrong, said", [
    (["--fold", "9"], "there are folds 0 to 4"), (["--name", "a-b"], "only letters"),
    (["--backbone", "typo"], "typo"), (["--size", "100"], "multiple of 16")])
def test_options_that_make_no_training_are_refused_before_a_study_is_read(
        wrong, said, phantom_data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cspine, "read_volume", lambda *given: 1 / 0)
    given = ["train-seg", "--data", phantom_data, "--weights", tmp_path, *wrong]
    assert cspine.main(given) == 2 and said in capsys.readouterr().err


def test_an_option_is_not_guessed_from_its_first_letters(capsys):
    assert cspine.main(["extract", "--fold", "1"]) == 2  # the folds of a fold?
    assert "unrecognized arguments: --fold 1" in capsys.readouterr().err


def test_folds_that_find_no_file_are_told_also_beside_one_that_does(tmp_path, capsys):
    options = Namespace(init="auto", backbone="resnet18d")
    cspine.say_start(options, {0: tmp_path / "vertebra_fold0.pt", 1: None})
    said = capsys.readouterr().err
    assert said.count("NO IMAGENET WEIGHTS of resnet18d") == 1
    cspine.say_start(options, {0: tmp_path / "vertebra_fold0.pt"})
    assert "NO IMAGENET" not in capsys.readouterr().err


def test_help_shows_the_defaults_of_the_preset_that_is_named(capsys):
    def said(*arguments):
        with pytest.raises(SystemExit):
            cspine.main(["train-patient", *arguments, "--help"])
        return " ".join(capsys.readouterr().out.split())
    assert "passes over the training studies (default: 15)" in said()
    table = said().partition("What presets set; empty: as standard. ")[2]
    assert table.startswith("fast standard gold gold-second --augment mild strong strong")
    for row in ("--epochs 12 15 50 50 --fold 0 all --lr", "--size 224 384 384 --thin 3 1 3 3"):
        assert row in table
    assert "--drop-path 0.05 0.3 0.3" in table and "--checkpoint False True True" in table
    for given in (["--preset", "fast"], ["--preset=fast"]):
        text = said(*given)
        assert "passes over the training studies (default: 12)" in text
        assert "(default: 0)" in text and "one of the first three (default: 3)" in text


def test_the_plan_counts_operations():
    """In proportion to samples, vertebrae, steps, epochs and passes."""
    recipe = dataclasses.replace(cspine.RECIPES["vertebra"], backbone="test_resnet", size=64)
    once = training_flops("vertebra", recipe, 10)
    thin = dataclasses.replace(recipe, thin=3)
    assert training_flops("vertebra", recipe, 20) == 2 * once
    assert training_flops("patient", recipe, 10) == 7 * once
    assert training_flops("vertebra", thin, 10) * 3 == once
    longer = dataclasses.replace(recipe, epochs=2 * recipe.epochs)
    assert training_flops("vertebra", longer, 10) == 2 * once > 1e9
    twice = dataclasses.replace(recipe, checkpoint=True)  # four passes instead of three
    assert training_flops("vertebra", twice, 10) * 3 == 4 * once


@pytest.mark.parametrize("preset", PRESETS)
def test_the_plan_that_is_said_is_the_one_that_was_counted(preset, capsys):
    """Hours of two T4 and disk, on the competition's studies; only if a preset was asked for."""
    cspine.say_plan(Namespace(preset=preset, given=("fold",)))
    assert not capsys.readouterr().err
    cspine.say_plan(Namespace(preset=preset, given=("preset",)))
    said = capsys.readouterr().err
    hours = planned_hours(preset, TRAINED_STUDIES, MASKED_STUDIES, 2, CARD_TFLOPS)
    if preset == "gold-second":  # takes gold's crops
        hours.pop("extract")
    else:
        assert f"{crops_gb(preset, TRAINED_STUDIES):.0f} GB" in said
    assert f"{sum(hours.values()):.0f} hour" in said and "not timed" in said


@pytest.mark.parametrize("mode", ["train-seg", "extract"])
def test_the_plan_is_said_before_a_study_is_read(mode, tmp_path, monkeypatch, capsys):
    def stop(options):
        raise cspine.UserError("data is read")
    monkeypatch.setattr(cspine, "training_data", stop)
    given = ["--backbone", "test_resnet"] if mode == "train-seg" else []
    assert cspine.main([mode, "--preset", "fast", "--weights", tmp_path, *given]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("--preset fast") and second == "cspine: data is read"


def test_fast_ends_within_an_hour_of_two_t4_by_its_plan():
    """It cuts crops of some studies alone: reading all takes longer."""
    hours = planned_hours("fast", TRAINED_STUDIES, MASKED_STUDIES, 2, CARD_TFLOPS)
    assert sum(hours.values()) < 0.95  # h; starting up costs some too
    assert planned_hours("fast", 100, 87, 2, CARD_TFLOPS)["extract"] < hours["extract"]


def test_crops_of_384_train_on_16_gb_with_their_blocks_computed_twice():
    """105 crops: what is kept for the backward pass, 2 bytes a value, counted on shapes."""
    def kept(checkpoint):
        model = VertebraClassifier(TIMM, 384, hidden=8, checkpoint=checkpoint)
        return 105 * 2 * values_kept(model.encoder.backbone, (1, 6, 384, 384)) / 1e9
    assert kept(False) > 20 and kept(True) < 4


# ---- Several models, crops of any size ----


def test_models_with_names_are_found_beside_the_others(tmp_path):
    make_weights(tmp_path, folds=2, patient=False)
    (tmp_path / "vertebra_fold1.pt").rename(tmp_path / "vertebra_v2s_fold1.pt")
    (tmp_path / "vertebra_v2s_fold1_last.pt").write_bytes(b"")
    cpu = CPU
    found = cspine.load_models(tmp_path, "vertebra", cpu)
    assert [path.stem for path in found] == ["vertebra_fold0", "vertebra_v2s_fold1"]
    assert len(cspine.load_ensemble(tmp_path, cpu).models["vertebra"]) == 2
    assert "vertebra_v2s_fold1.pt" in cspine.model_hashes(tmp_path)
    assert len(cspine.model_hashes(tmp_path)) == 4


def test_every_name_has_files_of_its_own(tmp_path):
    """Also one that is, or ends in, an underscore."""
    names = ["", "_", "a", "a_", "_a"]
    for name in names:
        touch(tmp_path / f"{cspine.model_name('vertebra', name, 0)}.pt")
    files = cspine.model_files(tmp_path, "vertebra")
    assert sorted(name for _, name, _ in files) == sorted(names)


def test_classifiers_of_large_crops_are_shown_large_crops(tmp_path, monkeypatch):
    """As they were trained, not crops of 224 pixels made larger."""
    weights = make_weights(tmp_path / "weights", size=256)
    ensemble = cspine.load_ensemble(weights, CPU)
    for model in ensemble.models["segmenter"]:
        model.settings["size"] = 32
    make_study(tmp_path / "study")
    shown = []
    whole = cspine.classify
    monkeypatch.setattr(
        cspine, "classify", lambda e, crops, folds: shown.append(crops) or whole(e, crops, folds))
    cspine.answer_study(cspine.read_volume(tmp_path / "study"), 0, ensemble, 1)
    assert shown[0].shape == (7, 15, 6, 256, 256)


def test_segmenters_of_other_sizes_answer_together(tmp_path):
    """Each at its own size; two that say 0.4 everywhere say 0.4 together."""
    make_study(tmp_path / "study")
    volume = cspine.read_volume(tmp_path / "study")
    models = []
    for size in (32, 48):
        make_weights(tmp_path / str(size), patient=False, size=size)
        models += cspine.load_models(tmp_path / str(size), "segmenter", "cpu").values()
    with torch.inference_mode():
        mean = cspine.mean_probability(models, volume, CPU)
    assert mean.shape == (7, 32, 32, 32)
    assert torch.allclose(mean, torch.tensor(-0.4).sigmoid().expand_as(mean), atol=0.01)


def test_a_segmenter_that_answers_nan_halves_no_others_masks(tmp_path, monkeypatch):
    make_study(tmp_path / "study")
    volume = cspine.read_volume(tmp_path / "study")
    make_weights(tmp_path / "w", folds=2, patient=False)
    good, bad = cspine.load_models(tmp_path / "w", "segmenter", "cpu").values()
    with torch.inference_mode():
        alone = cspine.mean_probability([good], volume, CPU)
        with monkeypatch.context() as patch:  # what is not finite is computed in float32 again
            patch.setattr(cspine, "half_type", lambda device: None)
            exact = cspine.mean_probability([good], volume, CPU)
        bad.head.bias.fill_(torch.nan)
        for models in ([good, bad], [bad, good]):
            both = cspine.mean_probability(models, volume, CPU)
            assert torch.equal(both, alone)
        assert not cspine.mean_probability([bad], volume, CPU).any()
        good.head.bias[24:32] = torch.inf  # of C4: a sure answer, no lack of one
        sure = cspine.mean_probability([good], volume, CPU)
        assert (sure[3] == 1).all() and torch.equal(sure[:3], exact[:3])


def test_a_backbone_that_knows_no_drop_path_is_taken_without_it():
    with pytest.raises(cspine.UserError, match="drop_path_rate"):
        cspine.new_model("vertebra", dict(backbone="dla46x_c", hidden=8, drop_path=0.1))
    model = cspine.new_model("vertebra", dict(backbone="dla46x_c", hidden=8)).eval()
    assert model(torch.ones(1, 15, 6, 32, 32)).shape == (1, 15)


def test_a_drop_path_of_0_is_given_to_backbones_whose_own_default_is_another(monkeypatch):
    given, create = [], timm.create_model
    monkeypatch.setattr(timm, "create_model",
                        lambda *names, **how: given.append(how) or create(*names, **how))
    cspine.new_model("vertebra", dict(backbone="test_resnet", hidden=8))
    assert given[0]["drop_path_rate"] == 0


@pytest.mark.parametrize("wanted, why", [
    (dict(edge=16), "--size 8 --z-margin 2.0, as of a"),
    (dict(z_margin=1.0), "--size 8 --z-margin 2.0, as of a"),
    (dict(made_by={"3"}), "other segmenters, as of a")])
def test_crops_that_were_cut_otherwise_are_not_mixed(wanted, why, tmp_path, capsys):
    crops = np.ones((7, 15, 6, 8, 8), np.uint8)
    cspine.write_crops(tmp_path / "a.npz", crops, 2.0, {"1"})
    heads = cspine.crops_heads(tmp_path, "a", 1)
    alike = cspine.CropsHead(8, 2.0, {"1", "2"})
    cspine.refuse_other_crops(tmp_path, heads, alike)
    assert "1 of them are by fewer segmenters" in capsys.readouterr().err
    with pytest.raises(cspine.UserError, match=f"{why}; .*need another --work"):
        cspine.refuse_other_crops(tmp_path, heads, alike._replace(**wanted))


def test_every_segmenter_sees_the_window_it_was_trained_with():
    class Level(nn.Module):
        def __init__(self, window):
            super().__init__()
            self.settings = dict(size=16, window=window)

        def forward(self, cube):
            return cube.logit().expand(1, 7, 16, 16, 16)

    volume = cspine.Volume("u", np.full((16, 16, 16), 300, np.int16), (1, 1, 1), np.eye(4))
    for window, share in (((300, 1600), 0.5), ((200, 400), 0.75)):
        assert cspine.mean_probability([Level(window)], volume, CPU).mean() == pytest.approx(share)
    both = cspine.mean_probability([Level((300, 1600)), Level([200, 400])], volume, CPU)
    assert both.mean() == pytest.approx(0.625)


@pytest.mark.parametrize("sizes, wanted", [((224, 384), 384), ((384, 224), 384), ((64, 224), 224)])
def test_crops_are_cut_for_the_classifier_of_the_largest(sizes, wanted):
    models = [SimpleNamespace(settings=dict(mask_of="last", z_margin=1.0, size=n)) for n in sizes]
    ensemble = cspine.Ensemble(dict(vertebra=models[:1], patient=models[1:]), CPU)
    assert cspine.crops_wanted(ensemble)["size"] == wanted


def test_a_models_name_may_hold_the_word_fold(tmp_path):
    """predict finds its weight in the blend by the name that its held-out answers have."""
    model = cspine.VertebraClassifier("test_resnet", hidden=16)
    path = tmp_path / "vertebra_a_fold2_fold0.pt"
    recipe = cspine.ClassifierRecipe("test_resnet", hidden=16)
    content = dict(settings=model.settings, tensors=model.state_dict())
    cspine.save_checkpoint(path, "vertebra", recipe, **content)
    assert cspine.load_model(path, "vertebra").settings["name"] == "vertebra_a_fold2"


def test_another_networks_tuned_file_is_not_taken_for_a_plain_one_of_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(cspine, "KAGGLE", tmp_path)
    touch(tmp_path / "input" / "convnext_nano_ols.in12k_ft_in1k.safetensors")
    path = touch(tmp_path / "input" / "convnext_nano.in12k.safetensors")
    assert imagenet_file("convnext_nano", tmp_path) == path


def test_a_file_to_start_from_that_has_seen_held_out_studies_is_told_of(tmp_path, capsys):
    make_weights(tmp_path, patient=False)
    path = tmp_path / "vertebra_fold0.pt"
    (tmp_path / "vertebra_fold0_heldout.csv").write_text(f"{cspine.STUDY}\na\nb\n")
    options = Namespace(init=str(path), name="", weights=str(tmp_path / "other"), folds=1)
    assert cspine.init_file(options, "vertebra", 0, ["a", "b", "c"]) == path  # nothing held out
    options.folds = 5
    assert cspine.init_file(options, "vertebra", 0, ["a", "b"]) == path
    assert not capsys.readouterr().err
    assert cspine.init_file(options, "vertebra", 1, ["c"]) == path
    assert f"fold 1: --init {path} HAS SEEN studies" in capsys.readouterr().err


def test_a_classifier_that_is_half_trained_is_named_where_another_starts_from_it(tmp_path, capsys):
    make_weights(tmp_path, patient=False)
    path = tmp_path / "vertebra_fold0.pt"
    content = torch.load(path)
    content["epoch"] = 1
    torch.save(content, path)
    options = Namespace(init="auto", name="", weights=str(tmp_path), folds=1, data=str(tmp_path),
                        **{name: content["settings"][name] for name in ("backbone", "hidden")})
    assert cspine.init_file(options, "patient", 0, []) == path
    assert f"{path}: NOT TRAINED TO ITS END: epoch 1 of" in capsys.readouterr().err
