"""Stage 06: corruptions against the benchmark's generators, attacks and measures by hand, and the command line:
resuming, stale results, processes, wrong input."""

import json
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import CHEAP, CLASSES, ROOT, assert_mistake, load_stage, logits_on, save_model
from conftest import tell_images_apart, watch, write_files
from PIL import Image

import common

stage = load_stage("06_eval_robustness")
ORIGINAL = np.load(ROOT / "tests" / "corruptions.npz")  # by the generators themselves: docs/robustness.md


def corrupt(image, name, severity, seed=0):
    return stage.corrupt(image, name, severity, np.random.default_rng(seed))


# corruptions


@pytest.mark.parametrize("size", [32, 64, 224])
def test_the_parameters_are_those_of_the_generators(size):
    originals = json.loads(str(ORIGINAL["parameters"]))[str(size)]
    assert set(originals) == set(stage.CORRUPTIONS) == {*stage.DRAWN, *stage.EXTRA} and len(stage.DRAWN) == 14
    for name, values in originals.items():
        ours = stage.CORRUPTIONS[name][size]
        if name == "zoom_blur":
            ours = [np.arange(1, *end_step) for end_step in ours]
        for our, theirs in zip(ours, values, strict=True):
            np.testing.assert_allclose(our, theirs, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("name", stage.CORRUPTIONS)
def test_each_corruption_equals_the_generators(name):
    """The same photographs and the same draws, at 32 pixels. Values are cut: a last bit may be a level."""
    for i in range(5):
        image, theirs = ORIGINAL["images"][i % 3], ORIGINAL[name][i].astype(float)
        difference = np.abs(corrupt(image, name, i + 1, (0, i % 3, i + 1)) - theirs)
        assert difference.mean() < 0.01 and (difference > 1).mean() <= 0.001, (i, difference.mean())
        assert np.abs(image - theirs).mean() > 0.2  # and is not the image as it was


@pytest.mark.parametrize("name", stage.CORRUPTIONS)
def test_draws_are_a_function_of_the_generator_alone(name):
    for size in (64, 144):
        image = np.asarray(Image.fromarray(ORIGINAL["images"][0]).resize((size, size)))
        out = corrupt(image, name, 3)
        assert out.shape == image.shape and out.dtype == np.uint8 and not np.array_equal(out, image)
        assert np.array_equal(out, corrupt(image, name, 3))
    drawn = ("noise", "glass_blur", "motion_blur", "snow", "fog", "elastic_transform", "spatter")
    assert np.array_equal(out, corrupt(image, name, 3, seed=1)) != name.endswith(drawn)


def test_glass_blur_copies_pixels_in_the_order_of_the_generator():
    """Its loop: a swap of two views of one array. Without blur: 0.1 is a radius of no pixel."""
    image = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    stage.import_libraries()
    for reach, rounds in ((1, 1), (2, 3), (4, 2)):
        rng, x = np.random.default_rng(7), image.copy()
        for _ in range(rounds):
            for h in range(24 - reach, reach, -1):
                for w in range(24 - reach, reach, -1):
                    dx, dy = rng.integers(-reach, reach, 2)
                    x[h, w], x[h + dy, w + dx] = x[h + dy, w + dx], x[h, w]
        out = stage.glass_blur(image / 255, np.random.default_rng(7), 0.1, reach, rounds)
        assert np.array_equal(np.rint(out * 255), x) and not np.array_equal(x, image)


# attacks and measures


@pytest.mark.parametrize(("eps", "steps"), [(0, 1), (2, 1), (300, 1), (16, 10), (0.5, 3)])
def test_the_attacks_pixel_by_pixel(monkeypatch, eps, steps):
    """In float64: in float32 the signs of gradients near 0 depend on the rounding. With batch norms, in eval mode."""
    torch.manual_seed(0)
    model = tell_images_apart(common.build_model(CHEAP, 4)).double()
    x, labels = torch.randint(0, 256, (6, 3, 32, 32)).double(), torch.tensor([0, 1, 2, 3, 0, 1])
    mean, std = (torch.tensor(values).double().view(3, 1, 1) for values in ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3)))
    monkeypatch.setattr(stage, "normalize", lambda images, view: (images / 255 - mean) / std)  # ours is in float32
    transcribed = x.clone()
    for _ in range(steps):
        transcribed.requires_grad_(True)
        loss = torch.nn.functional.cross_entropy(model((transcribed / 255 - mean) / std), labels)
        (gradient,) = torch.autograd.grad(loss, transcribed)
        step = eps if steps == 1 else 2.5 * eps / steps
        transcribed = transcribed.detach() + step * gradient.sign()
        transcribed = torch.minimum(torch.maximum(transcribed, x - eps), x + eps).clamp(0, 255)
    attacked = stage.attack(model, x, labels, eps, steps, None)
    assert torch.equal(attacked, transcribed) and not attacked.requires_grad
    assert eps == 0 or ((attacked - x).abs() > 0).double().mean() > 0.5


def test_calibration_error_by_hand():
    # Four images at confidence 0.9, three of them right; two at 0.55, none right: 4/6 * 0.15 + 2/6 * 0.55
    confidences = torch.tensor([0.9, 0.9, 0.9, 0.9, 0.55, 0.55])
    logits = torch.stack([confidences, 1 - confidences], dim=1).log()
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    metrics = stage.metrics_of(stage.facts_of(logits, labels).numpy())
    assert metrics["ece"] == pytest.approx(100 * (4 / 6 * 0.15 + 2 / 6 * 0.55), abs=1e-4)
    assert metrics["top1"] == pytest.approx(50) and metrics["top5"] == pytest.approx(100) and metrics["num"] == 6
    assert metrics["loss"] == pytest.approx(-np.log([0.9, 0.9, 0.9, 0.1, 0.45, 0.45]).mean(), abs=1e-6)


def test_the_errors_of_alexnet_are_the_benchmarks():
    """A checksum of ALEXNET_ERR in google-research/augmix, imagenet.py, that sees the order too."""
    errors = [stage.ALEXNET_ERRORS[name] for name in stage.BENCHMARK]
    assert np.dot(errors, range(1, 16)) == pytest.approx(8972.0216)


def test_the_details_are_a_brute_force_count():
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 4, 200), rng.integers(-1, 5, 200)  # none of class 4, some unreadable
    predicted = np.where(rng.random(200) < 0.5, labels, predicted)
    details = stage.details_of(labels, predicted, list("abcde"))
    pairs = [(t, p) for t, p in zip(labels.tolist(), predicted.tolist(), strict=True) if p >= 0]
    recalls = []
    for c in range(5):
        of_class = [p for t, p in pairs if t == c]
        named = [t for t, p in pairs if p == c]
        recalls.append(100 * of_class.count(c) / len(of_class) if of_class else None)
        expected = {"num": len(of_class), "recall": recalls[c], "precision": 100 * named.count(c) / len(named)}
        assert details["per_class"]["abcde"[c]] == pytest.approx(expected)
        assert details["confusion"][c] == [of_class.count(p) for p in range(5)]
    assert details["balanced_top1"] == pytest.approx(sum(recalls[:4]) / 4)
    low, high = details["interval95"]
    assert 0 < low < 100 * sum(t == p for t, p in pairs) / len(pairs) < high < 100
    assert "confusion" not in stage.details_of(labels, predicted, [str(c) for c in range(101)])


# the command line


TURNED = [CLASSES[2], *CLASSES[:2]]


@pytest.fixture(scope="module")
def work(tiny_data, tmp_path_factory):
    """12 images in val, and checkpoints of two sizes, with the classes in two orders."""
    folder = tmp_path_factory.mktemp("robustness")
    data = shutil.copytree(tiny_data, folder / "data")
    save_model(folder / "control" / "model.pt", seed=1, data=str(data))
    save_model(folder / "student1" / "model.pt", classes=TURNED, seed=6, image_size=40)
    return folder


BOTH = ("control/model.pt", "student1/model.pt")
ALL = (*BOTH, "--corrupt", "--fgsm", "0", "8", "--pgd", "8", "--pgd-steps", "3", "--num-images", "10")


@pytest.fixture(scope="module")
def finished(work, run_stage):
    return run_stage("06_eval_robustness.py", *ALL, "--out", "out", cwd=work)


def read(work, out="out"):
    return json.loads((work / out / "robustness.json").read_text())


def test_what_robustness_json_has_of_each_model(work, finished):
    results = read(work)
    assert list(results) == list(BOTH)
    for path, entry in results.items():
        assert entry["sha256"] == common.fingerprint(work / path)
        names = {f"corrupt/{name}" for name in stage.CORRUPTIONS}
        assert entry.keys() == {"sha256", "clean", "fgsm/0", "fgsm/8", "pgd/8", "summary", *names}
        corrupted = [entry[f"corrupt/{name}"]["top1"] for name in stage.DRAWN]
        assert np.shape(corrupted) == (14, 5)
        assert entry["summary"]["corrupted"] == pytest.approx(np.mean(corrupted))
        settings = entry["corrupt/fog"]["settings"]
        assert settings["image_size"] == 32 and settings["seed"] == 0  # of the smaller model, for both
        assert settings["images"].startswith("10 images") and entry["pgd/8"]["settings"]["steps"] == 3


def test_all_models_see_the_same_corrupted_pixels(work, finished):
    """By hand: drawn on the view of the smaller model, resized for the larger one."""
    images, labels, _ = common.labeled_images(work / "data", "val", CLASSES)
    chosen = np.sort(np.random.default_rng(0).permutation(12)[:10])
    images, labels = images[chosen], labels[chosen]
    small = common.View(32, 1.0)
    drawn = [stage.draw_five(images, small, "snow", 0, row) for row in range(10)]
    for path, size in zip(BOTH, (32, 40), strict=True):
        model, checkpoint = common.load_model(work / path)
        order = np.array([checkpoint["classes"].index(name) for name in CLASSES])
        for severity in range(5):
            views = [np.asarray(five[severity].resize((size, size), Image.Resampling.BICUBIC)) for five in drawn]
            said = logits_on(views, model, checkpoint).argmax(1)
            top1 = read(work)[path]["corrupt/snow"]["top1"][severity]
            assert top1 == pytest.approx(100 * (said == order[labels]).mean())


def test_the_noise_of_an_image_does_not_depend_on_the_others(work, monkeypatch):
    images, _, _ = common.labeled_images(work / "data", "val")
    view, some = common.View(32, 1.0), np.array([1, 4])
    drawn = stage.draw_five(images, view, "shot_noise", 0, 4)
    again = stage.draw_five(images[some], view, "shot_noise", 0, 1)
    assert all(np.array_equal(*pair) for pair in zip(drawn, again, strict=True))
    assert not np.array_equal(drawn[0], stage.draw_five(images, view, "shot_noise", 1, 4)[0])
    monkeypatch.setattr(stage, "corrupt", lambda image, name, severity, rng: rng.integers(0, 256, (8, 8), np.uint8))
    five = [np.asarray(image).tobytes() for image in stage.draw_five(images, view, "shot_noise", 0, 4)]
    assert len(set(five)) == 5, "the severities share draws"


def test_the_table_the_verdict_and_the_picture(work, finished):
    table = [line for line in finished.stdout.splitlines() if line.startswith("|")]
    assert len({len(line) for line in table}) == 1  # aligned
    heading, _, control, student = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table)
    assert heading == ["model", "clean", "corrupted", "fgsm/0", "fgsm/8", "pgd/8", "clean - control"]
    assert control[0] == "control" and control[6] == "-" and student[0] == "student1"
    of_control, entry = read(work).values()
    top1, (low, high) = entry["clean"]["top1"], entry["clean"]["interval95"]
    assert student[1:3] == [f"{top1:.2f} ± {(high - low) / 2:.2f}", f"{entry['summary']['corrupted']:.2f}"]
    assert student[6].startswith(f"{top1 - of_control['clean']['top1']:+.2f} ± ")
    assert len(finished.stdout.splitlines()) < 12  # what stands behind the table is in the files
    assert (work / "out" / "robustness.md").read_text() == finished.stdout
    with Image.open(work / "out" / "robustness.png") as picture:
        assert picture.width > 500 and np.array(picture.convert("L")).std() > 10


def test_a_stopped_run_measures_only_what_is_missing(work, finished, call_main, monkeypatch):
    """Seven corruptions of the first model were saved; the checkpoints of another run stay in the file."""
    entry = read(work)["control/model.pt"]
    kept = {key: entry[key] for key in list(entry)[:9]}
    (work / "stopped").mkdir()
    (work / "stopped" / "robustness.json").write_text(json.dumps({"other.pt": {"sha256": "0"}, BOTH[0]: kept}))
    measured = []

    def note(self, models, shown, key, **how):
        measured.append((key, len(models)))

    watch(monkeypatch, stage.Evaluation, "measure", note)
    monkeypatch.chdir(work)
    assert call_main("06_eval_robustness", *ALL, "--out", "stopped").returncode == 0
    assert measured[0] == ("clean", 1) and ("corrupt/gaussian_noise", 1) in measured and ("corrupt/fog", 2) in measured
    again = read(work, "stopped")
    assert again.pop("other.pt") == {"sha256": "0"} and again == read(work)
    del measured[:]
    assert call_main("06_eval_robustness", *ALL, "--out", "stopped").returncode == 0 and not measured


def test_other_weights_settings_and_images_are_measured_again(work, finished, call_main, monkeypatch):
    monkeypatch.chdir(work)
    shutil.copytree(work / "out", work / "stale")
    shutil.copytree(work / "student1", work / "kept")

    def run(*flags):
        words = (*BOTH, "--out", "stale", "--fgsm", "8", "--num-images", "10", *flags)
        assert call_main("06_eval_robustness", *words).returncode == 0
        return read(work, "stale").values()

    save_model(work / "student1" / "model.pt", classes=TURNED, seed=3, image_size=40)
    old_control, old_student = read(work).values()
    control, student = run()
    assert control["corrupt/fog"] == old_control["corrupt/fog"] and "corrupt/fog" not in student
    assert student["clean"]["right"] != old_student["clean"]["right"]
    assert "corrupted" not in control["summary"], "it is of what was asked for"
    control, _ = run("--num-images", "6")
    assert control["fgsm/8"]["num"] == 6 and control["clean"] == old_control["clean"]
    # An image that belongs to another class: as many images, another val.
    image = work / "data" / "val" / "disc" / "0.png"
    moved = image.rename(work / "data" / "val" / "square" / "other.png")
    control, _ = run()
    moved.rename(image)
    assert control["clean"]["settings"]["images"] != old_control["clean"]["settings"]["images"]
    shutil.copyfile(work / "kept" / "model.pt", work / "student1" / "model.pt")
    seeds = set()
    monkeypatch.setattr(stage, "CORRUPTIONS", {"contrast": stage.CORRUPTIONS["contrast"]})
    watch(monkeypatch, stage, "draw_five", lambda *args: seeds.add(args[3]))
    for seed in ("1", "2"):
        run("--corrupt", "--num-images", "99", "--seed", seed)
    assert seeds == {1, 2}


def test_processes_batches_and_loaders_do_not_change_the_numbers(work, finished, run_stage):
    how = {"nproc": 2, "cwd": work, "WITHOUT": "matplotlib"}
    run_stage("06_eval_robustness.py", *ALL, "--out", "two", "--batch-size", "4", "--workers", "1", **how)
    for entry, again in zip(read(work).values(), read(work, "two").values(), strict=True):
        for name in ("loss", "ece"):  # sums in another order
            assert again["clean"].pop(name) == pytest.approx(entry["clean"].pop(name), rel=1e-4)
        assert again == entry


def test_an_unreadable_image_is_left_out(work, call_main, tmp_path):
    shutil.copytree(work / "data", tmp_path / "data")
    (tmp_path / "data" / "val" / "square" / "2.png").write_bytes(b"not an image")
    words = (work / BOTH[0], "--data", tmp_path / "data", "--out", tmp_path / "out", "--fgsm", "0")
    done = call_main("06_eval_robustness", *words)
    assert done.stdout.count("2.png") == 1  # said once
    (entry,) = read(tmp_path).values()
    assert entry["clean"]["num"] == 11 == sum(of_class["num"] for of_class in entry["clean"]["per_class"].values())
    assert entry["fgsm/0"]["top1"] == entry["clean"]["top1"]


def test_in_bf16_attacks_stay_in_float32(work, finished, call_main, monkeypatch):
    monkeypatch.chdir(work)
    words = (*BOTH, "--fgsm", "8", "--num-images", "10", "--out", "bf16", "--precision", "bf16")
    used = []
    watch(monkeypatch, stage, "autocast", lambda precision, device: used.append(precision))
    assert call_main("06_eval_robustness", *words).returncode == 0
    assert used == ["bf16", "fp32"]  # clean, and under attack
    for entry, in_fp32 in zip(read(work, "bf16").values(), read(work).values(), strict=True):
        assert entry["fgsm/8"] == in_fp32["fgsm/8"]
        loss, exact = entry["clean"]["loss"], in_fp32["clean"]["loss"]
        assert loss == pytest.approx(exact, rel=0.2) and loss != exact
        assert entry["clean"]["settings"]["precision"] == "bf16"


def test_the_halves_of_val_are_disjoint_and_together_all_of_it(work, finished, call_main, monkeypatch):
    monkeypatch.chdir(work)
    bits = stage.base64.b64decode(read(work)[BOTH[0]]["clean"]["right"])
    right = np.unpackbits(np.frombuffer(bits, np.uint8))[:12]
    is_judged = common.judged_half(common.labeled_images(work / "data", "val")[0])
    for half, rows in (("choose", ~is_judged), ("judge", is_judged)):
        assert call_main("06_eval_robustness", BOTH[0], "--val-half", half, "--out", half).returncode == 0
        clean = read(work, half)[BOTH[0]]["clean"]
        assert clean["num"] == rows.sum() > 0
        assert clean["top1"] == pytest.approx(100 * right[rows].mean())


def test_told_to_stop_it_ends_with_143_and_keeps_what_it_has(work, start_stage, run_stage, finished):
    words = ("06_eval_robustness.py", *ALL, "--out", "told")
    started = start_stage(*words, cwd=work)
    started.wait_until(lambda: (work / "told" / "robustness.json").exists())
    started.kill(signal.SIGTERM)
    assert started.returncode == 143 and not started.stderr
    assert "clean" in read(work, "told")[BOTH[0]]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("missing.pt",), "missing.pt"),
        ((BOTH[0], "text.pt"), "text.pt"),
        ((BOTH[0], "--data", "nowhere"), "nowhere"),
        ((BOTH[0], "--data", "unknown"), "zebra"),
        (("gone.pt", "--corrupt"), "--data"),
        (("gone.pt",), "nothing to measure"),
        ((BOTH[0], "--imagenet-c", "nowhere"), "--imagenet-c"),
        ((BOTH[0], "--folder", "sketches"), "--folder"),
        ((BOTH[0], "--num-images", "0"), "--num-images"),
        ((BOTH[0], "--fgsm", "-1"), "--fgsm"),
        ((BOTH[0], "--corr"), "--corr"),
        ((BOTH[0], "--out", "foreign"), "foreign/robustness.json"),
    ],
)
def test_wrong_input_gives_one_line_and_status_2(work, finished, call_main, flags, named, monkeypatch):
    save_model(work / "gone.pt", data=str(work / "is gone"))
    zebra = (work / "data/val/disc/0.png").read_bytes()
    files = {"text.pt": b"no weights\n", "foreign/robustness.json": b"mine", "unknown/val/zebra/0.png": zebra}
    write_files(work, files)
    before = (work / "out" / "robustness.json").read_bytes()
    monkeypatch.chdir(work)
    assert_mistake(call_main("06_eval_robustness", "--out", "out", *flags), named)
    assert (work / "out" / "robustness.json").read_bytes() == before
    assert (work / "foreign" / "robustness.json").read_bytes() == b"mine"


@pytest.mark.parametrize(("package", "named"), [("scipy", "scipy"), ("cv2", "scipy opencv")])
def test_without_a_package_corrupt_fails_before_anything_is_measured(work, run_stage, package, named, tmp_path):
    """Nothing else does: test_program.py runs all stages without both."""
    words = (BOTH[0], "--out", tmp_path, "--corrupt")
    done = run_stage("06_eval_robustness.py", *words, cwd=work, check=False, WITHOUT=f"{package} matplotlib")
    assert_mistake(done, f"pip install {named}")
    assert not (tmp_path / "robustness.json").exists()
