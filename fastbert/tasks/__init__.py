"""Tasks that a model is fine-tuned for: what their rows are, and how well a model does on them."""
