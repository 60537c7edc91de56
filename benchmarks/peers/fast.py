"""The strongest simple peer: the textbook handler under FastAPI, uvicorn and uvloop."""

from fastapi import FastAPI, Request

from benchmarks.peers.model import predict

app = FastAPI()


@app.post("/v1/classify")
async def classify(request: Request):
    return {"predictions": predict(await request.body())}
