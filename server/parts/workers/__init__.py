"""Several API processes (--api-server-count): the first one, the coordinator, is the engine of the others, the workers.

A worker does what takes time for each token: HTTP, TLS, templates, tokenizing, detokenizing, JSON. The coordinator owns
what all must agree on: the connections to the engines, the capacity and its fair division, the accounts of tenants,
stored responses, recordings, metrics. It answers itself whatever is not a generation: workers forward such requests.
"""
