import pytest
import torch
from torch import nn

from headway.optim.fira import Fira
from headway.optim.grouping import batches_of_one_shape, hidden_matrices, split_parameters


@pytest.fixture
def llama():
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config)


def test_attention_and_mlp_are_the_hidden_matrices_of_a_transformer(llama):
    chosen = hidden_matrices(llama)
    names = {name for name, p in llama.named_parameters() if id(p) in chosen}
    assert len(names) == len(chosen) == 2 * 7
    assert all(".self_attn." in name or ".mlp." in name for name in names)


def test_the_output_head_is_one_more_on_demand(llama):
    assert hidden_matrices(llama, include_head=True) - hidden_matrices(llama) == {id(llama.lm_head.weight)}


@pytest.mark.parametrize("name", ["classifier", "head", "lm_head", "score"])
def test_a_head_is_known_by_the_name_of_a_module_above_it(name):
    model = nn.ModuleDict({"body": nn.Linear(4, 4), name: nn.Sequential(nn.Linear(4, 2))})
    assert hidden_matrices(model) == {id(model["body"].weight)}


def test_a_weight_tied_to_an_embedding_is_a_head_whatever_its_name():
    model = nn.ModuleDict({"tokens": nn.Embedding(10, 4), "body": nn.Linear(4, 4), "out": nn.Linear(4, 10)})
    model["out"].weight = model["tokens"].weight
    assert hidden_matrices(model) == {id(model["body"].weight)}


def test_named_modules_are_chosen_alone_and_a_named_head_too(llama):
    chosen = hidden_matrices(llama, ["q_proj", "lm_head"])
    names = {name for name, p in llama.named_parameters() if id(p) in chosen}
    assert names == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)} | {"lm_head.weight"}
    assert hidden_matrices(llama, "q_proj") < chosen


def test_names_without_a_linear_layer_are_refused(llama):
    with pytest.raises(ValueError, match="target_modules must name linear layers of the model, got 'norm'"):
        hidden_matrices(llama, "norm")


def test_a_split_keeps_order_and_leaves_frozen_parameters_out(llama):
    llama.model.layers[0].requires_grad_(False)
    chosen, rest = split_parameters(llama)
    trainable = [p for p in llama.parameters() if p.requires_grad]
    assert len(chosen) == 7
    assert {id(p) for p in chosen} | {id(p) for p in rest} == {id(p) for p in trainable}
    for part in (chosen, rest):
        positions = [next(i for i, p in enumerate(trainable) if p is q) for q in part]
        assert positions == sorted(positions)


def test_fira_projects_the_hidden_matrices_that_are_larger_than_its_rank(llama):
    optimizer = Fira.for_model(llama, rank=4, lr=0.01)
    projected, regular = optimizer.param_groups
    assert [projected["projected"], regular["projected"]] == [True, False]
    assert {id(p) for p in projected["params"]} == hidden_matrices(llama)
    assert len(projected["params"]) + len(regular["params"]) == len(list(llama.parameters()))
    only = Fira.for_model(llama, rank=4, target_modules="down_proj").param_groups[0]
    assert [tuple(p.shape) for p in only["params"]] == 2 * [(16, 24)]
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    assert [p is model[0].weight for p in Fira.for_model(model, rank=3).param_groups[0]["params"]] == [True]


def test_batches_hold_one_shape_and_dtype_and_lose_nothing():
    params = [torch.zeros(s, dtype=d) for s in ((2, 3), (3, 2), (2, 3)) for d in (torch.float32, torch.bfloat16)]
    batches = list(batches_of_one_shape(params, elements=12))
    assert sorted(id(p) for batch in batches for p in batch) == sorted(map(id, params))
    assert all(len({(p.shape, p.dtype) for p in batch}) == 1 for batch in batches)
    assert sorted(map(len, batches)) == [1, 1, 2, 2]


def test_a_parameter_larger_than_a_batch_is_a_batch_of_its_own():
    assert [len(batch) for batch in batches_of_one_shape([torch.zeros(3, 3)] * 2, elements=4)] == [1, 1]
