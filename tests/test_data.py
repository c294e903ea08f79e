"""What --data takes, what it makes of it, and what it says to what it cannot take."""

import hashlib
import http.client
import io
import os
import pickle
import resource
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT
from PIL import Image
from torchvision.transforms.v2.functional import resize

import moco_cifar


@pytest.fixture(autouse=True)
def little_memory():
    """At most a gigabyte more than now, or else a wrong number could take the whole machine."""
    before, (now, *_) = (
        resource.getrlimit(resource.RLIMIT_AS),
        open("/proc/self/statm").read().split(),
    )
    most = int(now) * resource.getpagesize() + 2**30
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory"""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def load(data, **settings):
    """What a run has to do with --data"""
    settings = {"image_size": 8, "data_dir": "cache", **settings}
    run = SimpleNamespace(config=moco_cifar.Config(data=str(data), **settings), device="cpu")
    moco_cifar.Run.load(run)
    return run.data


@pytest.fixture
def refuse(refused, here):
    """refuse(data, says, *flags): the script takes it for an error, and leaves no file behind."""

    def check(data, says, *flags):
        files = lambda: sorted(path for path in here.rglob("*") if path.is_file())
        before = files()
        line = refused(moco_cifar.main, ["--data", data, "--data-dir", "cache", *flags], says)
        assert files() == before
        return line

    return check


def random_arrays(n_train=24, n_test=12, classes=4, size=8):
    random, arrays = np.random.default_rng(0), {}
    for part, n in (("train", n_train), ("test", n_test)):
        arrays[f"x_{part}"] = random.integers(0, 256, (n, size, size, 3), dtype=np.uint8)
        arrays[f"y_{part}"] = np.arange(n) % classes
    return arrays


def write(path, **changes):
    """An .npz of random_arrays(), some of them changed, or left out if None"""
    arrays = random_arrays() | changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


# an .npz file
def test_npz_is_taken_as_it_is(here):
    arrays, data = random_arrays(), load(write(here / "a.npz"))
    for part in ("train", "test"):
        images = getattr(data, f"x_{part}")
        assert images.dtype == torch.uint8
        assert np.array_equal(images.permute(0, 2, 3, 1), arrays[f"x_{part}"])
        assert np.array_equal(getattr(data, f"y_{part}"), arrays[f"y_{part}"])


def test_what_is_noted_of_the_data(here):
    path = str(write(here / "a.npz"))
    about = load(path, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)).about
    digest = about.pop("sha256")
    assert len(digest) == 64
    right = dict(name=path, file=path, classes=["0", "1", "2", "3"], image_size=8)
    right |= dict(n_train=24, n_test=12, holdout=0, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    assert about == right


@pytest.mark.parametrize("names", [list("abcd"), list("abcde")], ids=["all", "one unused"])
def test_names_of_classes(here, names):
    assert load(write(here / "a.npz", classes=np.array(names))).about["classes"] == names


@pytest.mark.parametrize("kind", ["i1", "u1", "<i2", ">i4", "u4", "i8", ">u8"])
def test_labels_of_any_integer_type(here, kind):
    labels = random_arrays()["y_train"]
    data = load(write(here / "a.npz", y_train=labels.astype(kind)))
    assert data.y_train.dtype == torch.int64 and np.array_equal(data.y_train, labels)


@pytest.mark.skipif(torch.__version__ < (2, 7), reason="torch 2.6: its resize rounds otherwise")
@pytest.mark.parametrize("shape", [(5, 5), (20, 20), (8, 13), (40, 3)])
def test_images_of_another_size_are_resized(here, shape):
    images = np.random.default_rng(0).integers(0, 256, (24, *shape, 3), dtype=np.uint8)
    data, images = load(write(here / "a.npz", x_train=images)), torch.from_numpy(images)
    theirs = resize(images.permute(0, 3, 1, 2), [8, 8])
    assert torch.equal(data.x_train, theirs)


X, Y = random_arrays()["x_train"], random_arrays()["y_train"]
WRONG_NPZ = {
    "float images": ({"x_train": X / 255}, "x_train is torch.float64 (24, 8, 8, 3)"),
    "uint16 images": ({"x_test": X.astype(np.uint16)}, "x_test is torch.uint16"),
    "gray images": ({"x_train": X[..., 0]}, "x_train is torch.uint8 (24, 8, 8)"),
    "one channel": ({"x_train": X[..., :1]}, "(24, 8, 8, 1)"),
    "four channels": ({"x_train": X[..., [0, 1, 2, 0]]}, "(24, 8, 8, 4)"),
    "channels first": ({"x_train": X.transpose(0, 3, 1, 2)}, "(24, 3, 8, 8)"),
    "flat images": ({"x_train": X.reshape(24, -1)}, "(24, 192)"),
    "no training image": ({"x_train": X[:0], "y_train": Y[:0]}, "x_train"),
    "no test image": ({"x_test": X[:0], "y_test": Y[:0]}, "x_test"),
    "images of no pixels": ({"x_train": X[:, :0]}, "--data"),
    "no x_train": ({"x_train": None}, "x_train"),
    "no y_train": ({"y_train": None}, "y_train"),
    "no x_test": ({"x_test": None}, "x_test"),
    "no y_test": ({"y_test": None}, "y_test"),
    "float labels": ({"y_train": Y.astype(float)}, "y_train"),
    "labels of truth": ({"y_train": Y > 1}, "y_train"),
    "labels in words": ({"y_train": np.array(["cat"] * 24)}, "--data"),
    "labels in a column": ({"y_train": Y[:, None]}, "y_train"),
    "one-hot labels": ({"y_train": np.eye(4, dtype=int)[Y]}, "y_train"),
    "too few labels": ({"y_train": Y[:-1]}, "y_train"),
    "too many labels": ({"y_test": Y}, "y_test"),
    "a negative label": ({"y_train": Y - 1}, "y_train"),
    "an enormous label": ({"y_train": Y + 10**15}, "y_train"),
    "a label beyond int64": ({"y_train": Y.astype(np.uint64) + np.uint64(2**63)}, "y_train"),
    "too few names": ({"classes": np.array(["ant", "bee", "cat"])}, "only 3 names of classes"),
    "a single name": ({"classes": np.array("ant")}, "--data"),
    "pickled labels": ({"y_train": Y.astype(object)}, "allow_pickle=False"),
    "pickled names": ({"classes": np.array(["ant", "bee", "cat", 4], object)}, "allow_pickle"),
}


@pytest.mark.parametrize("name", WRONG_NPZ)
def test_npz_that_breaks_the_contract(here, refuse, name):
    changes, says = WRONG_NPZ[name]
    refuse(write(here / "a.npz", **changes), says)


def npz_bytes(save=np.savez):
    save(buffer := io.BytesIO(), **random_arrays())
    return buffer.getvalue()


def flip(content, place):
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


ZIPPED = npz_bytes(np.savez_compressed)
NO_NPZ = {
    "empty": b"",
    "text": b"label,pixels\n1,2\n",
    "html": b"<!DOCTYPE html><html><title>404</title></html>",
    "jpeg": b"\xff\xd8\xff\xe0\x00\x10JFIF\x00",
    "gzip": b"\x1f\x8b\x08\x00" + bytes(30),
    "cut short": npz_bytes()[:-100],
    "begin missing": npz_bytes()[100:],
    "a flipped bit": flip(npz_bytes(), 2000),
    "a flipped bit, compressed": flip(ZIPPED, len(ZIPPED) // 4),
    "a pickle": pickle.dumps(random_arrays()),
    "one array": b"\x93NUMPY" + npz_bytes().split(b"\x93NUMPY")[2],
}


@pytest.mark.parametrize("name", NO_NPZ)
def test_file_that_is_no_npz(here, refuse, name):
    (here / "a.npz").write_bytes(NO_NPZ[name])
    refuse("a.npz", "--data a.npz: ")


def test_a_damaged_npz_is_never_taken(here):
    """Whatever bit is flipped: an error of one line, or exactly the right images."""
    right, random = load(write(here / "a.npz")).about["sha256"], np.random.default_rng(0)
    for save in (np.savez, np.savez_compressed):
        content = npz_bytes(save)
        for place in random.integers(0, len(content), 60):
            (here / "b.npz").write_bytes(flip(content, place))
            try:
                assert load("b.npz").about["sha256"] == right, (save, place)
            except moco_cifar.UserError as error:
                assert "--data b.npz" in str(error)


class Payload:
    """What a malicious file asks the reader to do"""

    def __reduce__(self):
        return os.mkdir, ("payload-ran",)


def test_code_in_an_npz_does_not_run(here, refuse):
    refuse(write(here / "a.npz", classes=np.array([Payload()] * 4)), "--data")
    (here / "b.npz").write_bytes(pickle.dumps(Payload()))
    refuse("b.npz", "--data")
    assert not (here / "payload-ran").exists()


def test_nothing_of_that_name(refuse):
    line = refuse("cifar", "--data cifar: ")
    for way in ("cifar10", "cifar100", "svhn", "stl10", "folder of images", ".npz"):
        assert way in line


# memory
def test_keep_rows_is_indexing_in_place():
    for n in (1, 999, 1000, 1001, 3500):
        x, rows = torch.randint(256, (4000, 2)), torch.randperm(4000)[:n].sort().values
        right, kept = x[rows], moco_cifar.keep_rows(x, rows)
        assert torch.equal(kept, right) and kept.data_ptr() == x.data_ptr()


PEAK = r"""
import re, sys, moco_cifar

def kib(name):
    return int(re.search(name + r":\s*(\d+)", open("/proc/self/status").read())[1])

for flags in ([], [], ["--holdout=3600"], ["--limit=5000", "--holdout=3600"]):
    config = moco_cifar.parse_config(["--data", sys.argv[1], *flags])
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = kib("VmRSS")
    moco_cifar.load_data(config.data, config)
    print((kib("VmHWM") - before) * 1024)
"""


def test_images_are_in_memory_once(here):
    """Loading, holding out a tenth and limiting take at most 1.2 times the memory of the images."""
    np.savez(here / "a.npz", **(arrays := random_arrays(36000, 4000, size=32)))
    how = dict(env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "500000"})  # so that free frees
    command = [sys.executable, "-c", PEAK, here / "a.npz"]
    done = subprocess.run(command, **how, capture_output=True, cwd=ROOT, text=True)
    assert done.returncode == 0, done.stderr
    images = arrays["x_train"].nbytes + arrays["x_test"].nbytes
    _, *peaks = [int(line) / images for line in done.stdout.split()]  # the first: libraries, too
    assert len(peaks) == 3 and 0.95 < min(peaks) and max(peaks) < 1.2, peaks


# a folder of images
def draw(path, colour=(200, 30, 60), size=(8, 8), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, tuple(colour)).convert(mode).save(path)


@pytest.fixture
def folder(here):
    """train/ and test/ of two classes, three and two images of each: red ants, blue bees"""
    for part, n in (("train", 3), ("test", 2)):
        for i in range(n):
            draw(here / "insects" / part / "ant" / f"{i}.png", (250 - i, 0, 0))
            draw(here / "insects" / part / "bee" / f"{i}.png", (0, 0, 250 - i))
    return here / "insects"


def test_folder(here, folder):
    data = load("insects")
    assert data.about["classes"] == ["ant", "bee"]
    assert data.y_train.tolist() == [0, 0, 0, 1, 1, 1] and data.y_test.tolist() == [0, 0, 1, 1]
    assert (data.x_train[:, 0, 0, 0].tolist()) == [250, 249, 248, 0, 0, 0]
    assert (data.x_test[:, 2, 7, 7].tolist()) == [0, 0, 250, 249]
    assert data.about["name"] == "insects" and data.about["file"] == f"cache/{caches(here)[0]}"
    again = load(data.about["file"]).about  # which is what evaluation reads
    assert again | {"name": "insects"} == data.about


def test_val_stands_for_test(folder):
    test = load(folder).x_test
    (folder / "test").rename(folder / "val")
    assert torch.equal(load(folder).x_test, test)


def test_test_goes_before_val(folder):
    draw(folder / "val" / "ant" / "0.png")
    assert load(folder).about["n_test"] == 4


@pytest.mark.parametrize("size", [(8, 8), (3, 50), (200, 90), (1, 1)])
def test_folder_with_images_of_different_sizes(folder, size):
    draw(folder / "train" / "ant" / "1.png", (10, 20, 30), size)
    data = load(folder)
    assert data.x_train.shape == (6, 3, 8, 8)
    assert data.x_train[1].flatten(1).unique(dim=1)[:, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize(
    "mode, kind",
    [("L", "png"), ("RGBA", "png"), ("P", "png"), ("1", "png"), ("LA", "png"), ("L", "jpg")]
    + [("RGB", "jpg"), ("CMYK", "jpg"), ("RGB", "bmp"), ("RGB", "webp"), ("RGB", "JPEG")],
)
def test_folder_with_images_of_different_kinds(folder, mode, kind):
    draw(folder / "train" / "bee" / f"9.{kind}", (255, 255, 255), mode=mode)
    white = load(folder).x_train[-1]
    assert white.shape == (3, 8, 8) and white.min() >= 250


@pytest.mark.parametrize(
    "name",
    [".DS_Store", "Thumbs.db", "readme.txt", "._0.png", ".hidden.jpg"]
    + [".ipynb_checkpoints/0.png", "../.ipynb_checkpoints/0.png", "../Thumbs.db", "../._ant"],
)
def test_what_is_no_image_is_passed_over(folder, name):
    before = load(folder).about
    path = folder / "train" / "ant" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"something else")
    assert load(folder).about == before


def test_a_loop_of_links_is_passed_over(folder):
    before = load(folder).about
    (folder / "train" / "ant" / "loop").symlink_to(folder / "train" / "ant")
    assert load(folder).about == before


def caches(here):
    return sorted(path.name for path in here.glob("cache/*"))


def test_folder_is_read_once(here, folder, monkeypatch):
    first = load(folder)
    assert len(caches(here)) == 1 and caches(here)[0].endswith(".npz")
    monkeypatch.setattr(Image, "open", None)
    again = load(folder)
    assert again.about == first.about and torch.equal(again.x_train, first.x_train)


@pytest.mark.parametrize("change", ["another image", "one more", "one less", "another class"])
def test_a_changed_folder_is_read_anew(folder, change):
    before = load(folder).about["sha256"]
    if change == "another image":
        other, path = (folder / "train" / "ant" / name for name in ("0.png", "1.png"))
        assert other.stat().st_size == path.stat().st_size  # only the time tells
        path.write_bytes(other.read_bytes())
    elif change == "one more":
        draw(folder / "train" / "ant" / "3.png")
    elif change == "one less":
        (folder / "test" / "ant" / "1.png").unlink()
    else:
        (folder / "train" / "ant" / "2.png").rename(folder / "train" / "bee" / "3.png")
    after = load(folder)
    assert after.about["sha256"] != before
    assert after.about["sha256"] == load(folder, data_dir="elsewhere").about["sha256"]


def test_the_cache_is_of_one_size(here, folder):
    assert load(folder).x_train.shape[2:] == (8, 8)
    assert load(folder, image_size=5).x_train.shape[2:] == (5, 5)
    assert len(caches(here)) == 2


def test_a_damaged_cache_is_named_or_made_anew(here, folder):
    right = load(folder).about
    cache = here / "cache" / caches(here)[0]
    cache.write_bytes(cache.read_bytes()[:-50])
    try:
        assert load(folder).about == right
    except moco_cifar.UserError as error:
        assert cache.name in str(error)


def bomb():
    """A PNG that claims to have a hundred million pixels in each direction"""
    Image.new("RGB", (1, 1)).save(buffer := io.BytesIO(), "PNG")
    content = buffer.getvalue()
    header = b"IHDR" + (10**8).to_bytes(4, "big") * 2 + content[24:29]
    return content[:12] + header + zlib.crc32(header).to_bytes(4, "big") + content[33:]


def jpeg():
    Image.effect_noise((64, 64), 50).save(buffer := io.BytesIO(), "JPEG")
    return buffer.getvalue()


NO_IMAGE = {
    "truncated JPEG": jpeg()[:-200],
    "no more than a header": jpeg()[:20],
    "empty": b"",
    "text": b"not an image",
    "truncated PNG": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
    "bomb": bomb(),
}


@pytest.mark.parametrize("name", NO_IMAGE)
def test_unreadable_image_is_named(here, folder, refuse, name):
    (folder / "train" / "bee" / "7.png").write_bytes(NO_IMAGE[name])
    refuse("insects", "train/bee/7.png")  # which looks for a half-written cache, too


def test_a_full_disk_leaves_no_half_written_cache(here, folder, refuse, monkeypatch):
    (here / "cache").mkdir()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refuse("insects", "No space left on device")


@pytest.mark.parametrize("name", ["cache", "cache/x"])
def test_the_place_of_the_cache_is_a_file(here, folder, refuse, name):
    (here / "cache").write_text("")
    refuse("insects", "cache", "--data-dir", name)


def test_empty_folder(here, refuse):
    (here / "insects").mkdir()
    refuse("insects", "insects")


@pytest.mark.parametrize("part", ["train", "test", "train/ant", "test/ant"])
def test_folder_without_images(folder, refuse, part):
    """First without images, then without their folder"""
    for path in sorted((folder / part).rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    refuse("insects", "needs images in train/<class>/ and test/<class>/")
    (folder / part).rmdir()
    refuse("insects", "needs images in train/<class>/")


@pytest.mark.parametrize("part, other", [("test", "train"), ("val", "val")])
def test_classes_differ(folder, refuse, part, other):
    (folder / "test").rename(folder / part)
    draw(folder / other / "cat" / "0.png")
    says = f"train/<class>/ and {part}/<class>/, of the same classes; found ['ant', 'bee'"
    assert "'cat'" in refuse("insects", says)


# torchvision's data sets
class CifarStub:
    classes = ["ant", "bee"]

    def __init__(self, root, train, download):
        self.data = np.full((20 if train else 10, 32, 32, 3), (1, 2, 3), np.uint8)
        self.data[:, 0, 1] = 7
        self.targets = [i % 2 for i in range(len(self.data))]


class SplitStub:
    side = 32

    def __init__(self, root, split, download):
        n = {"train": 20, "test": 10}[split]
        self.data = np.empty((n, 3, self.side, self.side), np.uint8)
        self.data[:] = np.array([1, 2, 3])[:, None, None]
        self.data[:, :, 0, 1] = 7 if self.side == 32 else 1
        self.labels = np.arange(n) % 10


class StlStub(SplitStub):
    side, classes = 96, list("abcdefghij")


STUBS = {
    "cifar10": ("CIFAR10", CifarStub, ["ant", "bee"]),
    "cifar100": ("CIFAR100", CifarStub, ["ant", "bee"]),
    "svhn": ("SVHN", SplitStub, list("0123456789")),
    "stl10": ("STL10", StlStub, list("abcdefghij")),
}


@pytest.mark.parametrize("name", STUBS)
def test_torchvision_sets(here, monkeypatch, name):
    kind, stub, classes = STUBS[name]
    monkeypatch.setattr(torchvision.datasets, kind, stub)
    data = load(name, image_size=32)
    assert data.about["classes"] == classes and data.about["name"] == name
    assert data.x_train.shape == (20, 3, 32, 32) and data.x_test.shape == (10, 3, 32, 32)
    assert data.x_train[0, :, 20, 20].tolist() == [1, 2, 3]
    assert name == "stl10" or data.x_train[0, :, 0, 1].tolist() == [7, 7, 7]  # row 0, column 1
    assert data.y_train.tolist() == [i % len(classes) for i in range(20)]


def test_the_real_classes_take_what_is_asked_of_them():
    """The stubs are called as torchvision's own."""
    import inspect

    for kind, stub, _ in STUBS.values():
        real = inspect.signature(getattr(torchvision.datasets, kind)).parameters
        assert set(inspect.signature(stub).parameters) <= set(real)


def test_a_package_that_a_set_needs_is_missing(refuse, monkeypatch):
    def needs(*_, **__):
        raise ModuleNotFoundError("No module named 'scipy'")

    monkeypatch.setattr(torchvision.datasets, "SVHN", needs)
    refuse("svhn", "No module named 'scipy'")


@pytest.fixture
def archive(here, monkeypatch):
    """cifar-10-python.tar.gz with 3 images a batch, in cache/; the checksums are its own."""
    real, content, random = torchvision.datasets.CIFAR10, {}, np.random.default_rng(0)
    names = [name for name, _ in real.train_list + real.test_list]
    for name in names:
        images = random.integers(0, 256, (3, 3072), dtype=np.uint8)
        content[name] = pickle.dumps({"data": images, "labels": [0, 5, 9]})
    label_names = [f"class {i}" for i in range(10)]
    content["batches.meta"] = pickle.dumps({"label_names": label_names})
    (here / "cache").mkdir()
    path = here / "cache" / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as file:
        for name, text in content.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(text)
            file.addfile(info, io.BytesIO(text))
    md5 = {name: hashlib.md5(text).hexdigest() for name, text in content.items()}
    monkeypatch.setattr(real, "train_list", [[name, md5[name]] for name in names[:5]])
    monkeypatch.setattr(real, "test_list", [[name, md5[name]] for name in names[5:]])
    monkeypatch.setattr(real, "meta", real.meta | {"md5": md5["batches.meta"]})
    monkeypatch.setattr(real, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
    return path


@pytest.fixture
def offline(monkeypatch):
    """offline(error): that is what the network answers. Offline it is in any case."""

    def answer(error):
        def urlopen(*_, **__):
            raise error

        monkeypatch.setattr(urllib.request, "urlopen", urlopen)

    answer(urllib.error.URLError("Temporary failure in name resolution"))
    return answer


def test_the_archive_is_enough_without_a_network(archive, offline):
    data = load("cifar10", image_size=32)
    assert data.about["classes"][9] == "class 9"
    assert data.y_train.tolist() == [0, 5, 9] * 5 and data.y_test.tolist() == [0, 5, 9]
    with open(archive.parent / "cifar-10-batches-py" / "data_batch_1", "rb") as file:
        first = pickle.load(file)["data"][0]
    assert np.array_equal(data.x_train[0].flatten(), first)


def test_half_extracted_archive_is_extracted_again(archive, offline):
    right = load("cifar10").about
    (archive.parent / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"half")
    assert load("cifar10").about == right


ONLINE = "(online, or with the archive in cache/)"


@pytest.mark.parametrize("size", [0, 100, -1])
def test_truncated_archive_and_no_network(archive, offline, refuse, size):
    archive.write_bytes(archive.read_bytes()[:size])
    refuse("cifar10", ONLINE)


NO_NETWORK = {
    "cifar10": urllib.error.URLError("Temporary failure in name resolution"),
    "cifar100": urllib.error.HTTPError("https://x", 404, "Not Found", {}, None),
    "svhn": http.client.IncompleteRead(b""),
    "stl10": TimeoutError("timed out"),
}


@pytest.mark.parametrize("name", NO_NETWORK)
def test_no_network_and_no_data(refuse, offline, name):
    offline(NO_NETWORK[name])
    assert ONLINE in refuse(name, str(NO_NETWORK[name]))


def test_a_download_that_breaks_off_is_an_error(here, monkeypatch, capsys):
    class Response(io.BytesIO):
        url = length = None

    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Response(b"half an archive"))
    assert moco_cifar.main(["--data-dir", "cache"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1 and lines[0].startswith("error: ") and ONLINE in lines[0]


# --limit and --holdout
@pytest.mark.parametrize("n, counts", [(4, [1] * 4), (12, [3] * 4), (24, [6] * 4), (0, [6] * 4)])
def test_limit_takes_equally_many_of_each_class(here, n, counts):
    data = load(write(here / "a.npz"), limit=n)
    assert data.y_train.bincount().tolist() == counts
    assert data.about["n_train"] == sum(counts)


@pytest.mark.parametrize("n, counts", [(5, [2, 2, 1]), (9, [3, 3, 3]), (12, [5, 3, 4])])
def test_limit_is_as_equal_as_the_classes_allow(n, counts):
    labels = torch.tensor([0] * 9 + [1] * 3 + [2] * 8)[torch.randperm(20)]
    some, _ = moco_cifar.stratified(labels, n, "--limit")
    assert labels[some].bincount().tolist() == counts


@pytest.mark.parametrize("flag", ["limit", "holdout"])
def test_the_choice_is_fixed(here, flag):
    path, shas = write(here / "a.npz"), set()
    for seed in range(3):
        torch.manual_seed(seed)
        shas.add(load(path, seed=seed, **{flag: 8}).about["sha256"])
    assert len(shas) == 1


@pytest.mark.parametrize("n", [1, 5, 8, 23])
def test_holdout_parts_the_training_images(here, n):
    arrays, data = random_arrays(), load(write(here / "a.npz"), holdout=n)
    assert (data.about["n_train"], data.about["n_test"]) == (24 - n, n)
    parts = [{row.numpy().tobytes() for row in x} for x in (data.x_train, data.x_test)]
    images = {row.transpose(2, 0, 1).tobytes() for row in arrays["x_train"]}
    assert len(parts[0]) == 24 - n and len(parts[1]) == n and parts[0] | parts[1] == images


def test_holdout_keeps_each_image_with_its_label(here):
    arrays, data = random_arrays(), load(write(here / "a.npz"), holdout=8, limit=8)
    label = {x.tobytes(): y for x, y in zip(arrays["x_train"], arrays["y_train"])}
    for images, labels in ((data.x_train, data.y_train), (data.x_test, data.y_test)):
        found = [label[x.permute(1, 2, 0).numpy().tobytes()] for x in images]
        assert labels.tolist() == found


def test_holdout_holds_equally_many_of_each_class(here):
    data = load(write(here / "a.npz"), holdout=8)
    assert data.y_test.bincount().tolist() == [2] * 4
    assert data.y_train.bincount().tolist() == [4] * 4


def test_limit_leaves_the_holdout_as_it_is(here):
    path = write(here / "a.npz")
    held = load(path, holdout=8).x_test
    assert torch.equal(load(path, holdout=8, limit=4).x_test, held)


def test_limit_leaves_the_test_images_as_they_are(here):
    assert load(write(here / "a.npz"), limit=4).about["n_test"] == 12


TOO_MANY = {
    "--limit 25": "--limit 25: there are only 24 training",
    "--holdout 24": "--holdout 24: there are only 24 training",
    "--holdout 999": "--holdout 999: there are only 24 training",
    "--holdout 20 --limit 5": "--limit 5: there are only 4 training",
}


@pytest.mark.parametrize("flags", TOO_MANY)
def test_more_than_there_are(here, refuse, flags):
    refuse(write(here / "a.npz"), TOO_MANY[flags], *flags.split())


# the fingerprint of the data
def test_the_same_images_have_the_same_sha256(here):
    (here / "b").mkdir()
    paths = write(here / "a.npz"), write(here / "b" / "c.npz", classes=np.array(list("abcd")))
    assert len({load(path).about["sha256"] for path in paths}) == 1


@pytest.mark.parametrize("name", ["x_train", "y_train", "x_test", "y_test"])
def test_one_pixel_or_label_changes_the_sha256(here, name):
    array = random_arrays()[name]
    array.flat[-1] ^= 1
    before = load(write(here / "a.npz")).about["sha256"]
    assert load(write(here / "b.npz", **{name: array})).about["sha256"] != before


def test_image_size_changes_the_sha256(here):
    path = write(here / "a.npz")
    assert load(path).about["sha256"] != load(path, image_size=9).about["sha256"]
