"""tests/scale.py in small, in this process: it measures what it says, and its made-up files stay readable."""

import sys

import h5py
import numpy as np
import pytest
import scale
from conftest import load_stage

from common import DONE, SELECTION_FORMAT, open_label_file


@pytest.fixture
def run_here(monkeypatch, call_main, capsys):
    """The programs that are measured run in this process: Python starts torch no ten times. Gives what they printed."""
    printed = {}

    def run(what, first, *words, until=None):
        capsys.readouterr()
        if first == "-c":
            monkeypatch.setattr(sys, "argv", [first, *map(str, words[1:])])
            exec(words[0], {"__name__": "__main__"})
            printed[what] = capsys.readouterr().out
        else:
            done = call_main(first.removesuffix(".py"), *words)
            assert done.returncode == 0, done
            printed[what] = done.stdout
        assert until is None or until()

    monkeypatch.setattr(scale, "measured", run)
    return printed


def test_every_table_is_measured(run_here, tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "PER_SHARD", 30)
    monkeypatch.setattr(load_stage("03_balance"), "draw_selection", lambda *args: None)
    monkeypatch.setattr(scale, "NUM_CLASSES", 10)
    monkeypatch.setattr(scale, "NUM_NAMES", 64)
    scale.listing(tmp_path, 90)
    assert "listed 90 " in run_here["listing, and creating logits.h5"]
    scale.make_labels(tmp_path, 2000)
    with h5py.File(tmp_path / "logits.h5") as file:
        assert 0.2 < np.mean(file["confidence"][:] > 0.3) < 0.35  # 81 of 300 million, as the paper had them
    scale.labels(tmp_path, 2000)
    assert "2000 images, 1536 of them done before" in run_here["the last batch is left"]
    assert "2000 images, 2000 of them done before" in run_here["nothing is left"]
    with h5py.File(tmp_path / "logits.h5") as file:
        assert (file["status"][:] == DONE).all()
    scale.balance(tmp_path, 2000, 30)
    with open_label_file(tmp_path / "balanced.h5", SELECTION_FORMAT) as file:
        assert len(file["row"]) == 10 * 30
    scale.training(tmp_path)
    assert "300 keys" in run_here["the orders of two epochs, one after the other"]
    assert (tmp_path / "student" / "model.pt").exists()


def test_memory_and_seconds_are_those_of_the_program(capsys, tmp_path):
    code = "import time; x = bytearray(200_000_000); time.sleep(0.5); print('words'); x[::4096] = x[::4096]"
    scale.measured("a program", "-c", code, until=lambda: True)
    what, seconds, _, own, mapped, said = (word.strip() for word in capsys.readouterr().out.strip(" |\n").split("|"))
    assert what == "a program" and said.endswith("s up to it; words")
    assert 0.2 <= float(own) <= float(mapped) < 0.4 and int(seconds) <= 10
    with pytest.raises(SystemExit, match="status"):
        scale.measured("a program", "-c", "raise SystemExit(3)")
