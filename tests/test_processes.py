"""What a run of several processes promises: the same as one, through delays, kills and full disks.

Ranks are forked from a server that has imported torch once, and are told what torchrun would tell.
Nobody watches over them then: when one has ended, the others must end by themselves.
"""

import contextlib
import functools
import importlib
import itertools
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import ROOT, TINY, close, write_npz
from kill_harness import digest
from PIL import Image
from test_run import LONG, every_script, full_disk

import moco_cifar

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
PATIENCE = 60  # seconds until a process counts as hanging


# -- what happens in a rank, apart from main(): each function gets the script and the rank's number


def before(holder, name, action):
    """Act before each call of a function or method."""
    real = getattr(holder, name)

    def wrapper(*args, **kwargs):
        action(*args)
        return real(*args, **kwargs)

    setattr(holder, name, wrapper)


def float64(script, number):
    torch.set_default_dtype(torch.float64)


def norm_by_share(script, number):
    """One process whose batch norm sees the rows of each of two shares on their own"""
    norm = torch.nn.modules.batchnorm._BatchNorm
    plain = norm.forward

    def forward(self, x):
        if not self.training:
            return plain(self, x)
        shares, state = x.unflatten(0, (-1, 2, 6)).unbind(1), (self.running_mean, self.running_var)
        means, rows = [0, 0], []  # x: views or patches, each of the same 12 images, 6 of a process
        for share in shares:
            own = [tensor.clone() for tensor in state]
            how = (*own, self.weight, self.bias, True, self.momentum, self.eps)
            rows.append(F.batch_norm(share.flatten(0, 1), *how).unflatten(0, share.shape[:2]))
            means = [mean + tensor / 2 for mean, tensor in zip(means, own)]
        for tensor, mean in zip(state, means):
            tensor.copy_(mean)
        self.num_batches_tracked += 1
        return torch.stack(rows, dim=1).flatten(0, 2)

    norm.forward = forward


def keep_state(script, number):
    """Leave what this rank has at the end, queue and key encoder too, in out/rank<number>.pt"""
    losses = []

    def keep(self, name):
        if name == "pretrain.pt":
            state = self.model.state_dict() | {"losses": torch.stack(losses)}
            torch.save(state, self.out / f"rank{number}.pt")

    before(script.Run, "record", lambda self, loss: losses.append(loss.detach().clone()))
    before(script.Run, "save", keep)


def at_step(script, step, action):
    """Act once, after so many steps"""
    before(script.Run, "record", lambda self, loss: action() if self.step + 1 == step else None)


def stop(script, number, step=13, who=1):
    """SIGTERM to one rank"""
    if number == who:
        at_step(script, step, lambda: os.kill(os.getpid(), signal.SIGTERM))


POINTS = ["load", "start", "restore", "save", "check_clock", "finish_epoch"]


def late(script, number, seconds=0.0):
    """Rank 1 comes later to every point at which processes could part ways, the first time."""
    if number:
        waits = {point: [seconds] for point in POINTS}
        for point, left in waits.items():
            before(script.Run, point, lambda *_, left=left: left and time.sleep(left.pop()))
        for module, name in ((script, "start_device"), (dist, "destroy_process_group")):
            before(module, name, lambda *_: time.sleep(seconds))


def late_at_random(script, number, seed=0):
    draw = random.Random(f"{seed} {number}")
    for holder, name in ((script, "start_device"), (script.Run, "load"), (script.Run, "start")):
        before(holder, name, lambda *_: time.sleep(draw.uniform(0, 0.5)))


def kill(script, number, who=0, when=""):
    """kill -9 of one rank: at once, or when it calls that function of torch.distributed"""
    if number == who:
        end = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        before(dist, when, end) if when else end()


def slow_images(script, number):
    """The first takes longer to read the images than processes may take to meet."""
    script.timedelta = lambda days=0, seconds=0: timedelta(days, seconds and 5)
    dist.distributed_c10d._get_default_timeout = lambda backend: timedelta(seconds=5)
    if number == 0:
        before(script, "cache_folder", lambda *_: time.sleep(7))


def two_nodes(script, number):
    """Four ranks, two on each of two machines; who reads the images, in order"""
    os.environ["LOCAL_RANK"] = str(number % 2)

    def tell(source, config):
        time.sleep(0.1 * number)
        with open(os.path.join(config.data_dir, "order"), "a") as file:
            file.write(str(number % 2))

    before(script, "load_data", tell)


def impatient(sleep=time.sleep):
    time.sleep = lambda seconds: sleep(min(seconds, 0.1))


def no_room(script, number):
    """A file of more than 10 kB is refused by the system; nobody waits a quarter of an hour."""
    impatient()
    if number == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))


def no_room_later(script, number):
    at_step(script, 15, lambda: no_room(script, number))


def no_room_at_the_end(script, number):
    impatient()
    if number == 0:
        script.write_atomic = full_disk(1, ("pretrain.pt",))


def no_room_when_stopped(script, number):
    stop(script, number)
    impatient()
    if number == 0:
        at_step(script, 13, lambda: setattr(script, "write_atomic", full_disk(1)))


def rank(script, argv, number, world, port, preparations, log):
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    if world > 1:
        about = dict(RANK=number, LOCAL_RANK=number, WORLD_SIZE=world, MASTER_PORT=port)
        os.environ |= {key: str(value) for key, value in about.items()}
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    script = importlib.import_module(script)
    for prepare in preparations:
        prepare(script, number)
    sys.exit(script.main([arg.replace("RANK", str(number)) for arg in argv]))


# -- starting them

# Below those that the system hands out (from 32768 on, and the same one again soon): two launches
# with one port would meet each other.
PORTS = itertools.count(random.randrange(10_000, 30_000))


def unused_port():
    """Of this machine, and that no launch before has had"""
    for port in PORTS:
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


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

    def launch(argv, *preparations, world=2, script="moco_cifar"):
        port = unused_port()
        for number in range(world):
            log = folder / f"{len(started)}.log"
            args = script, list(map(str, argv)), number, world, port, preparations, log
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
    while first.is_alive() and not (first.log.exists() and "steps " in first.log.read_text()):
        assert time.monotonic() < end, f"does not start: {first.log.read_text()}"
        time.sleep(0.01)


def codes(processes):
    """The exit codes; who does not end has failed"""
    end = time.monotonic() + PATIENCE
    for process in processes:
        process.join(max(0, end - time.monotonic()))
        assert process.exitcode is not None, f"hangs: {process.log.read_text()}"
    return [process.exitcode for process in processes]


def ended(processes, code):
    """What the ranks printed, if the exit codes are as expected"""
    found, said = codes(processes), [process.log.read_text() for process in processes]
    assert found == [code] * len(found), "\n".join(said)
    return said


@pytest.fixture
def run(start):
    """run(argv, ...) -> what the ranks printed, if the exit codes are as expected"""

    def wait(argv, *preparations, code=0, **how):
        return ended(start(argv, *preparations, **how), code)

    return wait


def one_line(text):
    assert text.startswith("error: ") and text.count("\n") == 1, text
    return text


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_npz(tmp_path_factory.mktemp("data") / "8px.npz", 96, 20, size=8)


@pytest.fixture(scope="module")
def common(data):
    """What all scripts take: 4 epochs of 6 steps; several processes save at every tenth"""
    text = f"--data {data} --image-size 8 --batch-size 16 --dim 8 --epochs 4 --save-seconds 0"
    text = f"{text} --knn-every 2 --knn-k 5 --precision fp32 --device cpu"
    return [*TINY[:4], *text.split()]


@pytest.fixture(scope="module")
def flags(common):
    return [*TINY, *common]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory, server):
    """What an uninterrupted run of two processes leaves, and the seconds it takes"""
    folder, begin = tmp_path_factory.mktemp("whole"), time.monotonic()
    with launcher(server, folder) as launch:
        assert codes(launch([*flags, "--out", folder], keep_state)) == [0, 0]
    return folder, time.monotonic() - begin


@pytest.fixture(scope="module")
def stopped(flags, tmp_path_factory, server):
    """The folder of a run that was stopped after 20 of its 24 steps: last.pt, and prev.pt of 10"""
    folder = tmp_path_factory.mktemp("stopped")
    with launcher(server, folder) as launch:
        assert codes(launch([*flags, "--out", folder / "run"], stop)) == [143, 143]
    return folder / "run"


@pytest.fixture
def goes_on(run, flags, whole):
    """goes_on(out): the same command ends with the state of the uninterrupted run, bit by bit."""

    def check(out):
        run([*flags, "--out", out])
        assert digest(out / "pretrain.pt") == digest(whole[0] / "pretrain.pt")

    return check


ALONE = {  # which rank is killed, and when
    "the first, at once": functools.partial(kill, who=0),
    "the other, at once": functools.partial(kill, who=1),
    "the other, at the door": functools.partial(kill, who=1, when="init_process_group"),
}
if not hasattr(dist, "set_timeout"):  # an older torch: only torchrun notices that a rank is missing
    ALONE = {"the first, at once": ALONE["the first, at once"]}


@pytest.fixture(scope="module", autouse=True)
def alone(flags, tmp_path_factory, server):
    """Two processes each, of which one is killed before they meet. It takes a minute until the
    other gives up, so that they begin here and end behind the other tests.
    """
    folder = tmp_path_factory.mktemp("alone")
    with launcher(server, folder) as launch:
        begun = {how: [*flags, "--out", folder / str(i)] for i, how in enumerate(ALONE)}
        yield {how: (time.time(), launch(argv, ALONE[how])) for how, argv in begun.items()}


def read(path):
    return torch.load(path, weights_only=True)


# -- the same as one process

FAST = "fast_moco --head-hidden 16 --predictor-hidden 4 --queue-size 19 --lr 0.3 --framework"
SAME = [
    "moco_cifar --lr 0.3 --bn-splits 2 --queue-size 50",
    "moco_cifar --lr 0.3 --bn-splits 4 --queue-size 19 --symmetric --head mlp",
    "moco_cifar --lr 0.3 --bn-splits 2 --queue-size 50 --mechanism memory-bank",
    "moco_cifar --lr 0.3 --bn-splits 4 --mechanism end-to-end",
    "simclr --lr 0.3 --head-hidden 16",
    *[f"{FAST} {framework}" for framework in ("moco", "byol", "simsiam", "nnclr")],
    f"{FAST} nnclr --full-crops 3 --small-crops 1 --lr 0.03",
]


@pytest.mark.parametrize("how", SAME)
def test_two_processes_equal_one(start, common, tmp_path, how):  # R10, D1
    """In float64 nothing but the order of a sum differs, in all of the state after 8 steps and in
    their losses; batch norm's running statistics are the mean of what the processes have seen.
    """
    script, *more = how.split()
    eight = [*common, *more, "--batch-size", "12", "--epochs", "1", "--out"]
    begun = []
    for world in (1, 2):
        own = [norm_by_share] * (world == 1 and script != "moco_cifar")  # it has SplitBatchNorm
        prepare = float64, keep_state, *own
        begun += start([*eight, tmp_path / str(world)], *prepare, world=world, script=script)
    ended(begun, 0)
    one, *two = (read(tmp_path / name) for name in ("1/rank0.pt", "2/rank0.pt", "2/rank1.pt"))
    assert len(one["losses"]) == 8 and one["losses"].std() > 1e-3  # there is something to differ
    for name, value in one.items():
        assert value.dtype in (torch.float64, torch.long), name
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


def test_from_two_processes_to_one_and_back(start, run, flags, tmp_path):  # D4
    """In one run of 20 steps; its losses and weights are those of one process from end to end."""
    steps, out = [*flags, "--limit", "16", "--epochs", "20", "--out"], tmp_path / "run"
    whole = start([*steps, tmp_path / "one"], float64, world=1)
    halt = functools.partial(stop, who=0)
    run([*steps, out], float64, functools.partial(halt, step=9), code=143)
    for world, more, code in ((1, [functools.partial(halt, step=15)], 143), (2, [], 0)):
        said, *_ = run([*steps, out], float64, *more, world=world, code=code)
        assert "note: processes changed: resuming, but not bit for bit" in said
    ended(whole, 0)
    one, both = (read(folder / "pretrain.pt") for folder in (tmp_path / "one", out))
    for a, b in zip(one["history"], both["history"], strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-12
    for part in ("encoder", "head"):
        for name, value in one[part].items():
            close(both[part][name], value, 1e-12)


# -- the first process decides for all


def test_rank_1_is_late_wherever_they_could_part_ways(start, flags, whole, tmp_path):
    """A start, a halt, a damaged file, the end, a complete run, no whole file; three delays at
    once.
    """
    runs = {seconds: tmp_path / str(seconds) for seconds in (0.02, 0.1, 1)}

    def all_of_them(*more, code):
        begun = {}
        for seconds, out in runs.items():
            delay = functools.partial(late, seconds=seconds)
            begun[seconds] = start([*flags, "--out", out], delay, *more)
        return [ended(processes, code) for processes in begun.values()]

    all_of_them(stop, code=143)
    for out in runs.values():
        assert read(out / "last.pt")["train_state"]["step"] == 20
        (out / "last.pt").write_bytes(b"<html>quota exceeded</html>")
    for first, second in all_of_them(code=0):
        assert first.count("warning: ") == 1 and "resuming from prev.pt" in first
        assert "steps 10 to 24" in first and not second
    for out in runs.values():
        assert digest(out / "pretrain.pt") == digest(whole[0] / "pretrain.pt")
    for said in all_of_them(code=0):
        assert all("is complete" in text for text in said)
    for out in runs.values():
        (out / "pretrain.pt").write_bytes(b"")
    for said in all_of_them(code=2):
        assert all("pretrain.pt" in one_line(text) for text in said)


def test_processes_that_see_different_folders_go_on_from_the_firsts(
    run, flags, whole, stopped, tmp_path
):
    """On several machines without a common disk the other one has no state, or an old one."""
    for old in (False, True):
        folder = tmp_path / str(old)
        shutil.copytree(stopped, folder / "out0")
        (folder / "out1").mkdir()
        if old:
            shutil.copy(stopped / "prev.pt", folder / "out1/last.pt")
        before = sorted((folder / "out1").iterdir())
        run([*flags, "--out", folder / "outRANK"])
        assert digest(folder / "out0/pretrain.pt") == digest(whole[0] / "pretrain.pt")
        assert sorted((folder / "out1").iterdir()) == before


def test_no_start_hangs(start, flags, stopped, tmp_path):
    """Starts of two processes with random delays in either; every other one has a state."""
    starts, begin = 100 if LONG else 10, time.monotonic()
    for first in range(0, starts, 5):
        begun = []
        for seed in range(first, first + 5):
            if seed % 2:
                shutil.copytree(stopped, tmp_path / f"out{seed}")
            delays = functools.partial(late_at_random, seed=seed)
            begun += start([*flags, "--out", tmp_path / f"out{seed}"], delays)
        ended(begun, 0)
    assert time.monotonic() - begin < 8 * starts + 20


# -- what cannot be shared


@pytest.mark.parametrize(
    "wrong",
    ["--batch-size 15", "--bn-splits 3 --batch-size 18", "--bn-splits 1", "--data nowhere"],
)
def test_what_cannot_be_shared_is_refused_by_all(run, flags, tmp_path, wrong):
    for said in run([*flags, *wrong.split(), "--out", tmp_path], code=2):
        assert wrong.split()[0] in one_line(said)


@pytest.mark.parametrize("script", ["simclr", "fast_moco"])
def test_a_batch_that_does_not_divide_is_refused_by_all(start, common, tmp_path, script):
    """15 images for 2 processes, 9 for 4; batch norm needs two images in each process"""
    argv = [*common, "--out", tmp_path, "--batch-size"]
    begun = start([*argv, "15"], script=script) + start([*argv, "9"], world=4, script=script)
    begun += start([*argv, "2"], script=script)
    for said in ended(begun, 2):
        assert "--batch-size" in one_line(said)


@pytest.mark.parametrize("why", ["locked", "a file", "no room"])
def test_what_only_the_first_rank_can_know_is_told_to_all(start, run, flags, tmp_path, why):
    """It alone writes into the folder."""
    out = tmp_path / "run"
    if why == "a file":
        out.touch()
    if why == "locked":
        (holder,) = start([*flags, "--out", out], hold, world=1)
        announced(holder)
    for said in run([*flags, "--out", out], *[no_room] * (why == "no room"), code=2):
        assert str(out) in one_line(said)


def hold(script, number):
    before(script.Run, "record", lambda *_: time.sleep(600))


def test_a_folder_that_takes_longer_than_the_default_timeout(run, flags, tmp_path):
    """The other process waits until the first has made the cache."""
    for part in ("train", "test"):
        for i, image in enumerate(torch.randint(256, (20, 8, 8, 3)).byte().numpy()):
            (folder := tmp_path / f"images/{part}/{i % 2}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i}.png")
    argv = [*flags, "--data", tmp_path / "images", "--data-dir", tmp_path / "cache"]
    run([*argv, "--epochs", "1", "--out", tmp_path / "run"], slow_images)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_first_process_of_each_machine_reads_first(run, flags, tmp_path):
    argv = [*flags, "--bn-splits", "4", "--epochs", "0", "--data-dir", tmp_path]
    run([*argv, "--out", tmp_path / "run"], two_nodes, world=4)
    assert (tmp_path / "order").read_text() == "0011"


# -- ends of all kinds


def test_killed_ranks_end_bit_identical(start, flags, whole, tmp_path, goes_on):  # D3
    """Whichever is killed, the other doesn't wait for it, and says so in one line."""
    draw, seconds = random.Random(0), whole[1]
    for i in range(6 if LONG else 2):
        processes = start([*flags, "--out", tmp_path / "run"])
        announced(processes[0])
        time.sleep(draw.uniform(0, 0.3) * seconds)
        processes[i % 2].kill()
        code, text = codes(processes)[1 - i % 2], processes[1 - i % 2].log.read_text()
        if code != 0:  # or else it was done before
            assert code == 1 and "another process ended" in text.splitlines()[-1], text
            assert "Traceback" not in text and text.count("error") == 1
    goes_on(tmp_path / "run")


def test_signal_to_one_rank_stops_all_at_the_same_step(stopped, tmp_path, goes_on):  # R5
    assert read(stopped / "last.pt")["train_state"]["step"] == 20
    for log in stopped.parent.glob("*.log"):
        assert "stopped by signal 15, saved" in log.read_text()
    goes_on(shutil.copytree(stopped, tmp_path / "run"))


def test_disk_full_for_good_ends_all(run, flags, tmp_path):
    for said in run([*flags, "--out", tmp_path], no_room_later, code=4):
        assert "can't be written" in said and "Traceback" not in said
    assert read(tmp_path / "last.pt")["train_state"]["step"] == 10


@pytest.mark.parametrize("trouble, code", [(no_room_at_the_end, 0), (no_room_when_stopped, 143)])
def test_disk_full_for_some_time_is_waited_for(run, flags, tmp_path, goes_on, trouble, code):
    said, _ = run([*flags, "--out", tmp_path], trouble, code=code)
    assert said.count("trying again in 10 s") == 1
    if code:
        goes_on(tmp_path)
    else:
        assert read(tmp_path / "pretrain.pt")["epoch"] == 4


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


# -- what surrounds a process


@pytest.mark.parametrize("stray", ["WORLD_SIZE=4", "RANK=1", "LOCAL_RANK=1", "WORLD_SIZE=2 RANK=1"])
def test_a_stray_variable_starts_no_processes(flags, tmp_path, monkeypatch, stray):
    for setting in stray.split():
        monkeypatch.setenv(*setting.split("="))
    assert moco_cifar.main([*flags, "--epochs", "0", "--out", str(tmp_path)]) == 0
    assert read(tmp_path / "pretrain.pt")["machine"]["processes"] == 1


WORDS = "CUDA error: an illegal memory access was encountered", "unsupported memory format option"
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", [*map(RuntimeError, WORDS), *OUT_OF_MEMORY], ids=str)
@every_script
def test_only_a_lack_of_memory_is_reported_as_one(
    script, common, error, tmp_path, monkeypatch, refused
):
    monkeypatch.setattr(script, "train", lambda *_: (_ for _ in ()).throw(error))
    argv = [*common, "--out", str(tmp_path)]
    if error in OUT_OF_MEMORY:
        assert "--limit" in refused(script.main, argv, "--batch-size")
    else:
        with pytest.raises(RuntimeError, match="memory"):
            script.main(argv)


@pytest.mark.parametrize(
    "name, local, device",
    [("cuda:1", "3", "cuda:3"), ("cuda", "0", "cuda:0"), ("auto", "2", "cuda:2")]
    + [("cuda:1", None, "cuda:1"), ("cpu", "1", "cpu")],
)
@every_script
def test_each_process_takes_a_gpu_of_its_own(script, monkeypatch, name, local, device):
    """No GPU is needed for it: what would ask one is replaced."""
    joined, chosen = {}, []
    env = dict(RANK="5", WORLD_SIZE="8", MASTER_ADDR="here", MASTER_PORT="1", LOCAL_RANK=local)
    for key, value in env.items() if local else ():
        monkeypatch.setenv(key, value)
    tensor = lambda *_, device: SimpleNamespace(device=torch.device(device), item=int)
    monkeypatch.setattr(torch, "zeros", tensor)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    store = SimpleNamespace(set_timeout=lambda timeout: None)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store, 5, 8)]))
    monkeypatch.setattr(
        dist, "init_process_group", lambda kind, **how: joined.update(how, kind=kind)
    )
    lengthen = lambda timeout: joined.update(work=timeout)
    monkeypatch.setattr(dist, "set_timeout", lengthen, raising=False)
    monkeypatch.setattr(
        dist.distributed_c10d, "_set_pg_timeout", lengthen, raising=False
    )  # old torch
    found, _ = script.start_device(script.Config(device=name))
    script.join_processes(found)
    cuda = [found] * found.type.startswith("cuda")
    assert str(found) == device and chosen == cuda
    if local:
        assert joined["kind"] == ("nccl" if cuda else "gloo") and (joined["rank"] == 5)
        assert [joined.get("device_id")] == (cuda or [None])
        assert joined["timeout"] < timedelta(minutes=1) and joined["work"] > timedelta(days=1)
    else:
        assert not joined


def test_an_error_of_any_kind_reaches_the_other_processes(monkeypatch):
    """One that stayed in its process would leave the others waiting."""
    sent, error = [], MemoryError("images")

    def fail():
        raise error

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", lambda outcomes, own: sent.append(own))
    with pytest.raises(MemoryError):
        moco_cifar.agree(fail, True)
    assert sent == [error]


@pytest.mark.parametrize("how", ALONE)
def test_a_rank_killed_before_they_meet(alone, goes_on, how):
    """The other one gives up within a minute, in one line (behind torch's own, of which there can
    be more); then the same command runs.
    """
    begun, processes = alone[how]
    for process in processes:
        process.join(max(0, begun + PATIENCE - time.time()))
        assert process.exitcode is not None, f"hangs: {process.log.read_text()}"
    killed = "first" not in how
    assert processes[not killed].log.stat().st_mtime < begun + PATIENCE  # its last word
    assert processes[killed].exitcode == -signal.SIGKILL
    assert processes[not killed].exitcode == 1
    *_, line = said = processes[not killed].log.read_text().splitlines()
    assert line.startswith("error: another process ended")
    assert not any(text.startswith(("Traceback", "error: ")) for text in said[:-1])
    goes_on(processes[0].log.parent / str(list(ALONE).index(how)))
