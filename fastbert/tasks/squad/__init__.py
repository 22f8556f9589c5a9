"""SQuAD 1.1 and 2.0: reading, the task, the metric."""
