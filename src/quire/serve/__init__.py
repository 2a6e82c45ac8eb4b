"""An HTTP server with OpenAI's API over one engine: `quire serve MODEL`.

server.py    an address, signals, the end
app.py       which path does what
service.py   one request's way: checks, a place, answers, their end
protocol.py  bodies as they may come, with their bounds
asking.py    a body → SamplingParams
shapes.py    what came back → objects of either API
logprobs.py  ... their logprobs
streaming.py events while they come, for a client that may leave or stop reading
grammar.py   JSON of a schema, token by token
limits.py    who may come in, with how much, and how many at once
pages.py     the page on which people see the pool
metrics.py   figures for Prometheus
errors.py    what went wrong, as OpenAI says it

Importing this package loads nothing; its modules need the extra "serve".
"""
