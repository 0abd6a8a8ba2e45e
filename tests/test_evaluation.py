"""Test measures of sample quality against naive loops and closed forms, in float64 NumPy."""

import os

import jax
import numpy as np
import pytest

from diffusion_jax import data, evaluation
from diffusion_jax.data import CLASS_NAMES, Dataset, sprites
from diffusion_jax.evaluation import (
    Estimate,
    check_samples,
    classifier,
    distances,
    neighbours,
    quality,
    spaces,
)
from diffusion_jax.evaluation.mapping import map_rows
from diffusion_jax.typing import InputError, RunWarning

DEVICES = jax.devices()[:2]
RANDOM = np.random.default_rng(0).uniform(size=(100, 8, 8, 3))


def normal(n: int, d: int, seed: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, d)) * np.linspace(0.5, 1.5, d) + shift).astype(np.float32)


@pytest.fixture(scope="module")
def sets() -> tuple[np.ndarray, np.ndarray]:
    return normal(230, 6, 0), normal(150, 6, 1, 0.4)


def pairwise(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return all Euclidean distances, computed from differences, not from products."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return np.sqrt(((x[:, None] - y[None]) ** 2).sum(-1))


# --------------------------------------------------------------------------------- distances


def naive_mmd2(x: np.ndarray, y: np.ndarray) -> float:
    def average(a, b, same: bool) -> float:
        values = [
            (float(np.dot(p, q)) / len(p) + 1) ** 3
            for i, p in enumerate(a.astype(np.float64))
            for j, q in enumerate(b.astype(np.float64))
            if not (same and i == j)
        ]
        return sum(values) / len(values)

    return average(x, x, True) + average(y, y, True) - 2 * average(x, y, False)


def test_kernel_distance_and_its_jackknife_by_a_double_loop(sets) -> None:
    x, y = sets[0][:60], sets[1][:45]  # blocks of 6 and 4 rows
    x, y = x.reshape(10, 6, 6), y[:40].reshape(10, 4, 6)
    flat = [np.concatenate(list(v)) for v in (x, y)]
    left = [
        naive_mmd2(*(np.concatenate(list(np.delete(v, block, 0))) for v in (x, y)))
        for block in range(10)
    ]
    found = distances.kernel_distance(sets[0][:60], sets[1][:45])
    assert found.value == pytest.approx(naive_mmd2(*flat), abs=1e-5)
    variance = 0.9 * sum((value - np.mean(left)) ** 2 for value in left)
    assert found.error == pytest.approx(np.sqrt(variance), rel=1e-4)


@pytest.mark.parametrize("distance", [distances.kernel_distance, distances.sliced_wasserstein])
@pytest.mark.parametrize(("shift", "most"), [(0.0, 2.0), (0.4, 1.35)])
def test_errors_are_the_scatter_of_repetitions(distance, shift: float, most: float) -> None:
    """Repeat 60 times. For equal distributions the mean of the kernel distance must be 0."""
    found = [distance(normal(200, 6, s), normal(200, 6, s + 999, shift)) for s in range(60)]
    values, errors = np.array([each[:2] for each in found]).T
    if distance is distances.kernel_distance:
        assert (abs(values.mean()) < 3 * values.std() / np.sqrt(60)) == (shift == 0)
    assert 0.75 < np.sqrt(np.mean(errors**2)) / values.std() < most


def test_frechet_of_gaussians_that_commute_has_a_closed_form() -> None:
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    one, two = rng.uniform(0.1, 3, (2, 5))
    means = rng.normal(size=(2, 5))
    covs = [(turn * values) @ turn.T for values in (one, two)]
    want = ((means[0] - means[1]) ** 2).sum() + ((np.sqrt(one) - np.sqrt(two)) ** 2).sum()
    assert distances.frechet(means[0], covs[0], means[1], covs[1]) == pytest.approx(want, rel=1e-10)


def test_frechet_of_gaussians_that_do_not_commute_by_the_product_s_eigenvalues() -> None:
    """Use that tr (A^1/2 B A^1/2)^1/2 is the sum of the roots of the eigenvalues of A B."""
    rng = np.random.default_rng(1)
    a, b = (m @ m.T for m in rng.normal(size=(2, 4, 4)))
    want = np.trace(a) + np.trace(b) - 2 * np.sqrt(np.linalg.eigvals(a @ b)).real.sum()
    assert distances.frechet(np.zeros(4), a, np.zeros(4), b) == pytest.approx(want, rel=1e-9)


def test_frechet_distance_takes_moments_of_the_sets(sets) -> None:
    x, y = (v.astype(np.float64) for v in sets)
    want = distances.frechet(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    found = distances.frechet_distance(*sets)
    assert found.value == pytest.approx(want, rel=1e-9)
    values = [
        distances.frechet_distance(normal(230, 6, s), normal(150, 6, s + 99, 0.4)).value
        for s in range(30)
    ]
    assert 0.5 < found.error / np.std(values) < 2


def test_sliced_wasserstein_by_sorting_in_float64(sets) -> None:
    x, y = (v.astype(np.float64)[:150] for v in sets)
    directions = np.random.default_rng(0).normal(size=(6, distances.PROJECTIONS))
    squares = []
    for direction in directions.T:
        direction = direction / np.sqrt((direction**2).sum())
        squares.append(((np.sort(x @ direction) - np.sort(y @ direction)) ** 2).mean())
    found = distances.sliced_wasserstein(*sets)
    assert found.value == pytest.approx(np.sqrt(np.mean(squares)), rel=1e-5)


def test_sliced_wasserstein_of_a_shift_is_the_shift_over_root_d() -> None:
    x = normal(400, 6, 3)
    found = distances.sliced_wasserstein(x, x + np.float32(2.0)).value
    assert found == pytest.approx(2.0, rel=0.15)  # 2 sqrt(6) / sqrt(6), in 128 directions


# -------------------------------------------------------------------------------- neighbours


@pytest.mark.parametrize("k", [1, 4])
def test_nearest_by_sorting_all_distances(sets, k: int) -> None:
    x, y = sets
    found = neighbours.nearest(x, y, k, DEVICES)
    every = pairwise(x, y)
    np.testing.assert_array_equal(found.indices, np.argsort(every, 1)[:, :k])
    np.testing.assert_allclose(found.distances, np.sort(every, 1)[:, :k], rtol=1e-4)


def naive_radii(x: np.ndarray, k: int) -> np.ndarray:
    return np.sort(pairwise(x, x), 1)[:, k]  # column 0 is the point itself


def test_precision_recall_density_and_coverage_by_loops(sets) -> None:
    real, fake = sets
    every = pairwise(fake, real)
    inside = np.array([np.any(row <= naive_radii(real, 3)) for row in every])
    reached = np.array([np.any(row <= naive_radii(fake, 3)) for row in every.T])
    dense = every <= naive_radii(real, 5)
    want = {"precision": inside.mean(), "recall": reached.mean()}
    want |= {"density": dense.sum() / (5 * len(fake)), "coverage": dense.any(0).mean()}
    found = neighbours.overlap(real, fake, DEVICES)
    assert {name: part.value for name, part in found.items()} == pytest.approx(want, abs=1e-12)
    assert all(0 < value < 1 for value in want.values())
    spread = np.sqrt(inside.mean() * (1 - inside.mean()) / (len(fake) - 1))
    assert found["precision"].error == pytest.approx(spread, rel=1e-9)


# ------------------------------------------------------------------- classifier and spaces


@pytest.fixture(scope="module")
def drawn() -> Dataset:
    return Dataset(*sprites(600, 7, [1] * 5), CLASS_NAMES)


def test_a_classifier_learns_is_stored_and_is_known_by_its_data(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "STEPS", 50)
    params = classifier.train(drawn, DEVICES)
    other = Dataset(*sprites(300, 8, [1] * 5), CLASS_NAMES)
    apply = classifier.apply(classifier.network(drawn), "__call__", tuple(DEVICES))
    logits = map_rows(apply, params, other.images, DEVICES)
    assert np.mean(logits.argmax(1) == other.labels.argmax(1)) > 0.6
    path = tmp_path / "folder" / "classifier.npz"
    assert classifier.load(path, drawn) is None
    classifier.save(path, drawn, params)
    for one, two in zip(*map(jax.tree.leaves, (classifier.load(path, drawn), params)), strict=True):
        np.testing.assert_array_equal(one, two)
    assert classifier.load(path, other) is None
    assert classifier.load(path, drawn._replace(labels=np.roll(drawn.labels, 1, 0))) is None
    whole = path.read_bytes()
    method = whole.index(b"PK\x03\x04") + 8, whole.index(b"PK\x01\x02") + 10  # compression
    unknown = bytes(99 if at in method else byte for at, byte in enumerate(whole))
    flipped = whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:]
    for damaged in (b"no archive", b"", whole[:-9], unknown, flipped):
        path.write_bytes(damaged)
        assert classifier.load(path, drawn) is None
    classifier.save(path, drawn, jax.tree.map(lambda leaf: leaf[..., None], params))
    assert classifier.load(path, drawn) is None
    path.unlink()
    os.mkfifo(path)
    assert classifier.load(path, drawn) is None


def test_what_has_classes(drawn) -> None:
    assert classifier.has_classes(drawn)
    for labels in (0 * drawn.labels, 0.5 * drawn.labels, np.eye(5, dtype=np.float32)[[0] * 600]):
        assert not classifier.has_classes(drawn._replace(labels=labels))


def test_spaces_are_of_mean_0_and_variance_1_on_their_data(drawn) -> None:
    found = spaces.spaces(drawn, None, DEVICES)
    assert list(found) == ["random", "pixels"]
    for space in found.values():
        rows = space(drawn.images)
        assert rows.dtype == np.float32
        np.testing.assert_allclose(rows.mean(0), 0, atol=1e-4)
        assert rows.var(0).mean() == pytest.approx(1, rel=1e-3)


def test_principal_components_are_orthonormal_and_hold_the_variance(drawn) -> None:
    axes = spaces.principal_components(drawn.images).astype(np.float64)
    np.testing.assert_allclose(axes.T @ axes, np.eye(64), atol=1e-5)
    rows = drawn.images.reshape(600, 8, 2, 8, 2, 3).mean((2, 4)).reshape(600, -1)
    values = np.linalg.svd(rows - rows.mean(0), compute_uv=False) ** 2 / 599
    np.testing.assert_allclose((rows @ axes).var(0, ddof=1), values[:64], rtol=1e-3)


def test_large_images_are_averaged_over_squares() -> None:
    images = np.arange(32 * 32, dtype=np.float32).reshape(1, 32, 32, 1)
    small = spaces.shrink(images)
    assert small.shape == (1, 8, 8, 1)
    assert small[0, 3, 5, 0] == images[0, 12:16, 20:24, 0].mean()
    small = spaces.shrink(images[:, :12])
    assert small.shape == (1, 6, 8, 1)
    assert small[0, 3, 5, 0] == images[0, 6:8, 20:24, 0].mean()


# ------------------------------------------------------------------------------ whole measures


@pytest.fixture(scope="module")
def real() -> evaluation.RealImages:
    return evaluation.real_images("sprites:300:frequencies=1,1,1,1,1", 200)


def test_drawn_real_images_are_other_than_the_training_images(real) -> None:
    assert [len(part.images) for part in real[:3]] == [200, 200, 300]
    copies = {image.tobytes() for image in real.seen.images}
    for part in (real.reference, real.other):
        assert len(copies & {image.tobytes() for image in part.images}) < 20
    assert not np.array_equal(real.reference.images, real.other.images)


def test_files_are_parted_and_what_is_held_against_is_not_seen(tmp_path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (250, 8, 8, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    text = f"npy:{tmp_path / 'images.npy'}"
    real = evaluation.real_images(text, 5000)
    whole = {image.tobytes() for image in images}
    other, seen = ({image.tobytes() for image in part.images} for part in (real.other, real.seen))
    assert other | seen == whole
    assert not other & seen
    assert {image.tobytes() for image in real.reference.images} <= seen
    assert len(real.reference.images) == len(real.other.images) == 125
    np.save(tmp_path / "images.npy", images[:199])
    with pytest.raises(InputError, match="holds 199 images: measuring takes two sets of 100"):
        evaluation.real_images(text, 100)


def test_held_out_images_are_parted_and_training_sees_none_of_them(tmp_path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (500, 8, 8, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    text = f"npy:{tmp_path / 'images.npy'}:held_out="
    real = evaluation.real_images(f"{text}0.41", 5000)
    sets = [{image.tobytes() for image in part.images} for part in real[:3]]
    assert [len(images) for images in sets] == [102, 102, 295]
    assert len(set.union(*sets)) == 499, "an odd one is left over, and none is in two sets"
    assert real.origin == "2 x 102 of 205 images that training did not see"
    np.testing.assert_array_equal(data.load(f"{text}0.41").images, real.seen.images)
    with pytest.raises(InputError, match="150 images are held out: measuring takes two sets of 10"):
        evaluation.real_images(f"{text}0.3", 100)


def test_real_samples_measure_as_real_and_noise_does_not(real) -> None:
    measure = evaluation.measure_against(real, None, DEVICES)
    same, near = measure(real.other.images, real.other.labels)
    halves = same.pop("part near training")  # for all images, and for every second one
    assert halves.samples.value == pytest.approx(halves.real.value, abs=0.1)
    assert all(row.samples == row.real for row in same.values())
    every = pairwise(real.other.images.reshape(200, -1), real.seen.images.reshape(300, -1))
    np.testing.assert_allclose(near.distances[:, 0], every.min(1) / np.sqrt(768), rtol=1e-4)
    noise = np.random.default_rng(0).integers(0, 256, real.other.images.shape, np.uint8)
    for name, row in measure(noise, None)[0].items():
        sign = 1 if name.startswith(("KID", "Frechet", "sliced", "distance")) else -1
        assert sign * (row.samples.value - row.real.value) > (
            0 if name == "part near training" else 10 * row.real.error
        ), name


def memorised(real: evaluation.RealImages, images: np.ndarray) -> tuple[dict, np.ndarray]:
    ours, theirs = (quality.to_training(v, real.seen, DEVICES) for v in (images, real.other.images))
    return quality.memorised(ours.distances, theirs.distances), ours.indices[:, 0]


def test_copies_of_training_images_are_found(real) -> None:
    copies = real.seen.images[::-1][:150]
    rows, near = memorised(real, copies)
    assert rows["distance to training"].samples.value == 0
    assert rows["part near training"].samples.value > 0.9
    assert rows["part near training"].real.value < 0.2
    np.testing.assert_array_equal(real.seen.images[near], copies)


def test_copies_are_found_where_other_images_have_copies_too(tmp_path) -> None:
    """Use 50 copies of 20 sprites. held_out separates them; without it the report counts them."""
    np.save(tmp_path / "images.npy", np.tile(sprites(20, 3)[0], (50, 1, 1, 1)))
    for held_out, near, copies in ((0.3, 0.5, 0), (0.0, 1, 500)):
        real = evaluation.real_images(f"npy:{tmp_path / 'images.npy'}:held_out={held_out}", 5000)
        part = memorised(real, real.seen.images[:200])[0]["part near training"]
        assert part.samples.value == 1
        assert (part.real.value == 1) if near == 1 else (part.real.value < near)
        words = f"; {copies} of the 500 compared have copies among training images"
        assert real.origin.endswith(words) == (copies > 0)
        assert ("copies" in real.origin) == (copies > 0)


def test_weights_from_elsewhere_are_compared_but_not_for_copies() -> None:
    real = evaluation.real_images("unknown", 100)
    assert real.seen is None
    assert real.origin == "2 x 100 drawn sprites; what these weights were trained on is not known"
    measured, near = evaluation.measure_against(real, None, DEVICES)(real.other.images, None)
    assert near is None
    assert "KID, random" in measured
    assert "part near training" not in measured


@pytest.mark.parametrize("n", [99, 100_001, 10**9])
def test_sets_that_are_too_small_or_too_large(n: int) -> None:
    with pytest.raises(InputError, match=f"real_n={n}: it must be in 100..100000"):
        evaluation.real_images("sprites:10", n)


def test_class_accuracy_counts_classes_alike() -> None:
    classes = np.eye(2, dtype=np.float32)[[0] * 8 + [1] * 2]
    right = np.array([True] * 8 + [True, False])
    found = quality.class_accuracy(right, classes)
    assert found == Estimate(0.75, pytest.approx(0.25))


@pytest.mark.parametrize(
    ("images", "match"),
    [
        (
            np.zeros((200, 8, 8, 1), np.float32),
            r"shape \(200, 8, 8, 1\): they must be \(n, 8, 8, 3",
        ),
        (np.zeros((200, 8, 8, 3), np.int64), r"type int64: float32 in \[-1, 1\], or uint8"),
        (np.zeros((99, 8, 8, 3), np.uint8), r"n=99: it must be at least 100"),
        (np.full((100, 8, 8, 3), np.nan, np.float32), r"must be finite"),
        (RANDOM, r"look like \[0, 1\]: give float32 in \[-1, 1\], or uint8 in 0\.\.255"),
        (RANDOM * 255, r"look like \[0, 255\]: give"),
        (np.rint(RANDOM).astype(np.uint8), r"look like \[0, 1\]: give"),
    ],
)
def test_samples_that_cannot_be_measured(images: np.ndarray, match: str) -> None:
    with pytest.raises(InputError, match=match):
        check_samples(images, (8, 8, 3), "samples=x.npy")


def test_samples_that_can_be_measured() -> None:
    for images in (2 * RANDOM - 1, 2.2 * RANDOM - 1.1, (255 * RANDOM).astype(np.uint8)):
        check_samples(images, (8, 8, 3), "samples=x.npy")
    with pytest.warns(
        RunWarning, match=r"49% of the values are outside of \[-1, 1\], and are clipp"
    ):
        check_samples(4 * RANDOM - 2, (8, 8, 3), "samples=x.npy")


def test_an_estimate_shows_the_digits_that_its_error_leaves() -> None:
    assert str(Estimate(0.123456, 0.0123)) == "0.123 +- 0.012"
    assert str(Estimate(18.04, 1.2)) == "18.0 +- 1.2"
