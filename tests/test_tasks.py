from __future__ import annotations

import textwrap

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from filterpress.data import Arrays, DataSet
from filterpress.tasks import ImageClassification, augment, calibration, load_task

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def digits():
    return load_task("digits")


def collect(task, split, **options):
    batches = list(task.batches(split, 100, **options))
    return torch.cat([images for images, _ in batches]), torch.cat([t for _, t in batches])


def generator(seed):
    return torch.Generator().manual_seed(seed)


def test_training_images_have_mean_zero_and_deviation_one():
    channels = [torch.randint(low, 256, (40, 1, 6, 6)) for low in (0, 100, 200)]
    images = torch.cat(channels, dim=1).to(torch.uint8)
    task = classification(images)
    seen, _ = collect(task, "train")
    assert seen.dtype == torch.float32
    torch.testing.assert_close(seen.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen.std((0, 2, 3), correction=0), torch.ones(3))


def classification(images, labels=None):
    from filterpress.tasks import _classification

    labels = torch.arange(len(images)) % 2 if labels is None else labels
    arrays = Arrays(images, labels)
    return _classification(DataSet(arrays, arrays, arrays, ("a", "b")), "image-folder:x")


def test_images_of_one_colour_do_not_divide_by_zero():
    images, _ = collect(classification(torch.full((4, 1, 8, 8), 7, dtype=torch.uint8)), "train")
    assert not images.any()


def test_clean_batches_come_in_order_and_the_last_is_the_rest(digits):
    sizes = [len(labels) for _, labels in digits.batches("test", 100)]
    assert sizes == [100, 100, 100, 59]
    images, labels = collect(digits, "test")
    assert labels.equal(digits.data.test.labels)
    pixels = images * digits.std + digits.mean
    torch.testing.assert_close(pixels, digits.data.test.images.float(), atol=1e-3, rtol=0)


def test_a_generator_shuffles_and_alone_decides_what_comes(digits):
    torch.manual_seed(0)
    first, labels = collect(digits, "train", generator=generator(5))
    torch.manual_seed(1)
    again, _ = collect(digits, "train", generator=generator(5))
    other, _ = collect(digits, "train", generator=generator(6))
    assert first.equal(again)
    assert not first.equal(other)
    assert not labels.equal(digits.data.train.labels)
    assert labels.sort().values.equal(digits.data.train.labels.sort().values)


def shifted_by_hand(image, down, right, mirrored):
    """One image, by the definition: look at (row + down, column + right), outside is black."""
    channels, height, width = image.shape
    result = np.zeros_like(image)
    for c, y, x in np.ndindex(channels, height, width):
        column = width - 1 - x if mirrored else x
        row, column = y + down, column + right
        if 0 <= row < height and 0 <= column < width:
            result[c, y, x] = image[c, row, column]
    return result


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    shape=st.tuples(st.integers(1, 4), st.sampled_from([1, 3]), st.just(5), st.integers(4, 7)),
    shift=st.integers(0, 3),
    flip=st.booleans(),
)
def test_the_batched_augmentation_is_the_one_image_by_image(seed, shape, shift, flip):
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator(seed))
    found = augment(images, shift=shift, flip=flip, generator=generator(seed))
    draws = generator(seed)
    down, right = torch.randint(0, 2 * shift + 1, (2, len(images), 1), generator=draws) - shift
    mirrored = torch.rand((len(images), 1), generator=draws) < 0.5
    for k, image in enumerate(images.numpy()):
        mirror = flip and bool(mirrored[k])
        expected = shifted_by_hand(image, int(down[k]), int(right[k]), mirror)
        assert np.array_equal(found[k].numpy(), expected)


def test_every_shift_and_both_mirrorings_occur():
    ramp = torch.arange(1, 26, dtype=torch.uint8).reshape(1, 1, 5, 5).expand(2000, -1, -1, -1)
    found = augment(ramp, shift=1, flip=True, generator=generator(0))
    counts = found.flatten(1).unique(dim=0, return_counts=True)[1]
    assert len(counts) == 18
    assert counts.min() > 2000 / 18 / 2


def test_digits_are_not_mirrored_and_photographs_are(digits):
    assert not digits.flip
    assert digits.shift == 1
    photographs = classification(torch.zeros(4, 3, 32, 32, dtype=torch.uint8))
    assert photographs.flip
    assert photographs.shift == 4


def test_the_loss_is_the_cross_entropy(digits):
    outputs, targets = torch.randn(7, 10), torch.randint(0, 10, (7,))
    by_hand = -torch.stack([o.softmax(0)[t].log() for o, t in zip(outputs, targets, strict=True)])
    torch.testing.assert_close(digits.loss(outputs, targets), by_hand.mean())


def test_the_score_is_the_exact_share_of_right_answers(digits):
    answers = iter(torch.split(digits.data.test.labels, 250))
    wrong = {3, 100, 358}
    seen = 0

    def predict(images):
        nonlocal seen
        outputs = F.one_hot(next(answers), 10).float()
        for k in wrong:
            if seen <= k < seen + len(images):
                outputs[k - seen] = outputs[k - seen].roll(1)
        seen += len(images)
        return outputs

    assert digits.score(predict, "test") == 356 / 359


def test_the_confusion_matrix_has_labels_in_rows(digits):
    confusion = digits.confusion(
        lambda images: F.one_hot(torch.full((len(images),), 3), 10), "test"
    )
    assert confusion[:, 3].equal(torch.bincount(digits.data.test.labels))
    assert confusion.sum() == confusion[:, 3].sum() == 359


def test_calibration_images_are_clean_distinct_training_images_and_depend_on_the_seed(digits):
    clean, _ = collect(digits, "train")
    known = {image.numpy().tobytes() for image in clean}
    chosen = calibration(digits, 50, seed=1)
    drawn = {image.numpy().tobytes() for image in chosen}
    assert len(drawn) == 50
    assert drawn <= known
    assert chosen.equal(calibration(digits, 50, seed=1))
    assert not chosen.equal(calibration(digits, 50, seed=2))
    assert calibration(digits, 10**6).equal(clean)


@pytest.mark.parametrize(("side", "expected"), [(64, 300), (160, 163), (2048, 128)])
def test_large_images_are_fewer_to_calibrate_with(side, expected):
    class Large:
        input_shape = (3, side, side)

        def size(self, split):
            return 400

        def batches(self, split, batch_size):
            yield torch.zeros(400, 1, 1, 1), torch.zeros(400)

    assert len(calibration(Large(), 300)) == expected


def test_a_task_is_loaded_once_in_a_process(digits):
    assert load_task("digits") is digits
    assert load_task("digits", image_size=16) is not digits


def test_a_split_that_does_not_exist_is_refused(digits):
    with pytest.raises(ValueError, match="split must be train, validation or test, got 'valid'"):
        digits.size("valid")
    with pytest.raises(ValueError, match="shift must not be negative, got -1"):
        ImageClassification(
            data=digits.data, mean=digits.mean, std=digits.std, shift=-1, flip=False
        )


@pytest.fixture
def user_code(tmp_path, monkeypatch):
    """Return a function that writes a module of the user's into the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])

    def write(source):
        name = f"user_{tmp_path.name}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        return name

    return write


def test_a_task_of_the_users_own_gets_the_arguments(user_code):
    module = user_code(
        """
        class Mine:
            input_shape, n_classes = (1, 4, 4), 2
            def __init__(self, **given): self.given = given
            def batches(self, split, batch_size, *, generator=None, device="cpu"): ...
            def size(self, split): return 10
            def loss(self, outputs, targets): ...
            def score(self, predict, split): return 0.5
        def make(data, data_dir, image_size):
            return Mine(data=data, data_dir=data_dir, image_size=image_size)
        """
    )
    task = load_task("anything", "somewhere", 4, f"{module}:make")
    assert task.given == {"data": "anything", "data_dir": "somewhere", "image_size": 4}


def test_what_is_wrong_with_the_users_task_is_said_in_one_line(user_code):
    module = user_code(
        """
        number = 3
        def none(data, data_dir, image_size): return None
        """
    )
    rule = r"task must name a function as package\.module:function, got"
    with pytest.raises(ValueError, match=f"{rule} 'no_such_module:make': .*No module named"):
        load_task(task="no_such_module:make")
    with pytest.raises(ValueError, match=f"{rule} '{module}:absent': {module} has no such name"):
        load_task(task=f"{module}:absent")
    with pytest.raises(ValueError, match=f"{rule} '{module}:number': .* is not callable"):
        load_task(task=f"{module}:number")
    with pytest.raises(ValueError, match=f"{rule} 'nonsense'$"):
        load_task(task="nonsense")
    with pytest.raises(TypeError, match="returned NoneType without input_shape, n_classes, batch"):
        load_task(task=f"{module}:none")


def test_an_error_while_importing_the_users_module_is_passed_on(user_code):
    module = user_code("raise RuntimeError('the camera is off')")
    with pytest.raises(ValueError, match=r"importing .* failed: the camera is off"):
        load_task(task=f"{module}:make")
