"""Exports a classifier of Keras by tf2onnx, with answers, for ``foreign_models --also FOLDER``.

    python -m venv keras && keras/bin/pip install tensorflow-cpu tf2onnx pillow
    keras/bin/python benchmarks/keras_export.py PHOTOGRAPHS FOLDER

It runs in an environment of its own, because TensorFlow is as large as everything else together.
The weights are random. The last layer is scaled, so that answers differ from picture to picture.
"""

import csv
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf
import tf2onnx
from PIL import Image

SIDE_PX = 160
LABELS = [f"class {number}" for number in range(10)]


def main(photographs: Path, folder: Path) -> None:
    tf.keras.utils.set_random_seed(1)
    shape = (SIDE_PX, SIDE_PX, 3)
    model = tf.keras.applications.MobileNetV2(shape, weights=None, classes=len(LABELS), alpha=0.5)
    paths = sorted(photographs.resolve().rglob("*.jpg"))
    pictures = np.stack([prepared(path) for path in paths])
    body = tf.keras.Model(model.input, model.layers[-2].output)
    kernel, _ = model.layers[-1].get_weights()
    scores = body.predict(pictures, verbose=0) @ kernel
    scale = 3 / scores.std(0).mean()
    model.layers[-1].set_weights([kernel * scale, -scores.mean(0) * scale])
    answers = model.predict(pictures, verbose=0)

    folder.mkdir(parents=True, exist_ok=True)
    signature = [tf.TensorSpec((None, *shape), tf.float32, name="pictures")]
    function = tf.function(lambda x: model(x, training=False), input_signature=signature)
    tf2onnx.convert.from_function(
        function, input_signature=signature, opset=17, output_path=str(folder / "model.onnx")
    )
    (folder / "labels.txt").write_text("\n".join(LABELS) + "\n")
    (folder / "spec.toml").write_text(f"size = {SIDE_PX}\nmean = 0.5\nstd = 0.5\n")
    with (folder / "reference.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", *LABELS])
        rows.writerows([path, *map(float, row)] for path, row in zip(paths, answers, strict=True))


def prepared(path: Path) -> np.ndarray:
    """float32 (160, 160, 3) from −1 to 1."""
    image = Image.open(path).convert("RGB").resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR)
    return np.asarray(image, np.float32) / 127.5 - 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
