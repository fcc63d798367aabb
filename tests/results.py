"""The numbers behind docs/results.md. `tests/results.py NAME robustness.json` keeps what tests/evidence.sh measured as
docs/results/NAME.json, small enough for the repository, and the picture beside it. With and without arguments
docs/results.md and the README's first table are then made of these files.

    docs/results/NAME.json  {"commit", "machine", "torch", "verdict": last paragraph of verdict.md,
                             "models": {model: {seed: {"clean", "corrupted", "num"}}}}
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import interval_over_seeds, write_atomically  # noqa: E402  results, the program

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
    "1/4": ("all against 1/4", "", "share-0.25", "student1"),
    "1/2": ("all against 1/2", "", "share-0.5", "student1"),
    "ratio": ("a higher ratio helps: 3 against 1", "L2: 86.7 to 87.4", "ratio-1", "student1"),
    "larger": ("a larger student is better", "B0 to B1: 77.9 to 79.5", "student1", "larger-student"),
    "larger control": ("and than the labels alone with that model", "", "larger-control", "larger-student"),
    "scratch": ("from scratch is as good as from the teacher", "", "from-its-teacher", "student1"),
    "joint": ("joint training against pre-training and fine-tuning", "B0: 77.5 to 77.9", "finetuned", "student1"),
    "fine-tuning": ("fine-tuning is crucial (billion-scale)", "", "pretrained", "finetuned"),
    "consistency": (
        "consistency with supervision, the labels alone",
        "CIFAR-10: 84.8 to 85.2",
        "control",
        "consistency",
    ),
}


def collect(name: str, source: Path) -> None:
    """Keep the top-1 of each model and seed, with what made them."""
    models = {}
    for path, entry in json.loads(source.read_text()).items():
        *_, seed, model, _ = ("", *Path(path).parts)
        seed = seed if seed.startswith("seed") else "seed0"
        found = {"clean": entry["clean"]["top1"], "corrupted": entry.get("corrupt", {}).get("top1")}
        models.setdefault(model, {})[seed] = found | {"num": entry["clean"]["num"]}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    machine = f"{os.cpu_count()} cores, {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else machine
    kept = {"commit": commit.strip(), "machine": machine, "torch": torch.__version__, "models": models}
    out = ROOT / "docs" / "results" / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    if (source.parent / "verdict.md").exists():
        kept["verdict"] = (source.parent / "verdict.md").read_text().strip().split("\n\n")[-1]  # the table is made anew
    if (source.parent / "robustness.png").exists():
        shutil.copy(source.parent / "robustness.png", out.with_suffix(".png"))
    with write_atomically(out) as temporary:
        temporary.write_text(json.dumps(kept, indent=1) + "\n")


def difference(models: dict, better: str, worse: str, what: str) -> tuple[float, float, int] | None:
    """(mean of better - worse over the seeds that both have, half the 95 percent interval, seeds)."""
    both = [
        (models[better][s][what], models[worse][s][what]) for s in models.get(better, {}) if s in models.get(worse, {})
    ]
    both = [pair for pair in both if None not in pair]
    if len(both) < 2:
        return None
    return *interval_over_seeds(np.array([one - other for one, other in both])), len(both)


def cell(found: tuple[float, float, int] | None) -> str:
    return f"{found[0]:+.2f} ± {found[1]:.2f}" if found else "-"


def shown(found: tuple[float, float, int]) -> str:
    """Whether the interval of the difference says what the paper says."""
    mean, half, _ = found
    return "not shown" if abs(mean) <= half else "yes" if mean > 0 else "the other way"


HEADINGS = ("model", "clean, seed by seed", "clean", "corrupted", "clean - control", "corrupted - control")


def cells_of(model: str, models: dict) -> list[str]:
    """A model's row under HEADINGS."""
    seeds = models[model]
    cells = [model, ", ".join(f"{of['clean']:.2f}" for of in seeds.values())]
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


def made(kept: dict) -> str:
    """How many images and how many runs, and by what."""
    nums = max(of["num"] for seeds in kept["models"].values() for of in seeds.values())
    by = f"commit {kept['commit']}, {kept['machine']}, torch {kept['torch']}"
    what = "mean ± standard deviation over the seeds, differences ± their 95 percent t interval"
    return f"Top-1 in percent of {nums:,} images of val, {what}; {by}."


def tables() -> str:
    words = ["# Results", ""]
    words.append("Made by `python tests/results.py` of docs/results/*.json, which `tests/evidence.sh` wrote.")
    for file in sorted((ROOT / "docs" / "results").glob("*.json")):
        kept, name = json.loads(file.read_text()), file.stem
        models = kept["models"]
        words += ["", f"## {name}", "", *folded(kept.get("about", ""))]
        words += [*folded(made(kept)), *table(HEADINGS, [cells_of(model, models) for model in models])]
        words += ["", *folded(kept.get("verdict", ""))]
        if file.with_suffix(".png").exists():
            words += [f"![every model a colour, every seed a dot](results/{name}.png)"]
        if name == "claims":
            rows = []
            for claim, paper, worse, better in CLAIMS.values():
                if found := difference(models, better, worse, "clean"):
                    cells = [f"{claim} (`{better}` - `{worse}`)", paper, cell(found)]
                    rows.append([*cells, cell(difference(models, better, worse, "corrupted")), shown(found)])
            headings = ("claim", "the paper, ImageNet", "ours: better arm - worse arm", "corrupted", "shown")
            words += ["", *table(headings, rows)]
    return "\n".join(words) + "\n"


def folded(text: str) -> list[str]:
    """A paragraph in lines of 120 columns and an empty line."""
    return [*textwrap.wrap(text, 120), ""] if text else []


def readme(text: str) -> str:
    """The README with its first table made of docs/results/demo.json, if that is there."""
    file = ROOT / "docs" / "results" / "demo.json"
    if not file.exists():
        return text
    kept = json.loads(file.read_text())
    seeds = max(len(of) for of in kept["models"].values())
    rows = [
        [cell for number, cell in enumerate(cells_of(model, kept["models"])) if number != 1] for model in kept["models"]
    ]
    words = [f'`SEEDS="{" ".join(map(str, range(seeds)))}" ./run.sh` ends so ([more](docs/results.md)):', ""]
    words += [*table([HEADINGS[0], *HEADINGS[2:]], rows), "", *folded(f"{made(kept)} {kept.get('verdict', '')}")]
    if file.with_suffix(".png").exists():
        words.append("![every model a colour, every seed a dot](docs/results/demo.png)")
    return re.sub("(?<=<!-- demo table -->\n).*?(?=<!-- end -->)", lambda _: "\n".join(words) + "\n", text, flags=re.S)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        collect(sys.argv[1], Path(sys.argv[2]))
    for file, text in (
        (ROOT / "docs" / "results.md", tables()),
        (ROOT / "README.md", readme((ROOT / "README.md").read_text())),
    ):
        with write_atomically(file) as temporary:
            temporary.write_text(text)
