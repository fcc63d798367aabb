"""The tables at the top of docs/results.md, made of docs/results/*.json.

    python tests/results.py add NAME OUT ...   add what run.sh wrote into the folders OUT (of other seeds each) to
                                               docs/results/NAME.json, then make all tables
    python tests/results.py                    make all tables

`add` records this commit and this machine; the variables COMMIT and HARDWARE name others.
"""

import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

stage = importlib.import_module("06_eval_robustness")


def made_by() -> dict[str, str]:
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name()]
    made = {"commit": os.environ.get("COMMIT", head.strip()), "torch": str(torch.__version__)}
    return made | {"hardware": os.environ.get("HARDWARE", (names or [os.uname().machine])[0])}


def add(name: str, runs: list[Path]) -> None:
    """Write docs/results/NAME.json; `models` is as in robustness.json, without what is long or names folders."""
    file = ROOT / "docs" / "results" / f"{name}.json"
    kept = {"made": made_by(), "images": {}, "labels": {}, "models": {}}
    if file.exists():  # seeds of an earlier day
        commit = kept["made"]["commit"]
        kept = json.loads(file.read_text())
        kept["made"]["commit"] = " ".join(dict.fromkeys([*kept["made"]["commit"].split(), commit]))
    images = kept["images"]
    for run in runs:
        for teacher in run.glob("seed*/teacher/model.pt"):
            images["labeled"] = sum(common.read_checkpoint(teacher)["class_counts"])
        for selected in sorted(run.glob("seed*/selected*.json")):
            report = json.loads(selected.read_text())
            images["unlabeled"] = report["candidates"]
            counts = {what: report[what] for what in ("threshold", "kept", "examples")}
            kept["labels"][f"{selected.parent.name}/{selected.stem}"] = counts | report.get("truth", {})
        for path, entry in json.loads((run / "robustness" / "robustness.json").read_text()).items():
            entry.pop("sha256", None)
            for result in entry.values():
                for long in ("settings", "per_class", "confusion"):
                    result.pop(long, None)
            images["val"] = entry["clean"]["num"]
            model = re.sub(r".*/(?=seed\d+/)", "", path)
            assert kept["models"].setdefault(model, entry) is entry, f"{model} is in two folders"
    file.write_text(json.dumps(kept) + "\n")


def section(name: str, file: Path) -> str:
    """What made the numbers, stage 06's report on them, and how many labels are right; or a table made by hand."""
    kept = json.loads(file.read_text())
    if "rows" in kept:
        headings, *rows = kept["rows"]
        lines = [headings, ["---"] + ["---:"] * (len(headings) - 1), *rows]
        return "\n".join([f"## {name}\n", *kept["text"], "", *(f"| {' | '.join(line)} |" for line in lines), ""])
    facts = [f"{what} {value}" for what, value in kept["made"].items()]
    facts += [f"{num:,} {what} images" for what, num in kept["images"].items()]
    seeds = set(re.findall(r"seed(\d+)/", " ".join(kept["models"])))
    facts.append("seeds " + " ".join(sorted(seeds, key=int)))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as report:
        stage.report(kept["models"], Path(folder))
    text = f"## {name}\n\nMade with {', '.join(facts)}.\n\n{report.getvalue()}"
    rows = [(selection, of) for selection, of in kept["labels"].items() if "accuracy_after" in of]
    right = [f"{selection} {of['accuracy_before']} to {of['accuracy_after']}" for selection, of in rows]
    if right:
        text += f"\nPercent of the labels that are right, before and after the selection: {', '.join(right)}.\n"
    return text


def main(words: list[str]) -> None:
    if words:
        add(words[1], [Path(word) for word in words[2:]])
    page, files = ROOT / "docs" / "results.md", sorted((ROOT / "docs" / "results").glob("*.json"))
    tables = "\n".join(section(file.stem, file) for file in files)
    page.write_text(re.sub("(?s)(?<=<!-- tables -->\n).*?(?=<!-- end -->)", lambda _: tables, page.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
