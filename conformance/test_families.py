"""transformers' common model tests on every family, for the classes of transformers or of fastbert.

``FASTBERT_CONFORMANCE`` names the library and the families; of one whose name ends in "-", only the base model and the
masked language model are tested, and not what is slow and alike for all. ``run.py`` starts this file with transformers'
own ``tests`` package first on the path; under plain pytest it does not import.
"""

import importlib
import inspect
import os
import unittest
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, set_seed
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.testing_utils import torch_device

from tests import test_modeling_common as common
from tests.test_training_mixin import TrainingTesterMixin

LIBRARY, *FAMILIES = os.environ.get("FASTBERT_CONFORMANCE", "").split()
if LIBRARY not in ("transformers", "fastbert"):
    raise RuntimeError("FASTBERT_CONFORMANCE has to begin with 'transformers' or 'fastbert', the library to test")

SLOW = ("test_exports", "test_bc_torch_dtype", "test_can_init_all_missing_weights")
Classes = dict[str, type[PreTrainedModel]]
Inputs = dict[str, torch.Tensor]


def classes_of(family: str) -> Classes:
    """All models of a family that transformers has, from the library, the one without a head first."""
    folder = model_type_to_module_name(family.replace("_", "-"))
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{family}")
    stock = {name: getattr(module, name) for name in module.__all__ if not name.endswith("PreTrainedModel")}
    names = [name for name, cls in stock.items() if issubclass(cls, PreTrainedModel)]
    names.sort(key=lambda name: (not name.removesuffix("LMHeadModel").endswith("Model"), name))
    classes = {name: getattr(importlib.import_module(LIBRARY), name) for name in names}
    for name, cls in classes.items():
        if cls.__name__ != name or (cls is stock[name]) != (LIBRARY == "transformers"):
            raise RuntimeError(f"{LIBRARY}.{name} is {cls}: not a class of its own under that name")
    return classes


def kept_tokens(values: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """Returns one row for each token that the mask keeps, or all values if they are not one for each token."""
    mask = inputs["attention_mask"].bool()
    return values[mask] if values.shape[:2] == mask.shape else values


class ModelTester:
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

    def __init__(self, classes: Classes) -> None:
        self.classes = classes
        self.base, *heads = classes
        self.causal_lm_class = next(classes[name] for name in heads if name.endswith("MaskedLM"))  # what is trained

    def get_config(self, **changes: Any) -> PreTrainedConfig:
        config_class = self.classes[self.base].config_class
        assert config_class is not None
        usual = config_class()
        sizes = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "hidden_dim" if hasattr(usual, "hidden_dim") else "intermediate_size": self.intermediate_size,
            "type_vocab_size": self.type_vocab_size,
            "max_position_embeddings": 512,
            "embedding_size": 16,
            "use_task_id": True,
        }
        return config_class(**{name: size for name, size in sizes.items() if hasattr(usual, name)} | changes)

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, Inputs]:
        shape = [self.batch_size, self.seq_length]
        config = self.get_config()
        mask = common.random_attention_mask(shape)
        ids = common.ids_tensor(shape, self.vocab_size).where(mask != 0, config.pad_token_id)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if hasattr(config, "type_vocab_size"):
            inputs["token_type_ids"] = common.ids_tensor(shape, self.type_vocab_size)
        return config, inputs


class FamilyTest(common.ModelTesterMixin):
    """What is tested of a family besides the common tests, which leave out what a model returns for masked tokens."""

    classes: Classes
    test_can_init_all_missing_weights_before_2023 = True
    test_generation_tester_mixin_inheritance = None  # it asks for tests of generation, and these here are none

    def setUp(self) -> None:
        super().setUp()
        set_seed(0)
        common.global_rng.seed(0)  # the common tests draw their inputs from it: both libraries get the same
        self.model_tester = ModelTester(self.classes)
        self.base = self.model_tester.base

    def _prepare_for_class(
        self, inputs_dict: Inputs, model_class: type[PreTrainedModel], return_labels: bool = False
    ) -> Inputs:
        inputs: Inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class.__name__.endswith("ForPreTraining"):
            batch_size, seq_length = self.model_tester.batch_size, self.model_tester.seq_length
            inputs["labels"] = torch.zeros(batch_size, seq_length, dtype=torch.long, device=torch_device)
            for name in {"next_sentence_label", "sentence_order_label"} & inspect.signature(
                model_class.forward
            ).parameters.keys():
                inputs[name] = torch.zeros(batch_size, dtype=torch.long, device=torch_device)
        return inputs

    def make(self, name: str, return_labels: bool = False, **changes: Any) -> tuple[PreTrainedModel, Inputs]:
        """Returns a model in evaluation mode, with weights large enough to matter, and its inputs."""
        _, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        config = self.model_tester.get_config(initializer_range=0.2, **changes)
        model = self.classes[name](config).to(torch_device).eval()
        return model, self._prepare_for_class(inputs, self.classes[name], return_labels=return_labels)

    @torch.no_grad()
    def test_base_model_shapes(self) -> None:
        model, inputs = self.make(self.base)
        tester = self.model_tester
        for given in ({"input_ids"}, {"input_ids", "token_type_ids"} & inputs.keys(), inputs):
            output = model(**{key: inputs[key] for key in given})
            assert output.last_hidden_state.shape == (tester.batch_size, tester.seq_length, tester.hidden_size)
            if "pooler_output" in output:
                assert output.pooler_output.shape == (tester.batch_size, tester.hidden_size)

    @torch.no_grad()
    def test_base_model_without_pooler(self) -> None:
        if "add_pooling_layer" not in inspect.signature(self.classes[self.base].__init__).parameters:
            self.skipTest("it has none, or always one")
        _, inputs = self.make(self.base)
        model = self.classes[self.base](self.model_tester.get_config(), add_pooling_layer=False).to(torch_device).eval()
        assert model(**inputs).pooler_output is None

    def test_heads_losses(self) -> None:
        for name in [*self.classes][1:]:
            num_labels = 2 if name.endswith(("QuestionAnswering", "PreTraining")) else self.model_tester.num_labels
            model, inputs = self.make(name, return_labels=True, num_labels=num_labels)
            output = model(**inputs)
            assert output.loss.shape == ()
            output.loss.backward()

    @torch.no_grad()
    def test_masked_tokens_do_not_matter(self) -> None:
        model, inputs = self.make(self.base)
        inputs["input_ids"].clamp_(min=5)  # no id that is for padding: RoBERTa's positions are not counted over it
        expected = kept_tokens(model(**inputs).last_hidden_state, inputs)
        inputs["input_ids"] = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], 7)
        torch.testing.assert_close(kept_tokens(model(**inputs).last_hidden_state, inputs), expected)

    @torch.no_grad()
    def test_other_masks(self) -> None:
        model, inputs = self.make(self.base)
        expected = kept_tokens(model(**inputs).last_hidden_state, inputs)
        for dtype in (torch.float32, torch.bool):
            output = model(**inputs | {"attention_mask": inputs["attention_mask"].to(dtype)})
            torch.testing.assert_close(kept_tokens(output.last_hidden_state, inputs), expected)

    @torch.no_grad()
    def test_full_mask_equals_no_mask(self) -> None:
        model, inputs = self.make(self.base)
        expected = model(**inputs | {"attention_mask": None})
        output = model(**inputs | {"attention_mask": torch.ones_like(inputs["attention_mask"])})
        for name, values in expected.items():
            torch.testing.assert_close(output[name], values)

    @torch.no_grad()
    def test_four_dimensional_mask(self) -> None:
        model, inputs = self.make(self.base)
        expected = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].bool()[:, None, None, :].expand(-1, 1, self.model_tester.seq_length, -1)
        output = model(**inputs | {"attention_mask": mask}).last_hidden_state
        torch.testing.assert_close(kept_tokens(output, inputs), kept_tokens(expected, inputs))

    @torch.no_grad()
    def test_position_ids(self) -> None:
        model, inputs = self.make(self.base)
        inputs["input_ids"].clamp_(min=5)
        expected = model(**inputs).last_hidden_state
        counted_over_ids = hasattr(model.embeddings, "padding_idx")
        first = model.config.pad_token_id + 1 if counted_over_ids else 0
        positions = first + torch.arange(self.model_tester.seq_length, device=torch_device)[None]
        torch.testing.assert_close(model(**inputs, position_ids=positions).last_hidden_state, expected)
        assert not torch.allclose(model(**inputs, position_ids=positions + 5).last_hidden_state, expected)

    @torch.no_grad()
    def test_reversed_position_ids(self) -> None:
        model, inputs = self.make(self.base)
        del inputs["attention_mask"]
        positions = 5 + torch.arange(self.model_tester.seq_length, device=torch_device)[None]
        expected = model(**inputs, position_ids=positions).last_hidden_state
        flipped = {key: value.flip(1) for key, value in inputs.items()}
        output = model(**flipped, position_ids=positions.flip(1)).last_hidden_state
        torch.testing.assert_close(output.flip(1), expected)

    @torch.no_grad()
    def test_as_decoder(self) -> None:
        if not hasattr(self.model_tester.get_config(), "is_decoder"):
            self.skipTest("it is never a decoder")
        model, inputs = self.make(self.base, is_decoder=True)
        ids = inputs["input_ids"].clamp_(min=5)
        expected = model(ids, use_cache=False).last_hidden_state
        first = model(ids[:, :4], use_cache=True)
        second = model(ids[:, 4:], past_key_values=first.past_key_values, use_cache=True)
        output = torch.cat([first.last_hidden_state, second.last_hidden_state], 1)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)

        model, inputs = self.make(self.base, is_decoder=True, add_cross_attention=True)
        tester = self.model_tester
        states = common.floats_tensor([tester.batch_size, 5, tester.hidden_size])
        mask = common.random_attention_mask([tester.batch_size, 5])
        output = model(**inputs, encoder_hidden_states=states, encoder_attention_mask=mask).last_hidden_state
        assert output.shape == (tester.batch_size, tester.seq_length, tester.hidden_size)
        assert not torch.allclose(model(**inputs).last_hidden_state, output)

    @torch.no_grad()
    def test_exports(self) -> None:
        for name in self.classes:
            model, inputs = self.make(name)
            program = torch.export.export(model, (), dict(inputs), strict=False)
            expected, output = model(**inputs), program.module()(**inputs)
            assert output.keys() == expected.keys()
            for key, value in expected.items():
                torch.testing.assert_close(kept_tokens(output[key], inputs), kept_tokens(value, inputs))

    def test_compile_without_graph_breaks(self) -> None:
        if self.base != "BertModel":
            self.skipTest("BERT's stands for all")
        for name in ("BertModel", "BertForMaskedLM"):
            model, inputs = self.make(name)
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            expected, output = model(**inputs)[0], compiled(**inputs)[0]
            torch.testing.assert_close(kept_tokens(output, inputs), kept_tokens(expected, inputs))
            output.sum().backward()


def case_of(family: str) -> type[unittest.TestCase]:
    """The tests of a family, under the name that transformers' own have."""
    classes = classes_of(family.removesuffix("-"))
    name, brief = next(iter(classes)) + "Test", family.endswith("-")
    if brief:
        classes = {n: cls for n, cls in classes.items() if n.endswith(("Model", "ForMaskedLM")) and "LMHead" not in n}
    own = {"classes": classes, "all_model_classes": tuple(classes.values()), "__module__": __name__}
    own |= dict.fromkeys(SLOW if brief else (), None)
    return type(name, (FamilyTest, *(() if brief else (TrainingTesterMixin,)), unittest.TestCase), own)


globals().update({case.__name__: case for case in map(case_of, FAMILIES)})
