"""The program around the method: what the user got wrong ends with status 2 and one line, and leaves nothing behind;
several nodes."""

import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import CHEAP, ROOT, assert_mistake, assert_same_weights, descendants, draw_data, encoded
from conftest import noise_image, results_of, save_model, write_files
from label_files import COLUMNS, read_logits

import common


BAD_INPUT = {  # {}: the places below
    "no data directory": ("01_train_teacher.py --data {tmp}/nothing --out {tmp}/o", "train/"),
    "an empty class": ("01_train_teacher.py --data {empty} --out {tmp}/o", "'hollow' has no images"),
    "val with a class that train lacks": ("01_train_teacher.py --data {extra} --out {tmp}/o", "unicorn"),
    "batch size 0": ("01_train_teacher.py --data {data} --out {tmp}/o --batch-size 0", "--batch-size"),
    "a typo in a flag": ("01_train_teacher.py --data {data} --out {tmp}/o --epoch 1", "--epoch"),
    "an unknown model": ("01_train_teacher.py --data {data} --out {tmp}/o --arch b0", "--arch"),
    "a text file as teacher": ("02_pseudo_label.py --teacher {text} --out {tmp}/o.h5", "not a checkpoint"),
    "no such teacher": ("04_train_student.py --teacher {tmp}/none.pt --out {tmp}/o", "no such checkpoint"),
    "no labels at all": ("04_train_student.py --out {tmp}/o", "--teacher or --pseudo-labels"),
    "no images": ("02_pseudo_label.py --teacher {teacher} --unlabeled {tmp}/no --out {tmp}/l", "no such folder"),
    "a text file as logits": ("03_balance.py {text} --out {tmp}/b.h5", "not a readable HDF5"),
    "a checkpoint as logits": ("03_balance.py {teacher} --out {tmp}/b.h5", "not a readable HDF5"),
    "a text file to tune": (
        "05_fixres_finetune.py --checkpoint {text} --image-size 40 --out {tmp}/o",
        "not a checkpoint",
    ),
    "too many blocks": (
        "05_fixres_finetune.py --checkpoint {teacher} --image-size 40 --out {tmp}/o --frozen-blocks 17",
        "--frozen-blocks 17",
    ),
    "a text file to evaluate": ("06_eval_robustness.py {text} --data {data} --out {tmp}/o", "not a checkpoint"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory, tiny_data):
    tmp = tmp_path_factory.mktemp("bad")
    empty, extra = draw_data(tmp / "empty"), draw_data(tmp / "extra")
    (empty / "train" / "hollow").mkdir()
    (extra / "val" / "unicorn").mkdir()
    shutil.copy(extra / "val" / "disc" / "0.png", extra / "val" / "unicorn" / "0.png")
    (tmp / "text.pt").write_text("I am not a checkpoint\n")
    teacher = save_model(tmp / "teacher.pt", "efficientnet_b0", data=str(tiny_data))
    return {"tmp": tmp, "empty": empty, "extra": extra, "text": tmp / "text.pt", "data": tiny_data, "teacher": teacher}


@pytest.mark.parametrize("mistake", BAD_INPUT)
def test_a_mistake_is_one_line_and_status_2(mistake, places, call_main):
    command, message = BAD_INPUT[mistake]
    listing = sorted(places["tmp"].rglob("*"))
    stage, *words = command.format(**places).split()
    assert_mistake(call_main(stage.removesuffix(".py"), *words), message)
    assert sorted(places["tmp"].rglob("*")) == listing, "it left something behind"


def test_a_mistake_of_two_processes_is_said_once(places, run_stage):
    flags = ["--teacher", places["text"], "--out", places["tmp"] / "l.h5"]
    assert_mistake(run_stage("02_pseudo_label.py", *flags, nproc=2, check=False), "not a checkpoint")


def test_under_torchrun_a_mistake_is_said_once(places, run_stage):
    flags = ["--teacher", places["text"], "--out", places["tmp"] / "l.h5"]
    done = run_stage(ROOT / "02_pseudo_label.py", *flags, nproc=2, check=False, launcher="torchrun")
    assert done.returncode == 1 and done.stderr.count("not a checkpoint") == 1


# several nodes


SRUN = """#!/bin/bash
shift  # --kill-on-bad-exit=0
for node in 0 1; do
    [ $node = 0 ] && is_host=true || is_host=false
    NODE=$node PET_RDZV_CONF="is_host=$is_host,keep_alive_interval=1" "$@" &
done
wait -n && wait -n"""
TORCHRUN = """#!/bin/bash
echo $$ >> {tmp}/agent$NODE
exec {python3} {agent} "$@" """


@pytest.fixture
def sbatch(start_stage, tmp_path):
    """sbatch(words of a stage) -> Popen of the script in docs/nodes.md, whose srun has two nodes, both on this machine.

    torchrun is its own agent, from the fork server, and so are the processes that it starts.
    """
    script = re.search(r"^```bash\n(.*?)^```", (ROOT / "docs/nodes.md").read_text(), re.M | re.S)[1]
    python3 = Path(start_stage.python3)
    torchrun = TORCHRUN.format(tmp=tmp_path, python3=python3, agent=python3.parent.parent / "torchrun.py")
    commands = {"srun": SRUN, "scontrol": "#!/bin/bash\nprintf '127.0.0.1\\n127.0.0.1\\n'", "torchrun": torchrun}
    for name, text in commands.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON_EXEC": str(python3), "SLURM_NNODES": "2"}
    env |= {"SLURM_JOB_NODELIST": "n[0-1]", "SLURM_JOB_ID": "7", "WITHOUT": "matplotlib"}
    jobs = []

    def start(*words):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            text = script.replace(":29500", f":{free.getsockname()[1]}")
        command = ["bash", "-c", text, "nodes.sh", *map(str, words)]
        jobs.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True))
        return jobs[-1]

    yield start
    for pid in (pid for job in jobs if job.poll() is None for pid in descendants(job.pid)):
        os.kill(pid, signal.SIGKILL)


def test_two_nodes_one_of_which_is_killed(tiny_data, run_stage, sbatch, tmp_path):
    """docs/nodes.md's script labels and trains as one node with two processes does; the killed agent comes back."""
    teacher = save_model(tmp_path / "teacher.pt", data=str(tiny_data))
    many = write_files(tmp_path / "many", {f"{i}.png": encoded(noise_image(8, 8, i), "PNG") for i in range(600)})
    label = [ROOT / "02_pseudo_label.py", "--teacher", teacher, "--unlabeled", many, "--out"]
    train = [ROOT / "04_train_student.py", "--teacher", teacher, "--arch", CHEAP, "--batch-size", 4, "--ratio", 1]
    train += ["--optimizer", "sgd", "--lr", 0.01, "--warmup-epochs", 0, "--epochs", 5, "--save-every", 1, "--out"]
    run_stage(*label, tmp_path / "1.h5", nproc=2)
    run_stage(*train, tmp_path / "1", nproc=2, WITHOUT="matplotlib")

    job = sbatch(*label, tmp_path / "2.h5")
    assert "600 images, 0 of them done before" in job.communicate(timeout=120)[0] and job.returncode == 0
    one, two = (read_logits(tmp_path / name) for name in ("1.h5", "2.h5"))
    assert all(one[name].tobytes() == two[name].tobytes() for name in COLUMNS)

    for number in (0, 1):
        (tmp_path / f"agent{number}").unlink()
    job = sbatch(*train, tmp_path / "2")
    end = time.monotonic() + 120
    while not (tmp_path / "2" / "last.pt").exists():
        assert job.poll() is None and time.monotonic() < end
        time.sleep(0.005)
    for pid in descendants(int((tmp_path / "agent1").read_text())):
        os.kill(pid, signal.SIGKILL)
    printed = job.communicate(timeout=120)[0]
    assert job.returncode == 0 and re.search(r"from step [1-9]", printed), printed
    assert [len((tmp_path / name).read_text().split()) for name in ("agent0", "agent1")] == [1, 2]
    assert_same_weights(tmp_path / "1" / "model.pt", tmp_path / "2" / "model.pt")
    assert results_of(tmp_path / "1") == results_of(tmp_path / "2")


@pytest.fixture
def start_nodes(start_stage, tmp_path):
    """start_nodes(words of process 0, words of process 1) -> two stages, as if each ran on a machine of its own."""
    stores = []

    def start(*words):
        stores.append(torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": stores[-1].port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
        env |= {"TORCHELASTIC_RESTART_COUNT": "0", "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "WORLD_SIZE": len(words)}
        env |= {"PYTHONPATH": ROOT}
        return [start_stage(*mine, RANK=rank, **env) for rank, mine in enumerate(words)]

    return start


def test_a_node_without_the_disk_is_told_so(tiny_data, run_stage, start_nodes, tmp_path):
    """Neither labelling nor a training goes on, though the node has a file and a folder of earlier runs of its own."""
    assert common.LOOK_SECONDS < 50  # "within a minute"
    short = tmp_path / "short.py"
    short.write_text("import runpy, sys, common\ncommon.LOOK_SECONDS, sys.argv = 0.5, sys.argv[1:]\n")
    short.write_text(short.read_text() + "runpy.run_path(sys.argv[0], run_name='__main__')\n")
    teacher = save_model(tmp_path / "teacher.pt", data=str(tiny_data))
    label = [ROOT / "02_pseudo_label.py", "--teacher", teacher, "--out"]
    train = [ROOT / "01_train_teacher.py", "--data", tiny_data, "--arch", CHEAP, "--epochs", 1, "--out"]
    for name in ("here", "there"):
        run_stage(*label, tmp_path / name / "l.h5")
        (tmp_path / name / ".l.h5.begun").write_text("of an earlier run")
    for words, name in ((label, "l.h5"), (train, "t")):
        stages = start_nodes(*([short, *words, tmp_path / place / name] for place in ("here", "there")))
        for stage in stages:
            stage.wait(60)
            lost = tmp_path / "there" / f".{name}.begun"
            assert_mistake(stage, "--out", f"process 1 on {socket.gethostname()} does not see {lost}")
            assert not stage.stdout
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["l.h5"], "it left something behind"


def test_nodes_with_other_devices_or_images_are_told_so(tiny_data, start_nodes, tmp_path, capsys, monkeypatch):
    store, ends = torch.distributed.HashStore(), []

    def node(rank, devices):
        with pytest.raises(SystemExit) as end:
            common.check_nodes(store, rank, 2, tmp_path / "t", devices)
        ends.append(end.value.code)

    monkeypatch.setenv("LOCAL_RANK", "0")
    threads = [threading.Thread(target=node, args=(rank, kind)) for rank, kind in enumerate(("GPUs", "CPUs"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    lines = capsys.readouterr().err.splitlines()
    assert ends == [2, 2] and len(lines) == 2
    assert all("--device: process 1 on" in line and "runs on CPUs, process 0 on GPUs" in line for line in lines)

    compare = "import sys\nfrom common import *\nprocesses, images = init_processes('cpu'), list_images(sys.argv[1])\n"
    (tmp_path / "compare.py").write_text(f"{compare}input_digests({{'data/train': images}}, processes)\n")
    fewer = shutil.copytree(tiny_data / "train", tmp_path / "train")
    (fewer / "disc" / "0.png").unlink()
    stages = start_nodes(*([tmp_path / "compare.py", folder] for folder in (tiny_data / "train", fewer)))
    assert stages[0].wait(30) == 0
    stages[1].wait(30)
    assert_mistake(stages[1], "data/train", "has 23 images, names", "process 0's node 24 images, names")


FIRST = """import sys, time
from pathlib import Path
from common import first_of_node_first, init_processes
processes, file = init_processes("cpu"), Path(sys.argv[1])
with first_of_node_first():
    if not processes.rank:
        time.sleep(0.3)
    print(processes.rank, file.exists(), flush=True)
    file.touch()
"""


def test_the_first_process_of_a_node_downloads(run_stage, tmp_path):
    (tmp_path / "first.py").write_text(FIRST)
    done = run_stage(tmp_path / "first.py", tmp_path / "weights", nproc=2, PYTHONPATH=ROOT)
    assert done.stdout.splitlines() == ["0 False", "1 True"]


def test_all_processes_wait_for_the_end_of_the_run_before(tiny_data, run_stage, call_main, start_stage, tmp_path):
    """A process of a killed run, on another node, may still save. Who continues reads what it saved, all of them."""
    out = tmp_path / "t"
    flags = ["--data", tiny_data, "--arch", CHEAP, "--image-size", 32, "--batch-size", 4, "--optimizer", "sgd"]
    flags += ["--lr", 0.01, "--epochs", 2, "--out"]
    saved = []
    for step in (3, 6):
        assert call_main("01_train_teacher", *flags, out, stop_after=step).returncode == 143
        saved.append((out / "last.pt").read_bytes())
    shutil.copytree(out, tmp_path / "whole")
    run_stage("01_train_teacher.py", *flags, tmp_path / "whole", nproc=2, WITHOUT="matplotlib")
    (out / "last.pt").write_bytes(saved[0])
    common.LOCKS.clear()  # of call_main
    with open(out / ".lock", "a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        process = start_stage("01_train_teacher.py", *flags, out, nproc=2, WITHOUT="matplotlib")
        time.sleep(3)
        (out / "last.pt").write_bytes(saved[1])
    assert process.wait() == 0 and "from step 6" in process.stdout, process
    assert_same_weights(out / "model.pt", tmp_path / "whole" / "model.pt")
