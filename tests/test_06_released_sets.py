"""Stage 06 on made-up sets in the layouts of the released ones: metrics against transcriptions of their formulas, sets
that are not whole or changed."""

import functools
import json
import shutil

import numpy as np
import pytest
from conftest import assert_mistake, encoded, load_stage, logits_on, noise_image, save_model, write_files
from PIL import Image

import common

stage = load_stage("06_eval_robustness")
av = pytest.importorskip("av")
pytestmark = pytest.mark.xdist_group("released sets")  # they share what is drawn and measured once

NAMES = [f"n{number:02}" for number in (7, 3, 5, 1, 9, 2, 8)]  # of the model's outputs, not sorted
OF_A = ["n01", "n03", "n08"]  # the classes of the subset sets
CIFAR = sorted(stage.CIFAR10)
ALL_19 = (*stage.BENCHMARK, *stage.EXTRA)
loaded = functools.cache(common.load_model)


def answers(model, folder) -> tuple[np.ndarray, list[int]]:
    """(logits, labels) of the images of a set."""
    paths = sorted(folder.glob("*/*"))
    views = [common.eval_view(Image.open(path), common.View(32, 1.0)) for path in paths]
    return logits_on(views, *loaded(model)), [NAMES.index(path.parent.name) for path in paths]


def top1_of(logits: np.ndarray, labels) -> float:
    return 100 * float((logits.argmax(1) == np.array(labels)).mean())


def colored(number: int, seed: int, size: int = 40) -> Image.Image:
    """An image that a model of seed 3 takes for one thing or another: a tint, and noise."""
    tint = Image.new("RGB", (size, size), ((number * 97) % 256, (number * 57) % 256, (number * 151) % 256))
    return Image.blend(tint, noise_image(size, size, seed), 0.35)


def draw_imagenet_c(root) -> None:
    """Grouped as in the archives for some, flat for others."""
    for index, name in enumerate(ALL_19):
        group = ("noise/", "", "extra/")[index % 3]
        for severity in range(1, 6):
            for number, wnid in enumerate(sorted(NAMES)[:4]):
                image = colored(number, 100 * index + 10 * severity + number, 32 if index % 2 else 48)
                write_files(root / f"{group}{name}/{severity}/{wnid}", {"ILSVRC2012_val_0.JPEG": encoded(image)})


def draw_video(path, frames: list[np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 32, 32, "yuv420p", 400_000
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)


def draw_imagenet_p(root) -> None:
    for index, name in enumerate(stage.ALEXNET_FLIPS):
        for number, wnid in enumerate(sorted(NAMES)[:2]):
            for copy in range(2):
                seed = 50 * index + 5 * number + copy
                frames = [np.asarray(colored(seed + frame // 2, seed + frame, 32)) for frame in range(6)]
                draw_video(root / name / wnid / f"{copy}.mp4", frames)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    save_model(folder / "first" / "model.pt", classes=NAMES, seed=3, data=None)
    save_model(folder / "cifar" / "model.pt", classes=CIFAR[::-1], seed=5)
    for name in ("imagenet-a", "imagenet-r", "sketches"):
        for number, wnid in enumerate(OF_A):
            images = [colored(number, 7 * number + copy, 60).resize((60, 44)) for copy in range(4)]
            write_files(folder / name / wnid, {f"{copy}.jpg": encoded(image) for copy, image in enumerate(images)})
    draw_imagenet_c(folder / "imagenet-c")
    draw_imagenet_p(folder / "imagenet-p")
    labels = np.tile(np.random.default_rng(0).integers(0, 10, 12), 5)
    (folder / "cifar10-c").mkdir()
    np.save(folder / "cifar10-c" / "labels.npy", labels)
    for index, name in enumerate(ALL_19):
        images = [np.asarray(colored(int(label) + index, row, 32)) for row, label in enumerate(labels)]
        np.save(folder / "cifar10-c" / f"{name}.npy", np.stack(images))
    for number, wnid in enumerate(NAMES):
        images = {f"{copy}.png": encoded(colored(number, copy), "PNG") for copy in (0, 1)}
        write_files(folder / "data" / "val" / wnid, images)
    return folder


SETS = ("--imagenet-a", "imagenet-a", "--imagenet-r", "imagenet-r", "--imagenet-c", "imagenet-c")
SETS += ("--imagenet-p", "imagenet-p", "--folder", "drawn=sketches")


@pytest.fixture(scope="module")
def finished(work, run_stage):
    """All sets, and clean images from a data directory that has val/ alone."""
    return run_stage("06_eval_robustness.py", "first/model.pt", *SETS, "--data", "data", "--out", "out", cwd=work)


def results(work, out="out", path="first/model.pt") -> dict:
    return json.loads((work / out / "robustness.json").read_text())[path]


def test_only_the_classes_of_imagenet_a_and_r_compete_and_all_of_them_in_a_folder(work, finished):
    logits, labels = answers(work / "first" / "model.pt", work / "imagenet-a")
    subset = np.full(len(NAMES), -np.inf)
    subset[[NAMES.index(name) for name in OF_A]] = 0
    in_five = [label in row.argsort()[-5:] for row, label in zip(logits, labels, strict=True)]
    of_three = {"top1": top1_of(logits + subset, labels), "top5": 100}
    of_all = {"top1": top1_of(logits, labels), "top5": 100 * np.mean(in_five)}
    assert of_three["top1"] > of_all["top1"], "nothing is told apart"
    for key, numbers in (("imagenet_a", of_three), ("imagenet_r", of_three), ("folder/drawn", of_all)):
        entry, numbers = results(work)[key], numbers | {"num": 12, "classes": 3}
        assert {name: entry[name] for name in numbers} == pytest.approx(numbers), key
        assert f"{key} (3 classes)" in finished.stdout


def test_imagenet_c(work, finished):
    """1903.12261, section 4: CE = sum_s E_s / sum_s E_s(AlexNet), the relative one with the clean errors taken off."""
    entry, model, ce, relative, top1 = results(work), work / "first" / "model.pt", [], [], {}
    clean = 100 - entry["clean"]["top1"]
    for name in ALL_19:
        (folder,) = (work / "imagenet-c").glob(f"**/{name}")
        of_severities = [answers(model, folder / str(severity)) for severity in range(1, 6)]
        top1[name] = [top1_of(*of_severity) for of_severity in of_severities]
        assert entry[f"imagenet_c/{name}"]["top1"] == pytest.approx(top1[name])
        assert entry[f"imagenet_c/{name}"]["num"] == [4] * 5
        if name in stage.BENCHMARK:
            errors, alexnet = [100 - value for value in top1[name]], stage.ALEXNET_ERRORS[name]
            ce.append(100 * sum(errors) / (5 * alexnet))
            relative.append(100 * sum(error - clean for error in errors) / (5 * (alexnet - 43.478)))
    assert entry["summary"]["mce"] == pytest.approx(np.mean(ce))
    assert entry["summary"]["relative_mce"] == pytest.approx(np.mean(relative))
    assert entry["summary"]["imagenet_c"] == pytest.approx(np.mean([top1[name] for name in stage.BENCHMARK]))
    assert len({value for values in top1.values() for value in values}) > 2  # the model tells the images apart


def flips_of(work, perturbation: str) -> tuple[float, float]:
    """(flip probability, top-1 of the frames) in percent; official ImageNet-P/test.py, difficulty 1."""
    result, right = [], []
    for path in sorted((work / "imagenet-p" / perturbation).glob("*/*.mp4")):
        with av.open(str(path)) as file:
            frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        said = logits_on(frames, *loaded(work / "first" / "model.pt")).argmax(1)
        result_for_video, previous = [], said[0]
        for prediction in said[1:]:
            result_for_video.append(int(previous != prediction))
            if "noise" not in perturbation:
                previous = prediction
        result.append(np.mean(result_for_video))
        right.append(np.mean(said == NAMES.index(path.parent.name)))
    return 100 * np.mean(result), 100 * np.mean(right)


def test_imagenet_p(work, finished):
    entry = results(work)
    expected = {name: flips_of(work, name) for name in stage.ALEXNET_FLIPS}
    for name, (flip, top1) in expected.items():
        item = entry[f"imagenet_p/{name}"]
        assert item["flip"] == pytest.approx(flip) and item["top1"] == pytest.approx(top1) and item["num"] == 4
    ratios = [flip / stage.ALEXNET_FLIPS[name] for name, (flip, _) in expected.items()]
    assert entry["summary"]["mfr"] == pytest.approx(100 * np.mean(ratios))
    mfp = np.mean([flip for flip, _ in expected.values()])
    assert entry["summary"]["mfp"] == pytest.approx(mfp) and 0 < mfp < 100


def test_cifar10_c_and_processes(work, run_stage):
    words = ("06_eval_robustness.py", "cifar/model.pt", "--cifar10-c", "cifar10-c", "--out", "cifar-out")
    run_stage(*words, nproc=2, cwd=work)
    entry = results(work, "cifar-out", "cifar/model.pt")
    labels = [CIFAR[::-1].index(CIFAR[label]) for label in np.load(work / "cifar10-c" / "labels.npy")]
    expected = {}
    for name in ALL_19:  # 0 to 9 are the names in alphabetical order
        images = np.load(work / "cifar10-c" / f"{name}.npy")
        logits = logits_on(images, *loaded(work / "cifar" / "model.pt"))
        expected[name] = (100 * (logits.argmax(1) == labels).reshape(5, 12).mean(axis=1)).tolist()
        assert entry[f"cifar10_c/{name}"]["top1"] == pytest.approx(expected[name])
    summary, all_19 = entry["summary"], np.array(list(expected.values()))
    assert summary["cifar10_c"] == pytest.approx(np.mean([expected[name] for name in stage.BENCHMARK]))
    assert summary["cifar10_c_19"] == pytest.approx(all_19.mean())
    assert summary["cifar10_c_19_severity5"] == pytest.approx(all_19[:, 4].mean())


# sets that are not whole, and sets that changed


def test_what_is_missing_or_broken_is_a_gap_of_its_own(work, finished, call_main, monkeypatch, tmp_path):
    of_sets = []
    for name in ("imagenet-a", "imagenet-c", "imagenet-p", "cifar10-c"):
        of_sets += [f"--{name}", shutil.copytree(work / name, tmp_path / name)]

    def of_c(name):
        return next((tmp_path / "imagenet-c").glob(f"**/{name}"))

    (tmp_path / "imagenet-a" / "n77").mkdir()
    shutil.rmtree(of_c("fog"))
    shutil.rmtree(of_c("snow") / "3" / "n01")
    write_files(of_c("frost"), {f"{severity}/n77/0.png": b"another set" for severity in range(1, 6)})
    shutil.rmtree(of_c("spatter"))  # an extra one: not asked for
    (tmp_path / "imagenet-p" / "tilt" / "n01" / "0.mp4").write_bytes(b"no video")
    shutil.rmtree(tmp_path / "imagenet-p" / "scale")
    np.save(tmp_path / "cifar10-c" / "fog.npy", np.zeros((60, 32, 32), np.uint8))
    (tmp_path / "cifar10-c" / "snow.npy").unlink()
    monkeypatch.chdir(work)
    models = ("first/model.pt", "cifar/model.pt")
    done = call_main("06_eval_robustness", *models, *of_sets, "--out", tmp_path / "out")
    assert done.returncode == 0 and done.stdout.count("0.mp4") == 1
    first, cifar = (results(tmp_path, "out", path) for path in models)
    gaps = {"imagenet_a": "n77", "imagenet_c/fog": "fog", "imagenet_c/snow": "snow", "imagenet_c/frost": "n77"}
    gaps |= {"imagenet_p/scale": "scale", "cifar10_c/fog": "fog.npy", "cifar10_c/snow": "snow.npy"}
    for key, named in gaps.items():
        assert named in first[key]["gap"] and "top1" not in first[key] and key in done.stdout
    assert "imagenet_c/spatter" not in first and "n01" in cifar["imagenet_c/contrast"]["gap"]
    assert first["imagenet_p/tilt"]["num"] == 3 and "top1" in cifar["cifar10_c/frost"]
    for name in set(ALL_19) - {"fog", "snow", "frost", "spatter"}:
        assert first[f"imagenet_c/{name}"]["top1"] == results(work)[f"imagenet_c/{name}"]["top1"]
    for summary in (first["summary"], cifar["summary"]):
        assert not summary.keys() & {"imagenet_c", "mce", "mfr", "mfp", "cifar10_c", "cifar10_c_19"}


def test_of_corruptions_with_other_numbers_of_images_there_is_no_mean():
    entry = {f"imagenet_c/{name}": {"top1": [50.0] * 5, "num": [4] * 5} for name in stage.BENCHMARK}
    assert stage.summarize(entry).keys() == {"imagenet_c", "mce"}
    for other in ({"num": [3] * 5}, {"settings": {"images": "of other names"}}):
        changed = entry | {"imagenet_c/fog": entry["imagenet_c/fog"] | other}
        assert not stage.summarize(changed) and "imagenet_c" in stage.gaps_of({"model.pt": changed})


def test_arrays_that_are_not_of_cifar10_c(tmp_path):
    def listed(images, labels):
        np.save(tmp_path / "fog.npy", images)
        np.save(tmp_path / "labels.npy", labels)
        return stage.list_array(tmp_path / "fog.npy")

    images, labels = np.zeros((10, 8, 8, 3), np.uint8), np.tile([3, 9], 5)
    assert listed(images, labels).labels.tolist() == [3, 9]
    assert listed(images, labels).settings != listed(images, labels - 1).settings
    wrong_images = [(wrong, labels[: len(wrong)]) for wrong in (images.astype(float), images[:9], images[..., :2])]
    for wrong in (*wrong_images, (images, labels[:5]), (images, np.arange(10)), (images, labels + 1)):
        with pytest.raises(ValueError):
            listed(*wrong)


def test_without_pyav_one_line_before_anything_is_measured(work, run_stage, tmp_path):
    words = ("first/model.pt", *SETS[:2], "--imagenet-p", "imagenet-p", "--out", tmp_path / "out")
    done = run_stage("06_eval_robustness.py", *words, cwd=work, check=False, WITHOUT="av")
    assert_mistake(done, "pip install av")
    assert not (tmp_path / "out").exists()


def test_a_set_that_has_grown_is_measured_again_and_another_one_does_not_touch_it(work, call_main, tmp_path):
    image, path = encoded(colored(0, 0)), work / "first" / "model.pt"
    write_files(tmp_path, {"a/n01/0.jpg": image, "b/n01/0.jpg": image, "b/n01/1.jpg": image})

    def nums(name, folder):
        words = ("--folder", f"{name}={tmp_path / folder}", "--out", tmp_path / "out")
        assert call_main("06_eval_robustness", path, *words).returncode == 0
        entry = results(tmp_path, path=str(path))
        return {key: entry[key]["num"] for key in entry if key.startswith("folder/")}

    nums("one", "a")
    assert nums("two", "b") == {"folder/one": 1, "folder/two": 2}
    write_files(tmp_path, {"a/n03/more.jpg": image})
    assert nums("one", "a") == {"folder/one": 2, "folder/two": 2}
