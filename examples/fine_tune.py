"""Fine-tune a classifier with transformers' Trainer: the patched model trains without padding.

pip install 'fastbert-kernels[demo,pretrain]'
python examples/fine_tune.py [--model bert-base-uncased] [--data rows.csv] [--epochs 10]
"""

import argparse
import csv
from pathlib import Path

from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import fastbert
from fastbert.demo import find_model

GOOD = "great, I love it|works like a charm|a joy to use|better than I hoped|the best I ever had|so very happy with it"
BAD = "broken on arrival|a waste of money|I want it back|worse than the old one|it never worked|so very sad about it"
ROWS = [("1", text) for text in GOOD.split("|")] + [("0", text) for text in BAD.split("|")]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--model", default=find_model(), help="a folder, or on the hub")
    options.add_argument("--data", type=Path, help="a CSV file of labels (0, 1, ...) and texts, without a header")
    options.add_argument("--epochs", type=float, default=10)
    options.add_argument("--learning-rate", type=float, default=3e-4)
    given = options.parse_args()

    rows = list(csv.reader(given.data.open(encoding="utf-8"))) if given.data else ROWS
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    data = [{**tokenizer(text, truncation=True, max_length=256), "labels": int(label)} for label, text in rows]
    model = AutoModelForSequenceClassification.from_pretrained(given.model, num_labels=len({row[0] for row in rows}))
    how = TrainingArguments("fine-tuned", num_train_epochs=given.epochs, learning_rate=given.learning_rate)
    Trainer(fastbert.patch(model), how, train_dataset=data, processing_class=tokenizer).train()
    model.save_pretrained("fine-tuned")  # a checkpoint like any other of transformers'


if __name__ == "__main__":
    main()
