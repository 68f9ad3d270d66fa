"""`eve serve`: the OpenAI protocol over one engine, on FastAPI and uvicorn.

`transformers serve` is not the base, because it answers requests with pictures one at a time and
has no limits, keys or metrics (seen with 5.23).
"""
