"""What a run of several processes promises: the same as one, through kills, signals and full disks.

Ranks are forked from a server that has imported torch once, and are told what torchrun would tell.
Nobody watches over them then: when one has ended, the others must end by themselves.
"""

import contextlib
import multiprocessing
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, close, write_npz
from kill_harness import digest
from PIL import Image
from test_run import LONG, full_disk

import moco_cifar

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
PATIENCE = 60  # seconds until a process counts as hanging


# -- what happens in a rank, apart from main()


def float64(number):
    torch.set_default_dtype(torch.float64)


def keep_state(number):
    """Leave what this rank has at the end, queue and key encoder too, in out/rank<number>.pt"""
    save = moco_cifar.Run.save

    def keep(self, name):
        saved = save(self, name)
        if name == "pretrain.pt":
            torch.save(self.model.state_dict(), self.out / f"rank{number}.pt")
        return saved

    moco_cifar.Run.save = keep


def at_step(step, action):
    """Act once after so many steps"""
    descend = moco_cifar.Run.descend

    def act(self, loss):
        descend(self, loss)
        if self.step + 1 == step:
            action(self)

    moco_cifar.Run.descend = act


def signal_last_rank(number):
    if number:
        at_step(13, lambda run: os.kill(os.getpid(), signal.SIGTERM))


def signal_after_10(number):
    at_step(10, lambda run: os.kill(os.getpid(), signal.SIGTERM))


def no_room(number):
    """A file of more than 10 kB is refused by the system"""
    if number == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))


def no_room_later(number):
    at_step(15, lambda run: no_room(number))


def no_room_at_the_end(number):
    if number == 0:
        moco_cifar.write_atomic = full_disk(1, ("pretrain.pt",))


def no_room_when_stopped(number):
    signal_last_rank(number)
    if number == 0:
        at_step(13, lambda run: setattr(moco_cifar, "write_atomic", full_disk(1)))


def slow_disk(number):
    fsync = os.fsync
    os.fsync = lambda file: fsync(file) or time.sleep(0.3)


def rank(argv, number, world, port, preparations, log):
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    if world > 1:
        about = dict(RANK=number, LOCAL_RANK=number, WORLD_SIZE=world, MASTER_PORT=port)
        os.environ |= {key: str(value) for key, value in about.items()}
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    for prepare in preparations:
        prepare(number)
    sys.exit(moco_cifar.main(argv))


# -- starting them


@pytest.fixture(scope="module")
def server():
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        patch.setenv("OMP_NUM_THREADS", "1")
        context.set_forkserver_preload([__name__])
        (process := context.Process(target=int)).start()
    process.join()
    return context


@contextlib.contextmanager
def launcher(server, folder):
    """launch(argv, *preparations, world=2) -> the processes, each with the path of its log"""
    started = []

    def launch(argv, *preparations, world=2):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        for number in range(world):
            log = folder / f"{len(started)}.log"
            args = list(map(str, argv)), number, world, port, preparations, log
            started.append(process := server.Process(target=rank, args=args))
            process.start()
            process.log = log
        return started[-world:]

    yield launch
    for process in started:
        process.kill()
        process.join()


@pytest.fixture
def start(server, tmp_path):
    with launcher(server, tmp_path) as launch:
        yield launch


def announced(first):
    """Wait until the first process has said what it will do: by then all have met."""
    end = time.monotonic() + PATIENCE
    while first.is_alive() and not (first.log.exists() and "on cpu" in first.log.read_text()):
        assert time.monotonic() < end, f"does not start: {first.log.read_text()}"
        time.sleep(0.01)


def codes(processes):
    """The exit codes; who does not end has failed"""
    end = time.monotonic() + PATIENCE
    for process in processes:
        process.join(max(0, end - time.monotonic()))
        assert process.exitcode is not None, f"hangs: {process.log.read_text()}"
    return [process.exitcode for process in processes]


@pytest.fixture
def run(start):
    """run(argv, ...) -> what the ranks printed, if the exit codes are as expected"""

    def wait(argv, *preparations, world=2, code=0):
        processes = start(argv, *preparations, world=world)
        ended, said = codes(processes), [process.log.read_text() for process in processes]
        assert ended == [code] * world, "\n".join(said)
        return said

    return wait


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """4 epochs of 6 steps; several processes save at every tenth"""
    data = write_npz(tmp_path_factory.mktemp("data") / "8px.npz", 96, 20, size=8)
    text = f"--data {data} --image-size 8 --batch-size 16 --dim 8 --epochs 4 --save-seconds 0"
    return [*TINY, *text.split(), "--knn-every", "2", "--precision", "fp32", "--device", "cpu"]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory, server):
    """What an uninterrupted run of two processes leaves, and the seconds it takes"""
    folder, begin = tmp_path_factory.mktemp("whole"), time.monotonic()
    with launcher(server, folder) as launch:
        assert codes(launch([*flags, "--out", folder], keep_state)) == [0, 0]
    return folder, time.monotonic() - begin


@pytest.fixture
def goes_on(run, flags, whole):
    """goes_on(out): the same command ends with the state of the uninterrupted run, bit by bit."""

    def check(out):
        run([*flags, "--out", out])
        assert digest(out / "pretrain.pt") == digest(whole[0] / "pretrain.pt")

    return check


def read(path):
    return torch.load(path, weights_only=True)


def losses(out):
    return torch.tensor([row["loss"] for row in read(out / "pretrain.pt")["history"]]).double()


# -- the same as one process


@pytest.mark.parametrize("more", ["", "--bn-splits 4 --symmetric --head mlp --queue-size 19"])
def test_two_processes_equal_one(run, flags, tmp_path, more):  # R10, D1
    """In float64 nothing but the order of a sum differs: all of the state, and 8 steps' losses."""
    for world in (1, 2):
        out = tmp_path / str(world)
        eight = [*flags, "--limit", "16", "--epochs", "8", "--lr", "0.3", "--out", out]
        run([*eight, *more.split()], float64, keep_state, world=world)
    close(losses(tmp_path / "2"), losses(tmp_path / "1"), 1e-12)
    one, *two = (read(tmp_path / name) for name in ("1/rank0.pt", "2/rank0.pt", "2/rank1.pt"))
    for name, value in one.items():
        for state in two:
            close(state[name], value, 1e-12)


def test_ranks_have_the_same_encoders_and_queue(whole):
    zero, one = (read(whole[0] / f"rank{number}.pt") for number in (0, 1))
    assert {"queue.keys", "queue.pointer", "encoder_k.0.conv1.weight"} < zero.keys()
    assert all(torch.equal(zero[name], one[name]) for name in zero)


def test_saving_and_measuring_at_other_times_changes_nothing(run, flags, whole, tmp_path):  # R8
    other = "--save-seconds 1000 --knn-every 0 --keep-every 3".split()
    run([*flags, *other, "--out", tmp_path])
    a, b = (read(folder / "pretrain.pt")["encoder"] for folder in (whole[0], tmp_path))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_one_process_goes_on_as_two(run, flags, tmp_path):  # D4
    """The next ten losses are those of the uninterrupted process, to float32's rounding."""
    steps = [*flags, "--limit", "16", "--epochs", "20"]  # one step an epoch
    run([*steps, "--out", tmp_path / "one"], world=1)
    run([*steps, "--out", tmp_path / "two"], signal_after_10, world=1, code=143)
    (said, _) = run([*steps, "--out", tmp_path / "two"])
    assert "note: begun with another" in said and "processes" in said
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert torch.equal(one[:10], two[:10])
    torch.testing.assert_close(two[10:], one[10:], rtol=1e-6, atol=0)


# -- ends of all kinds


def test_killed_ranks_end_bit_identical(start, flags, whole, tmp_path, goes_on):  # D3
    """Whichever is killed, the other doesn't wait for it."""
    draw, seconds = random.Random(0), whole[1]
    for _ in range(5 if LONG else 2):
        processes = start([*flags, "--out", tmp_path])
        announced(processes[0])  # before that, it is torch that waits for the other one
        time.sleep(draw.uniform(0, 0.5) * seconds)
        draw.choice(processes).kill()
        codes(processes)
    goes_on(tmp_path)


def test_signal_to_one_rank_stops_all_at_the_same_step(run, flags, tmp_path, goes_on):  # R5
    for said in run([*flags, "--out", tmp_path], signal_last_rank, code=143):
        assert "saved: the same command goes on" in said
    assert read(tmp_path / "last.pt")["train_state"]["step"] == 20
    goes_on(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    ["--batch-size 15", "--bn-splits 3 --batch-size 18", "--bn-splits 1", "--data nowhere"],
)
def test_what_cannot_be_shared_is_refused_by_all(run, flags, tmp_path, wrong):
    for said in run([*flags, *wrong.split(), "--out", tmp_path], code=2):
        assert said.startswith("error: ") and said.count("\n") == 1
        assert wrong.split()[0] in said


@pytest.mark.parametrize("why", ["locked", "a file", "no room"])
def test_what_only_the_first_rank_can_know_is_told_to_all(run, flags, tmp_path, why):
    """It alone writes into the folder."""
    out = tmp_path / "run"
    if why == "a file":
        out.touch()
    with moco_cifar.lock_folder(out) if why == "locked" else contextlib.nullcontext():
        for said in run([*flags, "--out", out], *[no_room] * (why == "no room"), code=2):
            assert said.startswith("error: ") and said.count("\n") == 1


def test_disk_full_for_good_ends_all(run, flags, tmp_path):
    for said in run([*flags, "--out", tmp_path], no_room_later, code=4):
        assert "cannot be written" in said and "Traceback" not in said
    assert read(tmp_path / "last.pt")["train_state"]["step"] == 10


@pytest.mark.parametrize("trouble, code", [(no_room_at_the_end, 0), (no_room_when_stopped, 143)])
def test_disk_full_for_some_time_is_waited_for(run, flags, tmp_path, goes_on, trouble, code):
    said, _ = run([*flags, "--out", tmp_path], trouble, code=code)
    assert "trying again later" in said
    if code:
        goes_on(tmp_path)
    else:
        assert read(tmp_path / "pretrain.pt")["epoch"] == 4


def test_two_ranks_read_a_folder_of_images(run, flags, tmp_path):
    """Both at once, for the first time: there is no cache yet."""
    for part in ("train", "test"):
        for i, image in enumerate(torch.randint(256, (20, 8, 8, 3)).byte().numpy()):
            (folder := tmp_path / f"images/{part}/{i % 2}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i}.png")
    argv = [*flags, "--data", tmp_path / "images", "--data-dir", tmp_path / "cache"]
    run([*argv, "--epochs", "1", "--out", tmp_path / "run"], slow_disk)


# -- torchrun itself


@pytest.mark.parametrize("end", ["signal to torchrun"] + ["kill of a rank"] * LONG)
def test_torchrun_ends_and_the_same_command_goes_on(flags, tmp_path, goes_on, end):  # D3
    command = [*TORCHRUN, str(ROOT / "moco_cifar.py"), *flags, "--out", str(tmp_path)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    torchrun = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=one_thread)
    try:
        limit = time.monotonic() + PATIENCE
        while not (tmp_path / "prev.pt").exists():  # until the second save
            assert time.monotonic() < limit and torchrun.poll() is None
            time.sleep(0.01)
        if end == "kill of a rank":
            number = int((tmp_path / ".lock").read_text().split()[1])
            os.kill(number, signal.SIGKILL)
        else:
            torchrun.terminate()
        _, said = torchrun.communicate(timeout=PATIENCE)
    finally:
        torchrun.kill()
    assert torchrun.returncode != 0
    assert said.count("stopped by signal 15, saved") == 2 * (end == "signal to torchrun")
    goes_on(tmp_path)
