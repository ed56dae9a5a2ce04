"""From a judged request to its answer: one frame for both endpoints.

`respond` validates, converts, and then streams or does not. What the endpoints differ in is in `completions` and
`chat`: how a body becomes prompts, and what its answer looks like.
"""
