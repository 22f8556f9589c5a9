"""transformers' common model tests on BERT, for the classes of transformers or of fastbert.

``FASTBERT_CONFORMANCE`` names the library. ``run.py`` starts this file with transformers' own ``tests`` package first
on the path; under plain pytest it does not import.
"""

import importlib
import os
import unittest
from typing import Any

import torch
import transformers
from parameterized import parameterized
from transformers import BertConfig, PreTrainedModel, set_seed
from transformers.testing_utils import torch_device

from tests import test_modeling_common as common
from tests.test_training_mixin import TrainingTesterMixin

LIBRARY = os.environ.get("FASTBERT_CONFORMANCE")
if LIBRARY not in ("transformers", "fastbert"):
    raise RuntimeError("FASTBERT_CONFORMANCE has to be 'transformers' or 'fastbert', the library to test")

HEADS = (
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForMultipleChoice",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
)
CLASSES: dict[str, type[PreTrainedModel]] = {
    name: getattr(importlib.import_module(LIBRARY), name) for name in ("BertModel", *HEADS)
}
if LIBRARY == "fastbert":
    for name, cls in CLASSES.items():
        if cls is getattr(transformers, name) or cls.__name__ != name:
            raise RuntimeError(f"fastbert.{name} is {cls}: not a class of its own under that name")

Inputs = dict[str, torch.Tensor]


def kept_tokens(values: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """Returns one row for each token that the mask keeps, or all values if they are not one for each token."""
    mask = inputs["attention_mask"].bool()
    return values[mask] if values.shape[:2] == mask.shape else values


class BertModelTester:
    """Makes the small configuration and the random inputs that the common tests ask for.

    The attention mask is random, so it has holes as well as padding. The sizes are attributes because the common tests
    read them.
    """

    is_training = True
    batch_size = 13
    seq_length = 7
    vocab_size = 99
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    intermediate_size = 37
    type_vocab_size = 16
    num_labels = 3
    num_choices = 4
    causal_lm_class = CLASSES["BertForMaskedLM"]  # what the training test trains

    def get_config(self, **changes: Any) -> BertConfig:
        sizes = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "intermediate_size": self.intermediate_size,
            "type_vocab_size": self.type_vocab_size,
            "max_position_embeddings": 512,
        }
        return BertConfig(**sizes | changes)

    def prepare_config_and_inputs_for_common(self) -> tuple[BertConfig, Inputs]:
        shape = [self.batch_size, self.seq_length]
        inputs = {
            "input_ids": common.ids_tensor(shape, self.vocab_size),
            "attention_mask": common.random_attention_mask(shape),
            "token_type_ids": common.ids_tensor(shape, self.type_vocab_size),
        }
        return self.get_config(), inputs


class BertModelTest(common.ModelTesterMixin, TrainingTesterMixin, unittest.TestCase):
    """The common tests, and a few for BERT alone, which leave out what a model returns for masked tokens."""

    all_model_classes = tuple(CLASSES.values())
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self) -> None:
        super().setUp()
        set_seed(0)
        common.global_rng.seed(0)  # the common tests draw their inputs from it: both libraries get the same
        self.model_tester = BertModelTester()

    def _prepare_for_class(
        self, inputs_dict: Inputs, model_class: type[PreTrainedModel], return_labels: bool = False
    ) -> Inputs:
        inputs: Inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class.__name__ == "BertForPreTraining":
            batch_size, seq_length = self.model_tester.batch_size, self.model_tester.seq_length
            inputs["labels"] = torch.zeros(batch_size, seq_length, dtype=torch.long, device=torch_device)
            inputs["next_sentence_label"] = torch.zeros(batch_size, dtype=torch.long, device=torch_device)
        return inputs

    def make(self, name: str, return_labels: bool = False, **changes: Any) -> tuple[PreTrainedModel, Inputs]:
        """Returns a model in evaluation mode, with weights large enough to matter, and its inputs."""
        _, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        config = self.model_tester.get_config(initializer_range=0.2, **changes)
        model = CLASSES[name](config).to(torch_device).eval()
        return model, self._prepare_for_class(inputs, CLASSES[name], return_labels=return_labels)

    @torch.no_grad()
    def test_base_model_shapes(self) -> None:
        model, inputs = self.make("BertModel")
        tester = self.model_tester
        for given in (["input_ids"], ["input_ids", "token_type_ids"], list(inputs)):
            output = model(**{key: inputs[key] for key in given})
            assert output.last_hidden_state.shape == (tester.batch_size, tester.seq_length, tester.hidden_size)
            assert output.pooler_output.shape == (tester.batch_size, tester.hidden_size)

    @torch.no_grad()
    def test_base_model_without_pooler(self) -> None:
        _, inputs = self.make("BertModel")
        model = CLASSES["BertModel"](self.model_tester.get_config(), add_pooling_layer=False).to(torch_device).eval()
        assert model(**inputs).pooler_output is None

    @parameterized.expand(HEADS)
    def test_head_shapes_and_loss(self, name: str) -> None:
        num_labels = 2 if name == "BertForQuestionAnswering" else self.model_tester.num_labels
        model, inputs = self.make(name, return_labels=True, num_labels=num_labels)
        tester = self.model_tester
        tokens = (tester.batch_size, tester.seq_length)
        shapes = {
            "BertForPreTraining": {
                "prediction_logits": (*tokens, tester.vocab_size),
                "seq_relationship_logits": (tester.batch_size, 2),
            },
            "BertForMaskedLM": {"logits": (*tokens, tester.vocab_size)},
            "BertForNextSentencePrediction": {"logits": (tester.batch_size, 2)},
            "BertForSequenceClassification": {"logits": (tester.batch_size, tester.num_labels)},
            "BertForMultipleChoice": {"logits": (tester.batch_size, tester.num_choices)},
            "BertForTokenClassification": {"logits": (*tokens, tester.num_labels)},
            "BertForQuestionAnswering": {"start_logits": tokens, "end_logits": tokens},
        }
        output = model(**inputs)
        assert {key: value.shape for key, value in output.items() if key != "loss"} == shapes[name]
        assert output.loss.shape == ()
        output.loss.backward()

    @torch.no_grad()
    def test_masked_tokens_do_not_matter(self) -> None:
        model, inputs = self.make("BertModel")
        expected = kept_tokens(model(**inputs).last_hidden_state, inputs)
        inputs["input_ids"] = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], 1)
        torch.testing.assert_close(kept_tokens(model(**inputs).last_hidden_state, inputs), expected)

    @parameterized.expand(["float32", "bool"])
    @torch.no_grad()
    def test_other_masks(self, dtype: str) -> None:
        model, inputs = self.make("BertModel")
        expected = kept_tokens(model(**inputs).last_hidden_state, inputs)
        inputs["attention_mask"] = inputs["attention_mask"].to(getattr(torch, dtype))
        torch.testing.assert_close(kept_tokens(model(**inputs).last_hidden_state, inputs), expected)

    @torch.no_grad()
    def test_full_mask_equals_no_mask(self) -> None:
        model, inputs = self.make("BertModel")
        expected = model(**inputs | {"attention_mask": None})
        output = model(**inputs | {"attention_mask": torch.ones_like(inputs["attention_mask"])})
        torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state)
        torch.testing.assert_close(output.pooler_output, expected.pooler_output)

    @torch.no_grad()
    def test_four_dimensional_mask(self) -> None:
        model, inputs = self.make("BertModel")
        expected = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].bool()[:, None, None, :].expand(-1, 1, self.model_tester.seq_length, -1)
        output = model(**inputs | {"attention_mask": mask}).last_hidden_state
        torch.testing.assert_close(kept_tokens(output, inputs), kept_tokens(expected, inputs))

    @torch.no_grad()
    def test_position_ids(self) -> None:
        model, inputs = self.make("BertModel")
        expected = model(**inputs).last_hidden_state
        positions = torch.arange(self.model_tester.seq_length, device=torch_device)[None]
        torch.testing.assert_close(model(**inputs, position_ids=positions).last_hidden_state, expected)
        assert not torch.allclose(model(**inputs, position_ids=positions + 5).last_hidden_state, expected)

    @torch.no_grad()
    def test_reversed_position_ids(self) -> None:
        model, inputs = self.make("BertModel")
        del inputs["attention_mask"]
        expected = model(**inputs).last_hidden_state
        positions = torch.arange(self.model_tester.seq_length, device=torch_device)[None].flip(1)
        flipped = {key: value.flip(1) for key, value in inputs.items()}
        output = model(**flipped, position_ids=positions).last_hidden_state
        torch.testing.assert_close(output.flip(1), expected)

    @torch.no_grad()
    def test_as_decoder_with_cache(self) -> None:
        model, inputs = self.make("BertModel", is_decoder=True)
        ids = inputs["input_ids"]
        expected = model(ids, use_cache=False).last_hidden_state
        first = model(ids[:, :4], use_cache=True)
        second = model(ids[:, 4:], past_key_values=first.past_key_values, use_cache=True)
        output = torch.cat([first.last_hidden_state, second.last_hidden_state], 1)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)

    @torch.no_grad()
    def test_as_decoder_with_cross_attention(self) -> None:
        model, inputs = self.make("BertModel", is_decoder=True, add_cross_attention=True)
        tester = self.model_tester
        states = common.floats_tensor([tester.batch_size, 5, tester.hidden_size])
        mask = common.random_attention_mask([tester.batch_size, 5])
        output = model(**inputs, encoder_hidden_states=states, encoder_attention_mask=mask).last_hidden_state
        assert output.shape == (tester.batch_size, tester.seq_length, tester.hidden_size)
        assert not torch.allclose(model(**inputs).last_hidden_state, output)

    @parameterized.expand(CLASSES)
    @torch.no_grad()
    def test_export(self, name: str) -> None:
        model, inputs = self.make(name)
        program = torch.export.export(model, (), dict(inputs), strict=False)
        expected, output = model(**inputs), program.module()(**inputs)
        assert output.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(kept_tokens(output[key], inputs), kept_tokens(value, inputs))

    @parameterized.expand(["BertModel", "BertForMaskedLM"])
    def test_compile_without_graph_breaks(self, name: str) -> None:
        model, inputs = self.make(name)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        expected, output = model(**inputs)[0], compiled(**inputs)[0]
        torch.testing.assert_close(kept_tokens(output, inputs), kept_tokens(expected, inputs))
        output.sum().backward()
