"""Write tiny made-up datasets in the file formats that evaluation probes read."""

import json

import numpy as np
from PIL import Image

from rmdd.data import sources
from rmdd.data.sources.cocoqa import FILES


def rows_of(data):
    """Return the annotation rows of a dataset, as the reader of its layout yields them."""
    return list(sources.find(data).rows(data)[0])


def picture(path, seed=0, size=(9, 7)):
    """Write an image of one colour with noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    noise = draw.integers(0, 60, (size[1], size[0], 3)) + draw.integers(0, 190, 3)
    Image.fromarray(noise.astype(np.uint8)).save(path, "PNG")


def class_folders(root, classes, each=3, folder="val"):
    """Write an ImageFolder: one folder of images per class."""
    for c, name in enumerate(classes):
        for i in range(each):
            picture(root / folder / name / f"ILSVRC2012_val_{c * each + i:08d}.JPEG", seed=c * each + i)


def cifar10(root, labels, names=("airplane", "automobile", "bird")):
    """Write the binary version of CIFAR-10: one label byte and 3 x 1024 pixel bytes per record."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "batches.meta.txt").write_text("\n".join(names) + "\n\n")
    planes = [[40 * label + 3] * 1024 + [2] * 1024 + [i] * 1024 for i, label in enumerate(labels)]
    records = [bytes([label, *pixels]) for label, pixels in zip(labels, planes, strict=True)]
    (root / "test_batch.bin").write_bytes(b"".join(records))


def cocoqa(folder, train, test):
    """Write COCO-QA files; line n of each file has the question, answer, image id or type of row n."""
    for split, rows in (("train", train), ("test", test)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for name, column in zip(FILES, zip(*rows, strict=True), strict=True):
            (folder / split / name).write_text("\n".join(map(str, column)) + "\n")


def coco_pictures(root, ids, folder="val2014"):
    for number in ids:
        picture(root / folder / f"COCO_{folder}_{number:012d}.jpg", seed=number)


def textcaps(root, split, images, captions=2, say="A sign that says {image} #{n}.".format):
    """Write TextCaps files with one record per caption `say(image=..., n=...)`; all images lie in `train_images`."""
    records = []
    for i, image in enumerate(images):
        strings = [say(image=image, n=n) for n in range(captions)]
        picture(root / "train_images" / f"{image}.jpg", seed=i)
        for n, string in enumerate(strings):
            records.append(
                {"image_id": image, "image_name": image, "image_path": f"{split}/{image}.jpg", "set_name": split}
                | {"caption_id": n, "caption_str": string, "reference_strs": strings}
            )
    whole = {"dataset_name": "textcaps", "dataset_type": split, "dataset_version": "0.1", "data": records}
    (root / f"TextCaps_0.1_{split}.json").write_text(json.dumps(whole))
