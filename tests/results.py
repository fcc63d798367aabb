"""The numbers behind docs/results.md. `tests/results.py NAME SEED robustness.json` keeps what tests/evidence.sh
measured of a seed as docs/results/NAME/SEED.json, small enough for the repository. With and without arguments
docs/results.md, its pictures and the README's first table are then made of these files.

    docs/results/NAME/about.txt   what stands above its table
    docs/results/NAME/seedN.json  {"commit", "machine", "torch", "models": {model: {"clean", "corrupted", "num"}},
                                   "selection": of the last student, "is_rising": it was still getting better}
"""

import json
import os
import platform
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

# {arm of `claims`: (the claim, what the paper found, the arm that should be worse, the one that should be better)}
CLAIMS = {
    "self-training": ("more than the labels alone", "B7: 85.0 to 86.9", "control", "student1"),
    "randaugment": ("RandAugment on the student matters", "84.9 to 84.6", "without-randaugment", "student1"),
    "model noise": ("dropout and stochastic depth matter", "84.6 to 84.3", "without-model-noise", "student1"),
    "noise": ("noise on the student matters", "84.9 to 84.3", "without-noise", "student1"),
    "teacher": ("a noised teacher is worse", "84.9 to 84.4", "noised-teacher", "student1"),
    "soft": ("soft labels are at least as good as hard ones", "B0: up to 1.8", "hard-labels", "student1"),
    "balance": ("balance helps (a long tail of 10:1)", "B0: 77.6 to 77.9 (unverified)", "unbalanced", "student1"),
    "1/8": ("more unlabelled images help: all against 1/8", "B4: 83.4 at 1/128", "share-0.125", "student1"),
    "ratio": ("a higher ratio helps: 3 against 1", "L2: 86.7 to 87.4", "student1", "ratio-3"),
    "larger": ("a larger student is better", "B0 to B1: 77.9 to 79.5", "student1", "larger-student"),
    "larger control": ("and than the labels alone with that model", "", "larger-control", "larger-student"),
    "scratch": ("from scratch is as good as from the teacher", "", "from-its-teacher", "student1"),
    "joint": ("joint training against pre-training and fine-tuning", "B0: 77.5 to 77.9", "finetuned", "student1"),
    "billion-scale": (
        "pre-training and fine-tuning against the labels alone",
        "ResNet-50: 76.4 to 79.1 (unverified)",
        "control",
        "finetuned",
    ),
    "fine-tuning": ("fine-tuning is crucial (billion-scale)", "", "pretrained", "finetuned"),
    "consistency": (
        "consistency with supervision, the labels alone",
        "CIFAR-10: 84.8 to 85.2",
        "control",
        "consistency",
    ),
    "iteration": ("a second round helps (the demo's seeds)", "L2: 87.6 to 88.1", "student1", "student2"),
    "robustness": (
        "more is gained on corrupted images than on clean ones",
        "L2: 85.5 to 88.4, ImageNet-A 49.6 to 83.7",
        "control",
        "student1",
    ),
}


def collect(name: str, seed: str, source: Path) -> None:
    """Keep the top-1 of each model of a seed, with what made them."""
    results, threads = json.loads(source.read_text()), torch.get_num_threads()
    models = {
        Path(path).parent.name: {
            "clean": entry["clean"]["top1"],
            "corrupted": entry.get("corrupt", {}).get("top1"),
            "num": entry["clean"]["num"],
        }
        for path, entry in results.items()
    }
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    machine = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {threads} of {os.cpu_count()} cores"
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else machine
    rows = [common.Row(model, [path], [{}], [seed], {}, {}) for path, model in zip(results, models, strict=True)]
    selection, is_rising = common.history_of(rows)
    named = ("unique_images", "images", "threshold", "method", "truth")
    selection = {key: selection[key] for key in named if key in selection}
    kept = {"commit": os.environ.get("COMMIT", head.strip()), "machine": machine, "torch": torch.__version__}
    out = ROOT / "docs" / "results" / name / f"{seed}.json"
    before = json.loads(out.read_text()) if out.exists() else {"models": {}}
    if before["models"].keys() - models.keys():  # these arms are others than those of an earlier run
        models = before["models"] | models
        kept = {key: "; ".join(dict.fromkeys([*before[key].split("; "), of])) for key, of in kept.items()}
        selection, is_rising = (selection, is_rising) if selection else (before["selection"], before["is_rising"])
    out.parent.mkdir(parents=True, exist_ok=True)
    with common.write_atomically(out) as temporary:
        kept |= {"models": models, "selection": selection, "is_rising": is_rising}
        temporary.write_text(json.dumps(kept, indent=1) + "\n")


def runs_of(name: str) -> dict[str, dict]:
    """{seed: what `collect` kept}, in the order of the seeds."""
    files = sorted((ROOT / "docs" / "results" / name).glob("seed*.json"), key=lambda file: int(file.stem[4:]))
    return {file.stem: json.loads(file.read_text()) for file in files}


def models_of(runs: dict[str, dict]) -> dict[str, dict]:
    """{model: {seed: {"clean", "corrupted", "num", "gap": corrupted - clean}}}, the common three first."""
    models = {
        name: {} for name in ("teacher", "control", "student1") if any(name in of["models"] for of in runs.values())
    }
    for seed, run in runs.items():
        for name, of in run["models"].items():
            gap = None if of["corrupted"] is None else of["corrupted"] - of["clean"]
            models.setdefault(name, {})[seed] = of | {"gap": gap}
    return models


def verdict_of(runs: dict[str, dict]) -> str:
    """The last paragraph of run.sh on these runs; "" of one seed, which is no evidence."""
    if len(runs) < 2:
        return ""
    rows = []
    for model, seeds in models_of(runs).items():
        paths, values = [f"{seed}/{model}/model.pt" for seed in seeds], {}
        for heading, what in (("clean top-1", "clean"), ("corrupted top-1", "corrupted")):
            found = [of[what] for of in seeds.values()]
            values |= {} if None in found else {heading: found}
        rows.append(common.Row(model, paths, [{}] * len(seeds), list(seeds), values, {}))
    last = list(runs.values())[-1]
    return common.verdict(rows, last["selection"], last["is_rising"])


def draw(models: dict, file: Path) -> None:
    """Every model a column, every seed a dot; a line joins the models of a seed. Without those that are far below: the
    student that has not been tuned for the larger size, and the teacher of the recipe before."""
    models = {model: seeds for model, seeds in models.items() if model not in ("untuned", "before")}
    if (plt := common.pyplot()) is None:
        return
    kinds = [
        what for what in ("clean", "corrupted") if all(of[what] for seeds in models.values() for of in seeds.values())
    ]
    _, axes = plt.subplots(
        1, len(kinds), figsize=(1 + 4 * len(kinds), 3.2), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, what in zip(axes[0], kinds, strict=True):
        for number, seed in enumerate(dict.fromkeys(seed for seeds in models.values() for seed in seeds)):
            points = [(place, seeds[seed][what]) for place, seeds in enumerate(models.values()) if seed in seeds]
            axis.plot(
                *zip(*points, strict=True), "o-", color=f"C{number % 10}", linewidth=0.5, markersize=5, label=seed
            )
        for place, seeds in enumerate(models.values()):
            mean = np.mean([of[what] for of in seeds.values()])
            axis.plot([place - 0.3, place + 0.3], [mean, mean], color="black", linewidth=2)
            top = max(of[what] for of in seeds.values())
            axis.annotate(f"{mean:.1f}", (place, top), (0, 6), textcoords="offset points", ha="center")
        axis.set_xticks(range(len(models)), models)
        axis.margins(0.1)
        axis.set(title=what)
    axes[0, 0].set_ylabel("top-1 in percent")
    axes[0, 0].legend(frameon=False)
    common.save_figure(plt, file)


def difference(models: dict, better: str, worse: str, what: str) -> tuple[float, float, int] | None:
    """(mean of better - worse over the seeds that both have, half the 95 percent interval, seeds)."""
    both = [
        (models[better][s][what], models[worse][s][what]) for s in models.get(better, {}) if s in models.get(worse, {})
    ]
    both = [pair for pair in both if None not in pair]
    if len(both) < 2:
        return None
    return *common.interval_over_seeds(np.array([one - other for one, other in both])), len(both)


def cell(found: tuple[float, float, int] | None) -> str:
    return f"{found[0]:+.2f} ± {found[1]:.2f}" if found else "-"


def shown(found: tuple[float, float, int]) -> str:
    """Whether the interval of the difference says what the paper says."""
    mean, half, _ = found
    return "not shown" if abs(mean) <= half else "yes" if mean > 0 else "the other way"


HEADINGS = ("model", "clean, seed by seed", "clean", "corrupted", "clean - control", "corrupted - control")


def cells_of(model: str, models: dict) -> list[str]:
    """A model's row under HEADINGS."""
    seeds, every = models[model], sorted({int(seed[4:]) for of in models.values() for seed in of})
    each = (seeds.get(f"seed{seed}") for seed in every)
    cells = [model, ", ".join(f"{of['clean']:.2f}" if of else "-" for of in each)]
    for what in ("clean", "corrupted"):
        values = [of[what] for of in seeds.values() if of[what] is not None]
        spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
        cells.append(f"{np.mean(values):.2f}{spread}" if values else "-")
    both = [
        difference(models, model, "control", what) if model != "control" else None for what in ("clean", "corrupted")
    ]
    return cells + [cell(found) for found in both]


def table(headings, rows: list) -> list[str]:
    """Lines of a table in Markdown; numbers, which is all but the first column, to the right."""
    lines = [list(headings), ["---"] + ["---:"] * (len(headings) - 1), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def filled(headings, rows: list) -> tuple[list, list]:
    """The columns without those that are empty, or that say again what the column before them says."""
    columns = [*zip(headings, *rows, strict=True)]
    kept = [number for number, column in enumerate(columns) if {*column[1:]} != {"-"}]
    kept = [number for number in kept if not number or columns[number][1:] != columns[number - 1][1:]]
    return [headings[number] for number in kept], [[row[number] for number in kept] for row in rows]


def made(runs: dict[str, dict]) -> str:
    """How many images and how many runs, and by what."""
    nums = max(of["num"] for run in runs.values() for of in run["models"].values())
    by = {}
    for seed, run in runs.items():
        by.setdefault(f"commit {run['commit']}, {run['machine']}, torch {run['torch']}", []).append(seed[4:])
    by = "; ".join(f"{'seed ' + ' '.join(seeds) + ': ' if len(by) > 1 else ''}{what}" for what, seeds in by.items())
    what = ", mean ± standard deviation over the seeds, differences ± their 95 percent t interval" * (len(runs) > 1)
    return f"Top-1 in percent of {nums:,} images of val{what}; {by}."


def tables() -> str:
    words = ["# Results", ""]
    words.append(
        "Made by `python tests/results.py` of docs/results/*/seed*.json, which `tests/evidence.sh` wrote (those of"
    )
    words.append("`choices` were written by hand).")
    folders = (ROOT / "docs" / "results").glob("*/")
    for folder in sorted(folders, key=lambda folder: (folder.name.startswith("choices"), folder.name)):
        runs, name = runs_of(folder.name), folder.name
        if not runs:
            continue
        models = models_of(runs)
        words += ["", f"## {name}", "", *folded(about.read_text() if (about := folder / "about.txt").exists() else "")]
        words += [*folded(made(runs)), *table(*filled(HEADINGS, [cells_of(model, models) for model in models]))]
        words += ["", *folded(verdict_of(runs))]
        if (folder / "dots.png").exists():
            words += [f"![every model a column, every seed a dot](results/{name}/dots.png)"]
        if name == "claims":
            rows = []
            for key, (claim, paper, worse, better) in CLAIMS.items():
                of = models if better in models else models_of(runs_of("demo"))  # student2
                if found := difference(of, better, worse, "gap" if key == "robustness" else "clean"):
                    cells = [f"{claim} (`{better}` - `{worse}`)", paper]
                    cells += [cell(difference(of, better, worse, what)) for what in ("clean", "corrupted")]
                    rows.append([*cells, str(found[2]), shown(found)])
            headings = ("claim", "the paper, ImageNet", "ours: better arm - worse arm", "corrupted", "seeds", "shown")
            words += ["", *table(headings, rows)]
    return "\n".join(words) + "\n"


def folded(text: str) -> list[str]:
    """A paragraph in lines of 120 columns and an empty line."""
    return [*textwrap.wrap(text, 120, break_on_hyphens=False), ""] if text else []


def readme(text: str) -> str:
    """The README with its first table made of the demo's runs, if there are any."""
    if not (runs := runs_of("demo")):
        return text
    models, seeds = models_of(runs), " ".join(seed[4:] for seed in runs)
    rows = [[cell for number, cell in enumerate(cells_of(model, models)) if number != 1] for model in models]
    words = [f'`SEEDS="{seeds}" ./run.sh` ends so ([by what](docs/results.md)):', ""]
    words += [*table([HEADINGS[0], *HEADINGS[2:]], rows), ""]
    words += folded(f"{made(runs).partition(';')[0]}. {verdict_of(runs)}")
    if (ROOT / "docs" / "results" / "demo" / "dots.png").exists():
        words.append("![every model a column, every seed a dot](docs/results/demo/dots.png)")
    return re.sub("(?<=<!-- demo table -->\n).*?(?=<!-- end -->)", lambda _: "\n".join(words) + "\n", text, flags=re.S)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        collect(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    for name in ("demo", "cifar10"):
        if runs := runs_of(name):
            draw(models_of(runs), ROOT / "docs" / "results" / name / "dots.png")
    for file, text in (
        (ROOT / "docs" / "results.md", tables()),
        (ROOT / "README.md", readme((ROOT / "README.md").read_text())),
    ):
        with common.write_atomically(file) as temporary:
            temporary.write_text(text)
