"""Pretraining and fine-tuning recipes on transformers' Trainer."""
