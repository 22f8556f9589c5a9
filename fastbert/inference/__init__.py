"""From strings to vectors, scores, labels and spans: what reads a model's own files, and runs it packed."""
