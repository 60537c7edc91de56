"""The textbook Flask handler, which most people write first and many keep."""

from flask import Flask, jsonify, request

from benchmarks.peers.model import predict

app = Flask(__name__)


@app.post("/v1/classify")
def classify():
    return jsonify(predictions=predict(request.get_data()))
