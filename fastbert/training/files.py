"""Names in a run's folder."""

LOG = "log.jsonl"
RUN = "run.json"
BEST = "best"  # the model with the lowest loss on held-out text
EVALUATION = "evaluation.json"  # in it: which step's, and its figures
MODEL = "model"
