"""Files of COCO's form as the arrays that average precision is made of."""

import numpy as np

from capvl.evals.average_precision import Federated, Found, Objects


def _columns(rows, images, classes, more):
    """image, label, box and other columns of annotations or detections."""
    return (
        np.array([images[row["image_id"]] for row in rows], int),
        np.array([classes[row["category_id"]] for row in rows], int),
        np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4),
        *(np.array([row.get(key, 0) for row in rows], kind) for key, kind in more.items()),
    )


def read(truth, detections) -> tuple[Objects, Found, int]:
    """Objects, detections and the number of classes of a truth and its detections."""
    images = {key: i for i, key in enumerate(sorted(row["id"] for row in truth["images"]))}
    classes = {key: i for i, key in enumerate(sorted(row["id"] for row in truth["categories"]))}
    own = _columns(truth["annotations"], images, classes, {"area": float, "ignore": bool, "iscrowd": bool})
    objects = Objects(*own)
    objects = objects._replace(ignored=objects.ignored | objects.crowd)
    found = Found(*_columns(detections, images, classes, {"score": float, "excused": bool}))
    return objects, found, len(classes)


def federated(truth) -> Federated:
    """What LVIS says of its images and classes."""
    rows = sorted(truth["images"], key=lambda row: row["id"])
    categories = sorted(truth["categories"], key=lambda row: row["id"])
    classes = {row["id"]: i for i, row in enumerate(categories)}

    def pairs(name):
        return np.array([(i, classes[key]) for i, row in enumerate(rows) for key in row[name]], int).reshape(-1, 2)

    letters = [row["frequency"] for row in categories]
    return Federated(letters, pairs("neg_category_ids"), pairs("not_exhaustive_category_ids"))
