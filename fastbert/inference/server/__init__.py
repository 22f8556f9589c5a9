"""A model behind HTTP: requests of many clients share batches.

`batching` is the queue and the thread that owns the model, `metrics` what is counted, `models` which model does what,
`fields` what a body may hold, `refusals` how a request is turned down, `service` what every request goes through,
`openai` and `tei` the two dialects, `app` the endpoints, `run` what listens.
"""
