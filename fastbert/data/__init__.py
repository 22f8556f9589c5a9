"""From text to batches for pretraining."""
