"""Pictures are pure functions of their numbers, and maps and instances agree with each other."""

import numpy as np
import pytest

from data_tools.synth.scene import CATEGORIES, KINDS, draw_picture


@pytest.fixture(scope="module")
def pictures() -> list:
    return [draw_picture(7, index, kind, 120, 160) for index, kind in enumerate(KINDS)]


def test_picture_has_its_size_and_its_main_object(pictures: list) -> None:
    for kind, picture in zip(KINDS, pictures, strict=True):
        assert picture.image.shape == (120, 160, 3)
        assert picture.image.dtype == picture.semantic.dtype == np.uint8
        assert kind in [instance.kind for instance in picture.instances]
        assert 1 <= len(picture.instances) <= 4
        largest = max(picture.instances, key=lambda instance: instance.mask.sum())
        assert largest.mask.mean() > 0.04  # objects are large


def test_semantic_map_is_complete_and_agrees_with_the_instances(pictures: list) -> None:
    for picture in pictures:
        assert picture.semantic.min() >= 1
        assert picture.semantic.max() <= len(CATEGORIES)
        covered = np.zeros(picture.semantic.shape, int)
        for instance in picture.instances:
            assert instance.mask.sum() >= 60
            assert np.all(picture.semantic[instance.mask] == KINDS.index(instance.kind) + 1)
            covered += instance.mask
        assert covered.max() == 1  # visible pixels belong to one object
        assert np.all((picture.semantic <= len(KINDS)) == (covered == 1))


def test_picture_is_pure_and_follows_its_seed(pictures: list) -> None:
    again = draw_picture(7, 3, KINDS[3], 120, 160)
    np.testing.assert_array_equal(again.image, pictures[3].image)
    np.testing.assert_array_equal(again.semantic, pictures[3].semantic)
    other = draw_picture(8, 3, KINDS[3], 120, 160)
    assert np.abs(other.image.astype(int) - pictures[3].image).mean() > 5


def test_pictures_are_exposed_and_have_structure(pictures: list) -> None:
    for picture in pictures:
        grey = picture.image.mean(-1)
        assert 40 < grey.mean() < 215
        assert grey.std() > 12
        # Neighbours resemble each other far more than distant pixels do: what is hidden can be told from what is seen.
        near, far = np.abs(np.diff(grey, axis=1)).mean(), np.abs(grey[:, 60:] - grey[:, :-60]).mean()
        assert near < 0.75 * far


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 200), (200, 70)])
def test_unusual_sizes_work(height: int, width: int) -> None:
    for index in range(6):
        assert draw_picture(1, index, KINDS[index], height, width).image.shape == (height, width, 3)
