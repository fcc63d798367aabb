"""The numbers behind docs/results.md, which tests/evidence.sh measures.

    tests/results.py NAME SEED robustness.json   keep a seed as docs/results/NAME/SEED.json, then as without arguments
    tests/results.py                             make docs/results.md, its pictures and the README's first table

reads   docs/results/NAME/about.txt   what stands above its table
        docs/results/NAME/seedN.json  {"commit", "machine", "torch", "models": {model: {"clean", "corrupted", "num",
                                      "right"}}}, the last one as in robustness.json, missing in older ones
"""

import importlib
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

stage = importlib.import_module("06_eval_robustness")

PRETRAINING = "pre-training and fine-tuning against the labels alone"
ROBUSTNESS = "more is gained on corrupted images than on clean ones"
# (the claim, what the paper found, the arm that should be worse, the one that should be better)
CLAIMS = [
    ("more than the labels alone", "B7: 85.0 to 86.9", "control", "student1"),
    ("RandAugment on the student matters", "84.9 to 84.6", "without-randaugment", "student1"),
    ("dropout and stochastic depth matter", "84.6 to 84.3", "without-model-noise", "student1"),
    ("noise on the student matters", "84.9 to 84.3", "without-noise", "student1"),
    ("a noised teacher is worse", "84.9 to 84.4", "noised-teacher", "student1"),
    ("soft labels are at least as good as hard ones", "B0: up to 1.8", "hard-labels", "student1"),
    ("balance helps (a long tail of 10:1)", "B0: 77.6 to 77.9 (unverified)", "unbalanced", "student1"),
    ("more unlabelled images help: all against 1/8", "B4: 83.4 at 1/128", "share-0.125", "student1"),
    ("a higher ratio helps: 3 against 1", "L2: 86.7 to 87.4", "student1", "ratio-3"),
    ("a larger student is better", "B0 to B1: 77.9 to 79.5", "student1", "larger-student"),
    ("and than the labels alone with that model", "", "larger-control", "larger-student"),
    ("from scratch is as good as from the teacher", "", "from-its-teacher", "student1"),
    ("joint training against pre-training and fine-tuning", "B0: 77.5 to 77.9", "finetuned", "student1"),
    (PRETRAINING, "ResNet-50: 76.4 to 79.1 (unverified)", "control", "finetuned"),
    ("fine-tuning is crucial (billion-scale)", "", "pretrained", "finetuned"),
    ("consistency with supervision, the labels alone", "CIFAR-10: 84.8 to 85.2", "control", "consistency"),
    ("a second round helps (the demo's seeds)", "L2: 87.6 to 88.1", "student1", "student2"),
    (ROBUSTNESS, "L2: 85.5 to 88.4, ImageNet-A 49.6 to 83.7", "control", "student1"),
]


def collect(name: str, seed: str, source: Path) -> None:
    """Keep the top-1 of each model of a seed, with what made them."""
    models = {}
    for path, entry in json.loads(source.read_text()).items():
        kept = {"clean": entry["clean"]["top1"], "corrupted": entry.get("summary", {}).get("corrupted")}
        models[Path(path).parent.name] = kept | {key: entry["clean"].get(key) for key in ("num", "right")}
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    cores = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    machine = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {cores}"
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    made = {"commit": os.environ.get("COMMIT", head.strip()), "machine": machine, "torch": torch.__version__}
    out = ROOT / "docs" / "results" / name / f"{seed}.json"
    before = json.loads(out.read_text()) if out.exists() else {"models": {}}
    if before["models"].keys() - models.keys():  # these arms are others than those of an earlier run
        models = before["models"] | models
        made = {key: "; ".join(dict.fromkeys([*before[key].split("; "), by])) for key, by in made.items()}
    with common.write_atomically(out) as temporary:
        temporary.write_text(json.dumps(made | {"models": models}, indent=1) + "\n")


def runs_of(name: str) -> dict[str, dict]:
    """{seed: what `collect` kept}, in the order of the seeds."""
    files = sorted((ROOT / "docs" / "results" / name).glob("seed*.json"), key=lambda file: int(file.stem[4:]))
    return {file.stem: json.loads(file.read_text()) for file in files}


def rows_of(runs: dict[str, dict]) -> dict[str, "stage.Row"]:
    """{model: the row that stage 06 would make of it, with `gap`, corrupted - clean}, the common three first."""
    entries = {}
    for seed, run in runs.items():
        for model, kept in run["models"].items():
            means = {}
            if kept["corrupted"] is not None:
                means = {"corrupted": kept["corrupted"], "gap": kept["corrupted"] - kept["clean"]}
            clean = {"top1": float(kept["clean"]), "num": kept["num"], "right": kept.get("right") or ""}
            entries[f"{seed}/{model}/model.pt"] = {"clean": clean, "summary": means}
    rows = {row.model: row for row in stage.rows_of(entries)}
    return {name: rows[name] for name in dict.fromkeys(("teacher", "control", "student1", *rows)) if name in rows}


def values_of(row, heading: str) -> dict[str, float]:
    """{seed: value}"""
    return {seed: columns[heading].value for seed, columns in row.columns.items() if heading in columns}


def verdict_of(rows: dict) -> str:
    """The last paragraph of run.sh on these runs; "" of one seed, which is no evidence."""
    return stage.verdict(list(rows.values())) if max(len(row.columns) for row in rows.values()) > 1 else ""


def draw(rows: dict, file: Path) -> None:
    """Every model a column, every seed a dot; a line joins the models of a seed."""
    plt = common.pyplot()
    if plt is None:
        return
    rows = {model: row for model, row in rows.items() if model not in ("untuned", "before")}  # far below
    kinds = [kind for kind in ("clean", "corrupted") if all(values_of(row, kind) for row in rows.values())]
    size = (1 + 4 * len(kinds), 3.2)
    _, axes = plt.subplots(1, len(kinds), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, kind in zip(axes[0], kinds, strict=True):
        values = [values_of(row, kind) for row in rows.values()]
        for number, seed in enumerate(dict.fromkeys(seed for of_model in values for seed in of_model)):
            places = [place for place, of_model in enumerate(values) if seed in of_model]
            dots = [values[place][seed] for place in places]
            axis.plot(places, dots, "o-", color=f"C{number % 10}", linewidth=0.5, markersize=5, label=seed)
        for place, of_model in enumerate(values):
            mean = np.mean(list(of_model.values()))
            axis.plot([place - 0.3, place + 0.3], [mean, mean], color="black", linewidth=2)
            top = (place, max(of_model.values()))
            axis.annotate(f"{mean:.1f}", top, (0, 6), textcoords="offset points", ha="center")
        axis.set_xticks(range(len(rows)), rows)
        axis.margins(0.1)
        axis.set(title=kind)
    axes[0, 0].set_ylabel("top-1 in percent")
    axes[0, 0].legend(frameon=False)
    common.save_figure(plt, file)


def gained(rows: dict, better: str, worse: str, heading: str) -> tuple[float, float] | None:
    """(mean of better - worse over the seeds that both have, half the 95 percent interval) of two seeds or more."""
    if better not in rows or worse not in rows:
        return None
    points, half, seeds = stage.difference(rows[better], rows[worse], heading) or (0, None, 0)
    return (points, half) if seeds > 1 else None


def cell(interval: tuple[float, float] | None) -> str:
    return f"{interval[0]:+.2f} ± {interval[1]:.2f}" if interval else "-"


HEADINGS = ("model", "clean, seed by seed", "clean", "corrupted", "clean - control", "corrupted - control")


def cells_of(model: str, rows: dict) -> list[str]:
    """A model's row under HEADINGS."""
    seeds = sorted({int(seed[4:]) for row in rows.values() for seed in row.columns})
    clean = values_of(rows[model], "clean")
    each = [f"{clean[f'seed{seed}']:.2f}" if f"seed{seed}" in clean else "-" for seed in seeds]
    cells = [model, ", ".join(each)]
    for heading in ("clean", "corrupted"):
        values = list(values_of(rows[model], heading).values())
        spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
        cells.append(f"{np.mean(values):.2f}{spread}" if values else "-")
    for heading in ("clean", "corrupted"):
        cells.append(cell(gained(rows, model, "control", heading) if model != "control" else None))
    return cells


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


def made_by(runs: dict[str, dict]) -> str:
    """How many images and how many runs, and by what."""
    num = max(kept["num"] for run in runs.values() for kept in run["models"].values())
    seeds = {}
    for seed, run in runs.items():
        seeds.setdefault(f"commit {run['commit']}, {run['machine']}, torch {run['torch']}", []).append(seed[4:])
    by = "; ".join(f"seed {' '.join(of)}: {made}" if len(seeds) > 1 else made for made, of in seeds.items())
    what = ""
    if len(runs) > 1:
        what = ", mean ± standard deviation over the seeds, differences ± their 95 percent interval"
    return f"Top-1 in percent of {num:,} images of val{what}; {by}."


def claims_table(rows: dict) -> list[str]:
    lines = []
    for claim, paper, worse, better in CLAIMS:
        arms = rows if better in rows else rows_of(runs_of("demo"))  # student2
        interval = gained(arms, better, worse, "gap" if claim == ROBUSTNESS else "clean")
        if not interval:
            continue
        points, half = interval
        shown = "not shown"
        if abs(points) > half:
            shown = "yes" if points > 0 else "the other way"
        both = [cell(gained(arms, better, worse, heading)) for heading in ("clean", "corrupted")]
        num_seeds = len(arms[better].columns.keys() & arms[worse].columns.keys())
        lines.append([f"{claim} (`{better}` - `{worse}`)", paper, *both, str(num_seeds), shown])
    headings = ("claim", "the paper, ImageNet", "ours: better arm - worse arm", "corrupted", "seeds", "shown")
    return ["", *table(headings, lines)]


def tables() -> str:
    made = "Made by `python tests/results.py` of docs/results/*/seed*.json, which `tests/evidence.sh` wrote"
    lines = ["# Results", "", *folded(f"{made} (those of `choices` were written by hand).")[:-1]]
    folders = (ROOT / "docs" / "results").glob("*/")
    for folder in sorted(folders, key=lambda folder: (folder.name.startswith("choices"), folder.name)):
        runs, name = runs_of(folder.name), folder.name
        if not runs:
            continue
        rows, about = rows_of(runs), folder / "about.txt"
        lines += ["", f"## {name}", "", *folded(about.read_text() if about.exists() else "")]
        lines += [*folded(made_by(runs)), *table(*filled(HEADINGS, [cells_of(model, rows) for model in rows]))]
        lines += ["", *folded(verdict_of(rows))]
        if (folder / "dots.png").exists():
            lines += [f"![every model a column, every seed a dot](results/{name}/dots.png)"]
        if name == "claims":
            lines += claims_table(rows)
    return "\n".join(lines) + "\n"


def folded(text: str) -> list[str]:
    """A paragraph in lines of 120 columns and an empty line."""
    return [*textwrap.wrap(text, 120, break_on_hyphens=False), ""] if text else []


def readme(text: str) -> str:
    """The README with its first table made of the demo's runs, if there are any."""
    runs = runs_of("demo")
    if not runs:
        return text
    rows, seeds = rows_of(runs), " ".join(seed[4:] for seed in runs)
    cells = [[cell for number, cell in enumerate(cells_of(model, rows)) if number != 1] for model in rows]
    lines = [f'`SEEDS="{seeds}" ./run.sh` ends so ([by what](docs/results.md)):', ""]
    lines += [*table([HEADINGS[0], *HEADINGS[2:]], cells), ""]
    lines += folded(f"{made_by(runs).partition(';')[0]}. {verdict_of(rows)}")
    if (ROOT / "docs" / "results" / "demo" / "dots.png").exists():
        lines.append("![every model a column, every seed a dot](docs/results/demo/dots.png)")
    return re.sub("(?<=<!-- demo table -->\n).*?(?=<!-- end -->)", lambda _: "\n".join(lines) + "\n", text, flags=re.S)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        collect(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    for name in ("demo", "cifar10"):
        if runs_of(name):
            draw(rows_of(runs_of(name)), ROOT / "docs" / "results" / name / "dots.png")
    readme_file = ROOT / "README.md"
    for file, text in ((ROOT / "docs" / "results.md", tables()), (readme_file, readme(readme_file.read_text()))):
        with common.write_atomically(file) as temporary:
            temporary.write_text(text)
