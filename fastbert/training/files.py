"""Names in a run's folder."""

LOG = "log.jsonl"
RUN = "run.json"
