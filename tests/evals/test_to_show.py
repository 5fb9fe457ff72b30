"""Which phrases people see of an evaluation."""

from capvl.evals.boxes import to_show


def test_as_many_images_as_can_be():
    images = [3, 3, 3, 5, 5, 8]
    assert to_show(images, 2) == [0, 3]
    assert to_show(images, 4) == [0, 1, 3, 5]
    assert to_show(images, 9) == [0, 1, 2, 3, 4, 5]
    assert to_show([], 4) == []
