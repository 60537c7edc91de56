"""The textbook handler with Convoy's engine: the same plan and decoder, but no batching."""

import os
from pathlib import Path

import numpy as np
from flask import Flask, jsonify, request

from registry.core.paths import convoy_paths
from registry.model.bundle import open_bundle
from registry.model.image.decode import decode_image
from registry.model.plans.planner import Planner

bundle = open_bundle(Path(os.environ["BENCH_BUNDLE"]))
classifier = Planner(convoy_paths().plans, "cpu", 1, os.environ["CONVOY_PLAN"]).load(bundle)
manifest = bundle.manifest
app = Flask(__name__)


@app.post("/v1/classify")
def classify():
    pixels = decode_image(request.get_data(), manifest.preprocess)
    probabilities = classifier.classify(pixels[None])[0]
    best = np.argsort(-probabilities)[:5].tolist()
    return jsonify(
        predictions=[
            {
                "label": manifest.labels[index],
                "index": index,
                "probability": float(probabilities[index]),
            }
            for index in best
        ]
    )
