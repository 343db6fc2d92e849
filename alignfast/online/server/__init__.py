"""The server: OpenAI's routes over our engine, votes on what they answered, safe as it starts.

One file a room:
    app.py         the routes; loop.py: those of the loop
    schema.py      what a body may hold; shapes.py: what an answer looks like
    generate.py    from a body to an answer, whole or as a stream
    votes.py       from a body to a vote in the store
    runner.py      the thread that steps the engines
    guard.py       who asks: keys, cookies, tokens that allow one vote; limits on bodies
    versions.py    a folder of weights and its hash; which one is the first to serve
    watch.py       the thread that follows what the store says
    service.py     what the routes share; metrics.py: what it tells Prometheus; run.py: uvicorn and signals
"""
