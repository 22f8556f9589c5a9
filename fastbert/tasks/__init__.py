"""Tasks that a model is fine-tuned for: what their rows are, and how well a model does on them."""

FILE = "fastbert_task.json"  # in a tuned model's folder: the task, and how it was tokenised
