"""The README's commands are run as they stand there, only smaller."""

import os
import shlex
import shutil
import subprocess
import sys

from conftest import ROOT

# appended to the command: argparse takes the last value of a flag
SMALLER = {
    "01_train_teacher.py": "--epochs 1",
    "03_balance.py": "--threshold 0",  # a teacher of one epoch is sure of nothing
    "04_train_student.py": "--epochs 1",
    "06_eval_robustness.py": "--num-images 10",
}


def test_one_round_by_hand_as_the_readme_has_it(tmp_path):
    text = (ROOT / "README.md").read_text()
    commands = [line for block in text.split("```")[1::2] for line in block.splitlines() if line.startswith("python ")]
    stages = [shlex.split(command)[1] for command in commands]
    first_round = [stage for stage in stages if stage[0] == "0"][:7]
    assert first_round == sorted(path.name for path in ROOT.glob("0*.py")), "one command for each stage, in order"
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    for command, stage in zip(commands, stages, strict=True):
        args = [sys.executable, *shlex.split(command)[1:], *SMALLER.get(stage, "").split()]
        done = subprocess.run(args, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    for name in ("teacher/model.pt", "logits.h5", "balanced.png", "student/model.pt", "fixres/resolution.png"):
        assert (tmp_path / "runs" / name).exists(), name
    assert "| student" in (tmp_path / "runs" / "robustness" / "robustness.md").read_text()
