"""The server: OpenAI's routes over our engine, votes on what they answered, safe as it starts.

One file a room:
    app.py         the routes
    schema.py      what a body may hold; shapes.py: what an answer looks like
    generate.py    from a body to an answer, whole or as a stream
    runner.py      the thread that steps the engine
    guard.py       who asks: keys, cookies, tokens that allow one vote; limits on bodies
    recorder.py    what is kept of answers and votes, and by whom
    versions.py    a folder of weights and its hash
    service.py     what the routes share; metrics.py: what it tells Prometheus; run.py: uvicorn and signals
"""
