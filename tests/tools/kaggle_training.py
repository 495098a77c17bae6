"""The cells of the notebook that trains on Kaggle, in as many sessions as it takes.

`cspine.py notebook --train` writes this file into its second cell; the last cell of a session
says what to attach to the next one, which goes on from there."""

import ctypes
import functools
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

import cspine
from cspine import KAGGLE, UserError

STEPS = {"train-seg": "segmenter", "extract": "", "train-cls": "vertebra",
         "train-patient": "patient"}
CARD_TFLOPS = 5.0  # TFLOP/s that a T4 is assumed to reach in training
EXTRACT_S = 8.0  # s of a process a study, mostly reading on two cores; assumed
CROPS_MB = 10.6  # a study's crops of 224 pixels with noise of 40 HU; real ones: assumed
MODELS_GB = 3.0  # models, and the states of the folds of one kind; assumed
LEAST_MINUTES = 1.0  # with less left no command is started
LEVELS = 4  # folders below /kaggle/input: notebooks, owner, name, version
NOTE = "session.json"  # marks the output of a session
TEMPORARY = Path("/tmp")  # not part of the output
DEVICE = "cuda"


class Session(NamedTuple):
    """What a session knows."""
    preset: str
    number: int  # from 1 on
    end: float  # of time.monotonic; one deadline for all commands
    cards: int
    data: Path
    weights: Path
    work: Path  # of the crops
    earlier: Path | None  # output of the session before


# ---- The plan ----


def options_of(preset, mode, *arguments):
    """The options that a command of this preset has."""
    parser = cspine.build_parser(cspine.MODES, preset=preset)
    return parser.parse_args([mode, "--preset", preset, *arguments])


def folds_of(options):
    """The numbers of the folds that a training's options ask for."""
    return [k for k in range(options.folds) if options.fold in ("all", str(k))]


def training_flops(kind, recipe, samples):
    """FLOPs of a fold's training, counted on shapes; backward costs two forward passes."""
    model = cspine.new_model(kind, asdict(recipe)).to("meta").eval()
    size, images = recipe.size, 1
    shape = (1, 1, size, size, size)
    if kind != "segmenter":
        model, shape = model.encoder.backbone, (1, cspine.CHANNELS, size, size)
        vertebrae = 7 if kind == "patient" else 1
        images = vertebrae * cspine.STEPS // recipe.thin
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(torch.empty(shape, device="meta"))
    passes = 3 + getattr(recipe, "checkpoint", False)
    return counted.get_total_flops() * images * samples * recipe.epochs * passes


def cut_studies(preset, studies):
    """How many of so many studies a preset cuts crops of."""
    return min(options_of(preset, "extract").studies or studies, studies)


def planned_hours(preset, studies, masked, cards, tflops):
    """{mode: hours} of a preset: operations counted, the rate of a card assumed."""
    hours = {}
    studies = cut_studies(preset, studies)
    count = dict(segmenter=masked, vertebra=7 * studies, patient=studies)
    for mode, kind in STEPS.items():
        if mode == "extract":
            hours[mode] = studies * EXTRACT_S / cards / 3600
            continue
        options = options_of(preset, mode)
        samples = count[kind] * max(options.folds - 1, 1) // options.folds
        recipe = cspine.recipe_from(options, kind)
        flops = len(folds_of(options)) * training_flops(kind, recipe, samples)
        hours[mode] = flops / cards / tflops / 1e12 / 3600
    return hours


def crops_gb(preset, studies):
    """GB of the crops of all studies, by an assumed size of one's."""
    edge = options_of(preset, "extract").size
    return cut_studies(preset, studies) * CROPS_MB * (edge / cspine.CROP) ** 2 / 1000


# ---- Before the training ----


def mounted(name):
    """Where Kaggle put an input: at /kaggle/input, or up to three folders below."""
    for level in range(4):
        for path in sorted((KAGGLE / "input").glob("*/" * level + name)):
            return path
    raise UserError(f"no {name} under {KAGGLE}/input: attach it (Add Input)")


def earlier_session():
    """(output of the latest session that is attached, its number), or (None, 0)."""
    found = []
    for path in cspine.files_below(KAGGLE / "input", LEVELS):
        if path.name == NOTE:
            with suppress(ValueError, KeyError, TypeError, OverflowError):  # another program's
                found.append((int(json.loads(path.read_text())["session"]), path.parent))
    number, folder = max([one for one in found if one[0] > 0], default=(0, None))
    return folder, number


def refuse_other_preset(preset, earlier):
    """UserError if an earlier session trained by another preset, which cannot go on; the
    models of gold-second may be kept beside those of gold."""
    note = json.loads((earlier / NOTE).read_text()) if earlier else {}
    before = note.get("preset", preset)
    if before != preset and (before, preset) != ("gold", "gold-second"):
        raise UserError(f"the output attached is of --preset {before}, and this notebook of "
                        f"{preset}: detach it, or take a notebook of {before}")


def work_folder(needed):
    """Where the crops go: into the output if it holds them, else beside it."""
    for folder, kept in ((KAGGLE / "working", "kept"), (TEMPORARY, "made anew in every session")):
        if (folder / "work").exists():  # this cell ran before
            return folder / "work"
        free = shutil.disk_usage(folder).free / 1e9
        fits = free > needed
        print(f"disk: {needed:.0f} GB needed (assumed), {free:.0f} free in {folder}: "
              f"{'crops are ' + kept if fits else 'too little'}")
        if fits:
            return folder / "work"
    raise UserError("too little disk for the crops of this preset: another preset may need less")


def try_cards():
    """The number of GPUs, each of which ran a kernel."""
    cards = torch.cuda.device_count()
    if not cards:
        raise UserError("no GPU: choose the accelerator T4 x2")
    for k in range(cards):
        try:
            ones = torch.ones(64, 64, device=f"{DEVICE}:{k}")
            works = (ones @ ones).sum().item() == 64**3
        except RuntimeError as error:  # a P100, for which torch has no kernels
            raise UserError(f"GPU {k} runs nothing: choose T4 x2 ({error})") from error
        if not works:
            raise UserError(f"GPU {k} counts wrongly: restart the session")
        print(f"GPU {k}: runs")
    return cards


def why_unfit(path, preset, mode):
    """Why a file of weights is none to begin a training from, or ""."""
    recipe = cspine.recipe_from(options_of(preset, mode), STEPS[mode])
    try:
        cspine.load_init(cspine.new_model(STEPS[mode], asdict(recipe)), path)
    except UserError as error:  # another network's, or damaged
        return str(error)
    return ""


def find_imagenet(preset, data, from_scratch):
    """Say which ImageNet files the preset's trainings begin from; UserError without one."""
    missing, unfit = [], []
    modes = {options_of(preset, mode).backbone: mode for mode in STEPS if STEPS[mode]}
    for name, mode in sorted(modes.items()):
        found = cspine.imagenet_file(name, data)
        reason = found and why_unfit(found, preset, mode)
        print(f"ImageNet weights of {name}: "
              f"{f'DO NOT FIT: {reason}' if reason else found or 'NOT FOUND'}")
        if reason:
            unfit.append(name)
        elif not found:
            missing.append(name)
    if unfit:
        raise UserError(f"attach timm's files of {', '.join(unfit)} in place of these (Add Input)")
    if missing and not from_scratch:
        raise UserError(f"attach timm's files of {', '.join(missing)} (Add Input), or call "
                        "preflight(..., from_scratch=True)")


def preflight(preset, minutes, from_scratch=False):
    """Look whether all is there, say it in a line each, and make the Session.
    UserError if the training cannot begin."""
    end = time.monotonic() + 60 * minutes
    cards = try_cards()
    data = mounted(cspine.COMPETITION)
    truth, _, masks = cspine.training_data(options_of(preset, "train-seg", "--data", str(data)))
    masked = len(truth.keys() & masks.keys())
    print(f"data: {data}: {len(truth)} studies with images, {masked} with masks")
    if not masked:
        raise UserError(f"no study with a mask in {data}")

    earlier, number = earlier_session()
    refuse_other_preset(preset, earlier)
    print(f"earlier session: {earlier or 'none attached: this is the first'}")
    work = work_folder(crops_gb(preset, len(truth)) + MODELS_GB)
    find_imagenet(preset, data, from_scratch)
    hours = planned_hours(preset, len(truth), masked, cards, CARD_TFLOPS)
    for mode in STEPS:  # what an earlier session ended
        if earlier and finished(earlier / "weights", preset, mode):
            hours[mode] = 0.0
    each = ", ".join(f"{mode} {value:.1f}" for mode, value in hours.items())
    total, again = sum(hours.values()), 0.0
    if KAGGLE not in work.parents:  # every session makes the crops
        again = hours["extract"]
    sessions = max(1, math.ceil((total - again) / max(minutes / 60 - again, 0.1)))
    print(f"hours left by the plan, {CARD_TFLOPS:g} TFLOP/s a card assumed: {each}; in all "
          f"{total:.1f}, about {sessions} sessions of {minutes:g} minutes")
    weights = KAGGLE / "working" / "weights"
    return Session(preset, number + 1, end, cards, data, weights, work, earlier)


# ---- The training ----


def take_over(session):
    """Copy what the earlier session made, but for files that are there already."""
    places = dict(weights=session.weights, work=session.work)
    if session.earlier:
        for name, folder in places.items():
            source = session.earlier / name
            for path in cspine.files_below(source, 1):
                target = folder / path.relative_to(source)
                if not target.exists() and path.name[0] != ".":  # what a kill left half-written
                    cspine.write_atomic(target, functools.partial(shutil.copyfile, path))


def stems(weights, preset, mode, *more):
    """The names, without their endings, of what a training of the preset writes."""
    options = options_of(preset, mode, *more)
    names = [cspine.model_name(STEPS[mode], options.name, k) for k in folds_of(options)]
    return [Path(weights) / name for name in names]


def last_epoch(log):
    """The last epoch that a training's log tells of; 0 if there is none, or it is damaged."""
    with suppress(UserError, IndexError):  # the latter: no row
        return cspine.read_csv(log, ("epoch",))["epoch"].iloc[-1]
    return 0


def trained(weights, preset, mode, *more):
    """Whether every fold of a training is trained to its last epoch, by its log; `more`
    options than the preset's may be given."""
    epochs = options_of(preset, mode, *more).epochs
    logs = [f"{stem}_log.csv" for stem in stems(weights, preset, mode, *more)]
    return all(last_epoch(log) == epochs for log in logs)


def closed(weights, preset, mode, *more):
    """Whether a training is trained and its states are gone, by which it would go on."""
    states = [Path(f"{stem}_last.pt") for stem in stems(weights, preset, mode, *more)]
    return trained(weights, preset, mode, *more) and not any(map(Path.exists, states))


def batch_begun(weights, preset, mode, *more):
    """The option by which a training goes on that was begun on another number of GPUs, whose
    processes may have needed a larger batch; nothing if none was begun."""
    for stem in stems(weights, preset, mode, *more):
        if Path(f"{stem}_last.pt").exists():
            with suppress(UserError):  # the training says it
                recipe = cspine.load_checkpoint(f"{stem}_last.pt")["recipe"]
                return ["--batch-size", str(recipe["batch_size"])]
    return []


def finished(weights, preset, mode):
    """Whether a step need not be taken; crops are needed until the classifiers are
    trained."""
    needed = ("train-cls", "train-patient") if mode == "extract" else (mode,)
    return all(trained(weights, preset, one) for one in needed)


def few_crops(data, work, preset):
    """What `extract` has cut, in words, if most studies have no crops, else "": one of several
    processes cannot know, and ends with 0."""
    known = {*cspine.read_truth(Path(data) / "train.csv")[cspine.STUDY]}
    images = known.intersection(path.name for path in Path(data, "train_images").glob("*"))
    wanted = cut_studies(preset, len(images))
    folder = Path(work, options_of(preset, "extract").mask_of)
    found = len([*folder.glob("*.npz")])
    return f"crops of {found} of {wanted} studies" if 2 * found < wanted else ""


def torchrun(cards, script):
    """A command that runs a script with a process a GPU, but for its arguments."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc_per_node={cards}", str(script)]


def end_with_parent():
    """Have Linux send this process SIGTERM when its parent ends, in whatever way: else
    `kill -9` would leave a training behind, and the same command begin a second one."""
    with suppress(AttributeError):  # macOS has no prctl
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def call(command, folder=None):
    """The exit status of a command, run in a folder. SIGTERM and SIGHUP are passed on, SIGINT it gets from the
    terminal; then it saves and ends by itself, which is waited for."""
    with suppress(cspine.Stopped), cspine.stop_signals() as stop:  # the status tells
        with subprocess.Popen(command, cwd=folder, preexec_fn=end_with_parent) as process:
            try:
                while process.poll() is None:
                    time.sleep(0.1)
                    if stop.signal in ("SIGTERM", "SIGHUP"):
                        process.send_signal(signal.Signals[stop.signal])
                        stop.signal = ""
            except KeyboardInterrupt:  # a second signal
                process.terminate()
    return process.returncode


def run_step(session, mode):
    """Run a command with a process a GPU, in the time that is left; its exit status."""
    left = (session.end - time.monotonic()) / 60
    command = torchrun(session.cards, "cspine.py") + [
        mode, "--preset", session.preset,
        "--data", str(session.data), "--weights", str(session.weights),
        "--work", str(session.work), "--time-limit", f"{left:.3f}"]
    if mode != "extract":  # which always goes on
        command += ["--resume", *batch_begun(session.weights, session.preset, mode)]
    return call(command, KAGGLE / "working")


def train_all(session):
    """Take the steps that are left, as far as the time goes: what stopped it, or ""."""
    take_over(session)
    for mode in STEPS:
        if not finished(session.weights, session.preset, mode):
            if session.end - time.monotonic() < 60 * LEAST_MINUTES:
                return f"the time was over before {mode}"
            status = run_step(session, mode)
            if status:
                return f"{mode} FAILED with exit status {status}: its lines say why"
            over = session.end < time.monotonic()
            done = finished(session.weights, session.preset, mode)
            if over if mode == "extract" else not done:
                return f"the time was over in {mode}"
            few = few_crops(session.data, session.work, session.preset)
            if mode == "extract" and few:
                return f"extract FAILED, {few}: its lines say why"
        if STEPS[mode]:  # the states of finished trainings; the logs tell that they are
            for stem in stems(session.weights, session.preset, mode):
                Path(f"{stem}_last.pt").unlink(missing_ok=True)
    command = [sys.executable, "cspine.py", "evaluate", "--folds", "--calibrate"]
    command += ["--data", str(session.data), "--weights", str(session.weights)]
    status = call(command, KAGGLE / "working")
    return f"evaluate FAILED with exit status {status}" if status else ""


def close(session, stopped):
    """Mark the output as a session's, and say what comes next."""
    note = dict(session=session.number, preset=session.preset, stopped=stopped)
    (KAGGLE / "working" / NOTE).write_text(json.dumps(note))
    if "FAILED" in stopped:
        print(f"Session {session.number}: {stopped}.")
        print("NOT YET TRAINED. First mend what those lines name, or the next session may fail in "
              f"the same way; then attach the output of this one, which holds {NOTE}, and go on.")
    elif stopped:
        print(f"Session {session.number}: {stopped}.")
        print(f"NOT YET TRAINED. Next session: attach the output of this one, which holds {NOTE} "
              "(Add Input, Your Work, this notebook; or make a data set of it), in place of "
              "any earlier output, and run all cells again: it goes on where this one stopped.")
    else:
        print(f"Session {session.number}: ALL IS TRAINED AND CALIBRATED. The models are in "
              "weights/ of this output: download that folder, then `cspine.py notebook "
              "--weights weights --weights-dataset OWNER/WEIGHTS`.")
