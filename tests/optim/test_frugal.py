import copy
import io
import json
from pathlib import Path

import pytest
import torch
from tests.ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from headway.optim import Frugal, frugal_param_groups
from headway.optim.subspace import COORDINATE_PROJECTIONS, TENSOR_PROJECTIONS
from headway.testing import check_optimizer

COORDINATES = ["blocks", *COORDINATE_PROJECTIONS]
SHAPES = [(6, 4), (4, 6), (5, 5), (8, 3)]


def weights(shapes=SHAPES, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_gradients(parameters, step):
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def train(optimizer, parameters, steps, start=0):
    for step in range(start, start + steps):
        set_gradients(parameters, step)
        optimizer.step()


def projected(parameters, **hyperparameters):
    return Frugal([{"params": parameters, "projected": True}], **hyperparameters)


def assert_all_equal(first, second):
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "hyperparameters",
    [
        {"projection": "columns", "update_gap": 2},
        {"projection": "randk", "on_change": "reproject", "update_gap": 2},
        {"projection": "svd", "on_change": "keep", "update_gap": 2},
        {"inner": "lion", "density": 0.5, "state_free": "sgd"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:density")
def test_contract_beyond_the_defaults(hyperparameters):
    check_optimizer(Frugal, **hyperparameters)


@pytest.mark.parametrize("projection", COORDINATES)
def test_density_one_with_coordinates_equals_adamw_to_the_bit(projection):
    ours, theirs = weights(), weights()
    train(projected(ours, lr=0.01, weight_decay=0.1, projection=projection, density=1.0), ours, 12)
    train(torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1), theirs, 12)
    assert_all_equal(ours, theirs)


@pytest.mark.parametrize("projection", ["svd", "random"])
def test_density_one_with_a_basis_has_no_state_free_step(projection):
    runs = []
    for state_free in ("sign", "none"):
        parameters = weights()
        train(projected(parameters, projection=projection, density=1.0, state_free=state_free), parameters, 5)
        runs.append(parameters)
    assert_all_equal(*runs)


@pytest.mark.parametrize("projection", ["blocks", *TENSOR_PROJECTIONS])
def test_density_zero_equals_sign_descent_with_decoupled_decay_and_holds_no_moments(projection):
    ours, theirs = weights(), weights()
    optimizer = projected(ours, lr=0.01, weight_decay=0.1, projection=projection, density=0.0)
    train(optimizer, ours, 6)
    for step in range(6):
        set_gradients(theirs, step)
        for parameter in theirs:
            parameter.data = parameter.data * (1 - 0.01 * 0.1) - 0.01 * parameter.grad.sign()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert optimizer.state_bytes() == 0


def test_regular_groups_equal_adamw_to_the_bit_whatever_the_projected_ones_do():
    ours, theirs = weights(), weights()
    groups = [{"params": ours[:2], "projected": True}, {"params": ours[2:], "projected": False}]
    train(Frugal(groups, lr=0.01, weight_decay=0.1, projection="columns", proj_lr_scale=3.0), ours, 8)
    train(torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1), theirs, 8)
    assert_all_equal(ours[2:], theirs[2:])
    assert not torch.equal(ours[0], theirs[0])


def test_unmarked_groups_project_matrices_and_keep_full_state_for_the_rest():
    parameters = weights([(6, 4), (7,), ()])
    optimizer = Frugal(parameters, projection="columns", density=0.5)
    train(optimizer, parameters, 1)
    assert [tuple(optimizer.state[p]["exp_avg"].shape) for p in parameters] == [(6, 2), (7,), ()]
    assert "projector" not in optimizer.state[parameters[1]]


def galore_adamw(weight, steps, rank, gap, lr, alpha, betas=(0.9, 0.999), eps=1e-8):
    """GaLore with Adam as its paper states it: moments in the subspace, carried over when it changes."""
    M = V = 0
    for step in range(steps):
        set_gradients([weight], step)
        G = weight.grad
        if step % gap == 0:
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)
            P = Vh[:rank].T if G.shape[0] >= G.shape[1] else U[:, :rank]
        R = G @ P if G.shape[0] >= G.shape[1] else P.T @ G
        M = betas[0] * M + (1 - betas[0]) * R
        V = betas[1] * V + (1 - betas[1]) * R**2
        N = (M / (1 - betas[0] ** (step + 1))) / ((V / (1 - betas[1] ** (step + 1))).sqrt() + eps)
        weight.data -= lr * alpha * (N @ P.T if G.shape[0] >= G.shape[1] else P @ N)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_svd_kept_state_and_no_free_rule_equals_galore_adamw_with_scale(shape):
    ours, theirs = weights([shape]), weights([shape])
    optimizer = projected(
        ours, lr=0.01, projection="svd", density=0.5, update_gap=3,
        on_change="keep", state_free="none", proj_lr_scale=0.25,
    )  # fmt: skip
    train(optimizer, ours, 8)
    galore_adamw(theirs[0], steps=8, rank=2, gap=3, lr=0.01, alpha=0.25)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)


def test_blocks_without_free_rule_equal_adam_on_one_block_after_the_other():
    ours, theirs = weights(), weights()
    optimizer = projected(ours, lr=0.01, density=0.25, update_gap=3, state_free="none", block_order="descending")
    train(optimizer, ours, 12)
    for turn, block in enumerate(reversed(theirs)):
        adam = torch.optim.AdamW([block], lr=0.01, weight_decay=0.0)
        for step in range(3 * turn, 3 * turn + 3):
            set_gradients(theirs, step)
            adam.step()
    assert_all_equal(ours, theirs)


GOLDEN = json.loads((Path(__file__).parent / "data" / "frugal_official.json").read_text())["final_weights"]


@pytest.mark.parametrize("name", GOLDEN)
def test_seven_steps_equal_the_authors_code(name):
    """The data file names the commit; weights and gradients are the formulas below, gap 3, density 1/2."""
    shapes = [(4, 3), (3, 5), (2, 2), (5, 2)]

    def line(shape):
        return torch.arange(shape[0] * shape[1], dtype=torch.float32)

    parameters = [nn.Parameter(torch.sin(line(s) * 0.7 + i).reshape(s)) for i, s in enumerate(shapes)]
    options = {"update_gap": 3, "density": 0.5, "free_lr_scale": 0.5, "proj_lr_scale": 2.0, "weight_decay": 0.1}
    blocks = name.startswith("blocks")
    if blocks:
        options |= {"projection": "blocks", "block_order": name.split("-")[1]}
        groups = [{"params": parameters, "projected": True}]
    else:
        options |= {"projection": "svd"}
        groups = [{"params": parameters[:3], "projected": True}, {"params": parameters[3:], "projected": False}]
    if name == "svd-keep-none":
        options |= {"on_change": "keep", "state_free": "none"}
    if name.endswith("sgd"):
        options |= {"state_free": "sgd"}
    if name.endswith("lion"):
        options |= {"inner": "lion", "betas": (0.9, 0.99)}
    optimizer = Frugal(groups, lr=0.01, **options)
    for step in range(7):
        for i, parameter in enumerate(parameters):
            parameter.grad = torch.cos(line(shapes[i]) ** 1.3 * 0.9 + i + 1.7 * step).reshape(shapes[i])
        optimizer.step()
    for parameter, expected in zip(parameters, GOLDEN[name], strict=True):
        torch.testing.assert_close(parameter.detach().flatten(), torch.tensor(expected), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("projection", TENSOR_PROJECTIONS)
def test_subspace_changes_at_the_first_step_and_every_gap_and_restarts_the_count(projection):
    parameters = weights([(30, 20)])
    optimizer = projected(parameters, projection=projection, density=0.5, update_gap=3)
    counts, changed, last = [], [], None
    for step in range(7):
        train(optimizer, parameters, 1, start=step)
        state = optimizer.state[parameters[0]]
        counts.append(state["step"])
        changed.append(last is None or not torch.equal(last, state["projector"]))
        last = state["projector"].clone()
    assert counts == [1, 2, 3, 1, 2, 3, 1]
    assert changed == [True, False, False, True, False, False, True]


def test_bias_correction_restarts_with_the_subspace():
    """With a constant gradient an Adam step is lr * sign(g) exactly when its bias correction is right."""
    parameter = nn.Parameter(torch.zeros(8, 8))
    optimizer = projected([parameter], lr=0.5, eps=1e-12, projection="columns", density=0.5, update_gap=2)
    for step in range(1, 6):
        parameter.grad = torch.ones(8, 8)
        optimizer.step()
        torch.testing.assert_close(parameter.detach(), torch.full((8, 8), -0.5 * step), rtol=1e-5, atol=0)


@pytest.mark.parametrize("projection", ["columns", "rows", "randk", "randperm"])
def test_reprojection_corrects_each_entry_for_its_own_age(projection):
    parameter = nn.Parameter(torch.zeros(8, 8))
    optimizer = projected(
        [parameter], lr=0.5, eps=1e-12, projection=projection, density=0.5, update_gap=2, on_change="reproject"
    )
    ages = []
    for step in range(1, 8):
        parameter.grad = torch.ones(8, 8)
        optimizer.step()
        torch.testing.assert_close(parameter.detach(), torch.full((8, 8), -0.5 * step), rtol=1e-5, atol=0)
        ages.append(set(optimizer.state[parameter]["age"].flatten().tolist()))
    assert ages[:2] == [{1.0}, {2.0}]
    assert ages[2] == {1.0, 3.0}  # some entries stayed, some are new


@pytest.mark.parametrize("inner", ["adamw", "sgdm", "lion"])
def test_reprojection_at_full_density_loses_nothing(inner):
    runs = []
    for gap in (2, 100):
        parameters = weights()
        options = {"projection": "columns", "density": 1.0, "on_change": "reproject", "inner": inner}
        train(projected(parameters, lr=0.01, update_gap=gap, **options), parameters, 7)
        runs.append(parameters)
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("on_change", "counts"), [("reset", [1, 2, 1, 2]), ("keep", [1, 2, 3, 4])])
def test_a_block_that_stays_active_keeps_its_state_unless_reset(on_change, counts):
    parameters = weights()
    optimizer = projected(parameters, density=1.0, update_gap=2, on_change=on_change)
    seen = []
    for step in range(4):
        train(optimizer, parameters, 1, start=step)
        seen.append(optimizer.state[parameters[0]]["step"])
    assert seen == counts


def test_one_counter_per_group_drives_the_gap_when_gradients_are_missing():
    parameters = weights([(6, 4), (6, 4)])
    optimizer = projected(parameters, projection="svd", density=0.5, update_gap=4)
    for step in range(9):
        set_gradients(parameters, step)
        if step in (4, 5):  # the second parameter misses the change and catches up at its next gradient
            parameters[1].grad = None
        optimizer.step()
        if step == 6:
            assert [optimizer.state[p]["step"] for p in parameters] == [3, 1]
            assert [optimizer.state[p]["change"] for p in parameters] == [2, 2]
    assert [optimizer.state[p]["step"] for p in parameters] == [1, 1]


def test_inactive_blocks_hold_no_state_and_state_bytes_is_the_active_moments():
    parameters = weights([(8, 8)] * 8)
    optimizer = projected(parameters, density=0.25, update_gap=2)
    active = set()
    for step in range(60):
        train(optimizer, parameters, 1, start=step)
        assert len(optimizer.state) == 2
        assert optimizer.state_bytes() == 2 * 2 * 64 * 4
        active |= {index for index, parameter in enumerate(parameters) if parameter in optimizer.state}
    assert active == set(range(8))


@pytest.mark.parametrize(
    ("projection", "expected"),
    [
        ("columns", 2 * 4 * 64 * 12 + 8 * 12),
        ("rows", 2 * 4 * 16 * 48 + 8 * 16),
        ("randk", (2 * 4 + 4) * 768),
        ("randperm", 2 * 4 * 64 * 12 + 8 * 12),
        ("svd", 2 * 4 * 64 * 12 + 4 * 12 * 48),
        ("random", 2 * 4 * 64 * 12 + 4 * 12 * 48),
    ],
)
def test_state_bytes_are_two_moments_of_the_subspace_and_the_projector(projection, expected):
    parameters = weights([(64, 48)])
    optimizer = projected(parameters, projection=projection, density=0.25)
    train(optimizer, parameters, 1)
    assert optimizer.state_bytes() == expected


@pytest.mark.parametrize("projection", ["blocks", *TENSOR_PROJECTIONS])
@pytest.mark.parametrize("inner", ["adamw", "sgdm", "lion"])
def test_zero_gradients_without_decay_move_nothing(projection, inner):
    parameters = weights()
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = projected(parameters, projection=projection, inner=inner, density=0.5, update_gap=2)
    for _ in range(5):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert_all_equal(before, parameters)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_sign_does_not_act_on_the_rounding_noise_of_a_low_rank_gradient(shape):
    """A gradient of rank 3 lies in the top 10 directions: without noise, only the Adam part is left."""
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(shape[0], 3, generator=generator) @ torch.randn(3, shape[1], generator=generator)
    runs = []
    for state_free in ("sign", "none"):
        parameter = nn.Parameter(torch.zeros(shape))
        parameter.grad = G
        projected([parameter], projection="svd", density=0.25, state_free=state_free).step()
        runs.append(parameter.detach())
    assert torch.equal(*runs)
    assert runs[0].any()


def test_sgdm_is_torch_sgd_with_momentum_on_full_density():
    ours, theirs = weights(), weights()
    train(projected(ours, lr=0.01, inner="sgdm", density=1.0), ours, 6)
    train(torch.optim.SGD(theirs, lr=0.01, momentum=0.9), theirs, 6)
    assert_all_equal(ours, theirs)


def test_sgd_as_both_rules_is_plain_sgd():
    ours, theirs = weights(), weights()
    options = {"inner": "sgdm", "betas": (0.0, 0.0), "state_free": "sgd", "projection": "svd", "density": 0.5}
    train(projected(ours, lr=0.01, **options), ours, 6)
    train(torch.optim.SGD(theirs, lr=0.01), theirs, 6)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("projection", ["columns", "randk", "svd"])
def test_convolutions_are_projected_as_matrices(projection):
    flat, conv = weights([(6, 12)]), weights([(6, 3, 2, 2)])
    for parameters in (flat, conv):
        optimizer = projected(parameters, projection=projection, density=0.5)
        train(optimizer, parameters, 4)
    assert torch.equal(flat[0].view(6, 3, 2, 2), conv[0])


@pytest.mark.parametrize("projection", ["blocks", "columns", "randk", "svd"])
def test_bfloat16_moments_and_indices_survive_saving_and_loading(projection):
    def build():
        parameters = weights(dtype=torch.bfloat16)
        return parameters, projected(parameters, projection=projection, density=0.5, update_gap=3)

    parameters, optimizer = build()
    train(optimizer, parameters, 4)
    buffer = io.BytesIO()
    torch.save({"weights": parameters, "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)

    resumed, fresh = build()
    for parameter, value in zip(resumed, saved["weights"], strict=True):
        parameter.data.copy_(value)
    fresh.load_state_dict(saved["optimizer"])
    moments = [state["exp_avg"] for state in fresh.state.values()]
    assert moments
    assert {moment.dtype for moment in moments} == {torch.float32}
    assert fresh.state_bytes() == optimizer.state_bytes()
    # Through two more changes: equal subspaces prove that seed and counters were saved too.
    train(optimizer, parameters, 6, start=4)
    train(fresh, resumed, 6, start=4)
    assert_all_equal(parameters, resumed)


def test_loading_copies_the_state():
    parameters, others = weights(), weights()
    optimizer, other = projected(parameters, density=1.0), projected(others, density=1.0)
    train(optimizer, parameters, 2)
    other.load_state_dict(optimizer.state_dict())
    before = copy.deepcopy(optimizer.state_dict()["state"][0]["exp_avg"])
    train(other, others, 2)
    assert torch.equal(before, optimizer.state[parameters[0]]["exp_avg"])


def test_generator_gives_the_seed_and_the_default_is_fixed():
    def indices(generator=None):
        parameters = weights([(30, 40)])
        optimizer = projected(parameters, projection="columns", density=0.5, generator=generator)
        train(optimizer, parameters, 1)
        return optimizer.state[parameters[0]]["projector"].tolist()

    assert indices() == indices()
    assert indices(torch.Generator().manual_seed(5)) == indices(torch.Generator().manual_seed(5))
    assert indices(torch.Generator().manual_seed(5)) != indices()


def test_parameters_of_one_shape_get_different_subspaces():
    parameters = weights([(30, 40)] * 2)
    optimizer = projected(parameters, projection="columns", density=0.5)
    train(optimizer, parameters, 1)
    first, second = (optimizer.state[parameter]["projector"] for parameter in parameters)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_refused_by_name_and_changes_nothing(bad):
    parameters = weights()
    optimizer = projected(parameters, projection="columns", density=0.5, weight_decay=0.1)
    train(optimizer, parameters, 2)
    before, saved = [p.detach().clone() for p in parameters], copy.deepcopy(optimizer.state_dict())
    set_gradients(parameters, 2)
    parameters[2].grad[0, 0] = bad
    with pytest.raises(FloatingPointError, match="Frugal: the gradient of parameter 2 of group 0"):
        optimizer.step()
    assert_all_equal(before, parameters)
    assert saved["param_groups"] == optimizer.state_dict()["param_groups"]
    for index, state in saved["state"].items():
        assert_all_equal([state["exp_avg"]], [optimizer.state_dict()["state"][index]["exp_avg"]])


def test_bad_values_are_refused_with_their_name():
    parameters = weights()
    with pytest.raises(ValueError, match=r"density must be in \[0, 1\], got 1.5"):
        Frugal(parameters, density=1.5)
    with pytest.raises(ValueError, match=r"update_gap must be a whole number >= 1, got 0"):
        Frugal([{"params": parameters, "update_gap": 0}])
    with pytest.raises(ValueError, match=r"projected must be one of None, False, True, got 'yes'"):
        Frugal([{"params": parameters, "projected": "yes"}])
    with pytest.raises(ValueError, match=r"mirror.*even number.*got 3"):
        Frugal(weights([(2, 2)] * 6), density=0.5, block_order="mirror")
    with pytest.raises(ValueError, match=r"on_change.*'svd', got 'reproject'"):
        Frugal(parameters, projection="svd", on_change="reproject")


@pytest.mark.parametrize("projection", TENSOR_PROJECTIONS)
def test_vectors_are_refused_except_by_single_entries(projection):
    if projection == "randk":
        parameters = weights([(9,)])
        optimizer = projected(parameters, projection=projection, density=0.5)
        train(optimizer, parameters, 2)
        assert optimizer.state[parameters[0]]["exp_avg"].shape == (4,)
    else:
        with pytest.raises(ValueError, match=r"two or more dimensions.*got shape \(9,\)"):
            projected(weights([(9,)]), projection=projection)


def test_a_refused_group_is_not_added():
    optimizer = Frugal(weights(), projection="svd")
    with pytest.raises(ValueError, match="two or more"):
        optimizer.add_param_group({"params": weights([(9,)]), "projected": True})
    assert len(optimizer.param_groups) == 1


def test_a_density_that_leaves_no_block_active_is_announced():
    with pytest.warns(UserWarning, match=r"density 0.25 of 1 projected tensors rounds to no active block"):
        Frugal(weights([(4, 4)]))


def llama(tied):
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def names(model, group):
    ids = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in ids}


@pytest.mark.parametrize("tied", [True, False])
def test_llama_groups_are_attention_and_mlp_against_the_rest(tied):
    model = llama(tied)
    groups = frugal_param_groups(model)
    assert [group["projected"] for group in groups] == [True, False]
    assert all(".self_attn." in name or ".mlp." in name for name in names(model, groups[0]))
    assert len(groups[0]["params"]) == 14
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))

    everything = frugal_param_groups(model, include_embeddings=True, include_norms=True, include_head=True)
    assert len(everything) == 1
    head = frugal_param_groups(model, include_head=True)[0]
    assert names(model, head) - names(model, groups[0]) == {"model.embed_tokens.weight" if tied else "lm_head.weight"}
    attention = frugal_param_groups(model, target_modules=["q_proj", "v_proj"])[0]
    assert len(attention["params"]) == 4


@pytest.mark.parametrize("tied", [True, False])
def test_llama_trains_with_a_fraction_of_adamws_state(tied):
    model = llama(tied)
    optimizer = Frugal.for_model(model, lr=1e-2, projection="columns", density=0.25, update_gap=4)
    tokens = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(10):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    linear, rest = (sum(p.numel() for p in group["params"]) for group in optimizer.param_groups)
    assert optimizer.state_bytes() <= 8 * (0.25 * linear + rest) + 8 * 14 * 24


def test_plain_modules_are_grouped_by_layer_type_and_frozen_parameters_left_out():
    model = nn.Sequential()
    model.add_module("embed", nn.Embedding(10, 4))
    model.add_module("first", nn.Linear(4, 6))
    model.add_module("norm", nn.LayerNorm(6))
    model.add_module("frozen", nn.Linear(6, 6).requires_grad_(False))
    model.add_module("classifier", nn.Linear(6, 3))
    groups = frugal_param_groups(model)
    assert names(model, groups[0]) == {"first.weight"}
    assert names(model, groups[1]) == {
        "embed.weight", "first.bias", "norm.weight", "norm.bias", "classifier.weight", "classifier.bias",
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"target_modules must name linear layers.*'attention'"):
        frugal_param_groups(model, target_modules="attention")


def train_replica(rank, directory, projections):
    torch.manual_seed(rank)  # the ranks' own random streams differ; the drawn subspaces must not
    results = {}
    for projection in projections:
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
        model = DistributedDataParallel(model)
        optimizer = Frugal(model.parameters(), lr=0.01, projection=projection, density=0.5, update_gap=2)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(4, 6)).square().mean().backward()
            optimizer.step()
        results[projection] = [list(model.parameters()), optimizer.state_dict()["state"]]
    torch.save(results, f"{directory}/{rank}.pt")


def test_two_processes_draw_the_same_subspaces(tmp_path):
    projections = ["blocks", *TENSOR_PROJECTIONS]
    run_ranks(train_replica, tmp_path, projections)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for projection in projections:
        (first, first_state), (second, second_state) = (result[projection] for result in results)
        assert_all_equal(first, second)
        assert first_state.keys() == second_state.keys()
        for index, state in first_state.items():
            assert state.keys() == second_state[index].keys()
            for name, value in state.items():
                other = second_state[index][name]
                assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
