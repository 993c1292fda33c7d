import json
import math
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headway.budget.inference_plan import pass_at_k, plan_inference
from headway.budget.kinetics import (
    BlockTopK,
    Dense,
    KineticsCostModel,
    ModelSpec,
    TopK,
    device_intensity,
    sparse_decode_mask,
)
from headway.plots import Panel
from headway.testing.planners import check_planner

QWEN_06 = ModelSpec("Qwen3-0.6B", 0.752e9, layers=28, query_heads=16, kv_heads=8, head_dim=128)
QWEN_14 = ModelSpec("Qwen3-14B", 14.77e9, layers=40, query_heads=40, kv_heads=8, head_dim=128)
TINY = ModelSpec("tiny", 1000, layers=2, query_heads=6, kv_heads=3, head_dim=4)
FLOPS_ONLY = KineticsCostModel(intensity=0)

lengths = st.integers(1, 300)
prompts = st.integers(0, 300)
trial_counts = st.integers(1, 9)
policies = st.sampled_from(
    [Dense(), TopK(1), TopK(37), TopK(512), BlockTopK(0, 16, 2), BlockTopK(5, 7, 3), BlockTopK(0, 1, 600)]
)


def samples(question, model, correct, generated=1000, policy="dense"):
    """One record per entry of `correct`."""
    return [
        {"question": question, "model": model, "policy": policy, "correct": c, "generated_tokens": generated}
        for c in correct
    ]


def random_records(seed, questions=4, count=6):
    generator = np.random.default_rng(seed)
    return [
        {
            "question": f"q{question}",
            "model": model,
            "policy": policy,
            "correct": bool(generator.random() < skill * generator.random()),
            "generated_tokens": int(generator.integers(50, 3000)),
            "prompt_tokens": 100 + question,
        }
        for question in range(questions)
        for model, skill in ((TINY, 0.6), (QWEN_06, 1.0))
        for policy in (Dense(), TopK(128), BlockTopK(0, 16, 8))
        for _ in range(count)
    ]


# The contract of the role.


def test_cost_keeps_the_contract_of_planners():
    check_planner(KineticsCostModel().cost, predict=(QWEN_06, 256, 1024, 4, TopK(128)))


def test_plan_keeps_the_contract_of_planners():
    check_planner(plan_inference, predict=(random_records(0), [1e9, 1e12, 1e15]))


def test_arguments_outside_their_constraints_are_refused():
    for name, constraint in KineticsCostModel.constraints.items():
        for value in constraint.outside():
            with pytest.raises(ValueError, match=name):
                KineticsCostModel(**{name: value})
    for made in (TINY, TopK(128), BlockTopK(0, 16, 8)):
        for name, constraint in made.constraints.items():
            for value in constraint.outside():
                with pytest.raises(ValueError, match=name):
                    replace(made, **{name: value})


# Costs.


@given(prompt=prompts, generated=lengths)
def test_dense_cost_equals_the_sum_over_steps(prompt, generated):
    cost = KineticsCostModel().cost(TINY, prompt, generated)
    read = sum(Fraction(prompt + t) + Fraction(1, 2) for t in range(generated))
    assert cost.compute_flops == pytest.approx(float(2 * 1000 * generated + 4 * read * 48), rel=1e-12)
    assert cost.memory_bytes == pytest.approx(float(2 * 2 * read * 24), rel=1e-12)


@given(prompt=prompts, generated=lengths, budget=st.integers(1, 700), trials=trial_counts)
def test_sparse_cost_equals_the_sum_over_steps(prompt, generated, budget, trials):
    cost = KineticsCostModel().cost(TINY, prompt, generated, trials, TopK(budget))
    read = sum(min(Fraction(budget), prompt + t + Fraction(1, 2)) for t in range(generated))
    assert cost.compute_flops == pytest.approx(float(trials * (2 * 1000 * generated + 4 * read * 48)), rel=1e-12)
    assert cost.memory_bytes == pytest.approx(float(trials * 4 * read * 24), rel=1e-12)


@given(prompt=prompts, generated=lengths, trials=trial_counts)
def test_dense_cost_equals_the_form_of_the_paper(prompt, generated, trials):
    P, N, L, r, D, I = TINY.active_parameters, trials, generated, 2, 2 * TINY.kv_width, 562.5
    flops = 2 * N * P * L + 2 * r * N * prompt * D * L + r * N * D * L**2
    expected = flops + I * (2 * prompt * D * L + N * D * L**2)
    assert KineticsCostModel().cost(TINY, prompt, generated, trials).eflops == pytest.approx(expected, rel=1e-12)


@given(prompt=prompts, generated=lengths, extra=st.integers(0, 50))
def test_a_budget_of_the_whole_cache_equals_dense(prompt, generated, extra):
    model = KineticsCostModel()
    dense = model.cost(TINY, prompt, generated)
    assert model.cost(TINY, prompt, generated, policy=TopK(prompt + generated + extra)) == dense
    block = model.cost(TINY, prompt, generated, policy=BlockTopK(prompt + generated, 3, 1))
    search = (2 * prompt + generated) // 3 * generated
    assert block.compute_flops - dense.compute_flops == pytest.approx(search * 48)
    assert block.memory_bytes - dense.memory_bytes == pytest.approx(search * 24)


def test_block_cost_is_top_k_cost_plus_a_search_with_whole_blocks_only():
    model = KineticsCostModel()
    block = model.cost(TINY, prompt=10, generated=21, trials=3, policy=BlockTopK(4, 8, 2))
    top = model.cost(TINY, prompt=10, generated=21, trials=3, policy=TopK(20))
    assert block.compute_flops - top.compute_flops == 3 * (41 // 8) * 21 * 48
    assert block.memory_bytes - top.memory_bytes == (83 // 8) * 21 * 24


def test_dense_trials_share_the_prompt_and_sparse_ones_do_not():
    model = KineticsCostModel()
    one, four = (model.cost(TINY, prompt=100, generated=10, trials=n).memory_bytes for n in (1, 4))
    assert four == one + 3 * 2 * 10 * 10 * 24
    one, four = (model.cost(TINY, 100, 10, n, TopK(50)).memory_bytes for n in (1, 4))
    assert four == 4 * one


@given(prompt=prompts, generated=lengths, trials=trial_counts, policy=policies, intensity=st.floats(0, 1e4))
def test_eflops_are_linear_in_the_intensity_and_flops_without_it(prompt, generated, trials, policy, intensity):
    cost = KineticsCostModel(intensity).cost(TINY, prompt, generated, trials, policy)
    assert cost.eflops == pytest.approx(cost.compute_flops + intensity * cost.memory_bytes, rel=1e-12)
    assert FLOPS_ONLY.cost(TINY, prompt, generated, trials, policy).eflops == cost.compute_flops


@given(prompt=prompts, generated=lengths, trials=trial_counts, policy=policies)
def test_memory_scales_with_the_bytes_of_the_cache(prompt, generated, trials, policy):
    in_16_bits = KineticsCostModel().cost(TINY, prompt, generated, trials, policy)
    in_4_bits = KineticsCostModel(kv_bytes=0.5).cost(TINY, prompt, generated, trials, policy)
    assert in_4_bits.memory_bytes == pytest.approx(in_16_bits.memory_bytes / 4, rel=1e-12)
    assert in_4_bits.compute_flops == in_16_bits.compute_flops


def test_weight_reads_are_shared_by_the_batch():
    plain, loaded = (KineticsCostModel(include_weights=flag, batch=8) for flag in (False, True))
    for trials in (1, 4):
        extra = loaded.cost(TINY, 10, 16, trials).memory_bytes - plain.cost(TINY, 10, 16, trials).memory_bytes
        assert extra == 2 * 1000 * 16 / 8


def test_published_geometry_attention_outweighs_parameters_more_than_500_times():
    cost = KineticsCostModel().cost(QWEN_06, prompt=256, generated=32768)
    attention, weights = 562.5 * cost.memory_bytes, 2 * 0.752e9 * 32768
    assert attention / 1e12 == pytest.approx(35176, abs=0.5)
    assert weights / 1e12 == pytest.approx(49.3, abs=0.05)
    assert attention / weights == pytest.approx(714, abs=0.5)


def test_flops_and_eflops_rank_small_against_large_differently():
    def small_answers_for_one_large(model):
        return model.cost(QWEN_14, 256, 32768).eflops / model.cost(QWEN_06, 256, 32768).eflops

    assert small_answers_for_one_large(FLOPS_ONLY) > 8
    assert small_answers_for_one_large(KineticsCostModel()) < 2


def test_official_sign_adds_the_square_for_top_k_only():
    ours, theirs = KineticsCostModel(), KineticsCostModel(official_sign=True)
    gap = (
        theirs.cost(TINY, 10, 100, policy=TopK(30)).memory_bytes
        - ours.cost(TINY, 10, 100, policy=TopK(30)).memory_bytes
    )
    assert gap == 4 * (30 - 10) ** 2 * 24
    for policy in (Dense(), BlockTopK(0, 10, 3), TopK(10)):
        assert theirs.cost(TINY, 10, 100, policy=policy) == ours.cost(TINY, 10, 100, policy=policy)


@pytest.mark.parametrize("name", ["prompt", "generated", "trials"])
def test_counts_of_a_request_must_be_whole_numbers(name):
    for value in (-1, 1.5, True):
        with pytest.raises(ValueError, match=f"{name} must be a whole number"):
            KineticsCostModel().cost(TINY, **{"prompt": 1, "generated": 1, name: value})


def test_block_size_rule_spends_the_budget():
    for budget in (128, 256, 512, 1024, 2048):
        policy = BlockTopK.for_budget(budget)
        assert policy.block_size == 16384 // budget
        assert policy.budget == budget
    with pytest.raises(ValueError, match="budget must be"):
        BlockTopK.for_budget(64)


# Model sizes.


def test_query_heads_must_be_a_multiple_of_kv_heads():
    with pytest.raises(ValueError, match="query_heads must be a multiple of kv_heads = 3, got 4"):
        ModelSpec("odd", 1e9, layers=1, query_heads=4, kv_heads=3, head_dim=1)


def test_local_part_must_fit_the_budget():
    with pytest.raises(ValueError, match="local must be <= budget = 8, got 9"):
        TopK(8, local=9)


@pytest.fixture(scope="module")
def transformers():
    import transformers

    return transformers


def small(transformers, kind, **sizes):
    base = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
    base |= {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 24, "tie_word_embeddings": True}
    return getattr(transformers, kind)(**base, **sizes)


def test_dense_config_gives_all_parameters_tied_ones_once(transformers):
    config = small(transformers, "Qwen3Config")
    state = torch.get_rng_state()
    spec = ModelSpec.from_config(config)
    assert torch.equal(state, torch.get_rng_state())
    attention = 16 * 32 + 2 * 16 * 16 + 32 * 16 + 2 * 8
    assert spec.active_parameters == 50 * 16 + 3 * (attention + 3 * 16 * 24 + 2 * 16) + 16
    assert (spec.name, spec.layers, spec.query_width, spec.kv_width) == ("qwen3", 3, 4 * 8 * 3, 2 * 8 * 3)
    assert ModelSpec.from_config(config, n_params=7e9, name="mine") == replace(spec, active_parameters=7e9, name="mine")


def test_experts_count_by_the_share_a_token_uses_and_leave_the_cache_unchanged(transformers):
    def spec(experts, chosen):
        sizes = {"num_experts": experts, "num_experts_per_tok": chosen, "moe_intermediate_size": 12}
        return ModelSpec.from_config(small(transformers, "Qwen3MoeConfig", **sizes))

    one, two, of_more = spec(8, 1), spec(8, 2), spec(16, 2)
    assert two.active_parameters - one.active_parameters == 3 * (3 * 16 * 12)
    assert of_more.active_parameters - two.active_parameters == 3 * 16 * 8  # the router alone
    costs = [KineticsCostModel().cost(each, 64, 256).memory_bytes for each in (one, two, of_more)]
    assert costs[0] == costs[1] == costs[2]
    dense = ModelSpec.from_config(small(transformers, "Qwen3Config"))
    assert costs[0] == KineticsCostModel().cost(dense, 64, 256).memory_bytes


def test_counts_equal_published_sizes(transformers):
    common = {"vocab_size": 151936, "head_dim": 128, "tie_word_embeddings": False}
    dense = transformers.Qwen3Config(
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        **common,
    )
    assert ModelSpec.from_config(dense).active_parameters == pytest.approx(8.19e9, rel=1e-3)
    assert ModelSpec.from_config(transformers.MixtralConfig()).active_parameters == pytest.approx(12.9e9, rel=5e-3)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("DeepseekV3Config", "latent attention"),
        ("GptOssConfig", "sliding_attention"),
        ("MistralConfig", "sliding windows"),
        ("T5Config", "an encoder"),
    ],
)
def test_caches_that_the_formulas_do_not_describe_are_refused(transformers, kind, what):
    with pytest.raises(ValueError, match=f"config must be of a decoder .*{what}"):
        ModelSpec.from_config(getattr(transformers, kind)())


def test_intensity_is_the_ratio_of_the_rates():
    assert device_intensity("b200-fp8") == KineticsCostModel().intensity == 562.5
    assert device_intensity((10.0, 4.0)) == 2.5
    assert 0 < device_intensity("auto") < math.inf


@pytest.mark.parametrize("device", ["b300", (1.0,), (1.0, 0.0), (math.nan, 1.0), 3.0])
def test_unknown_devices_are_refused(device):
    with pytest.raises(ValueError, match="device must be"):
        device_intensity(device)


# Coverage.


@given(data=st.data(), samples=st.integers(1, 7))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(data, samples):
    correct = data.draw(st.integers(0, samples))
    trials = data.draw(st.integers(1, samples))
    subsets = list(combinations(range(samples), trials))
    solved = sum(any(index < correct for index in subset) for subset in subsets)
    assert pass_at_k(samples, correct, trials) == pytest.approx(solved / len(subsets), abs=1e-12)


@given(data=st.data(), samples=st.integers(1, 200))
def test_pass_at_k_limits(data, samples):
    correct = data.draw(st.integers(0, samples))
    values = [pass_at_k(samples, correct, k) for k in range(1, samples + 1)]
    assert values[0] == pytest.approx(correct / samples)
    assert values == sorted(values)
    assert all(value == 1 for value in values[samples - correct :])
    assert pass_at_k(samples, samples, 1) == 1
    assert pass_at_k(samples, 0, samples) == 0


def test_pass_at_k_refuses_more_trials_than_samples():
    with pytest.raises(ValueError, match=r"trials must be a whole number in \[1, 4\], got 5"):
        pass_at_k(4, 2, 5)
    with pytest.raises(ValueError, match="correct must be"):
        pass_at_k(4, 5, 1)


# The planner.


def brute_force(records, budgets, model, limits, counts):
    """Frontier and single choice by going through everything, without arrays."""
    specs = {record["model"].name: record["model"] for record in records}
    questions = sorted({record["question"] for record in records})
    answers = {}  # (model name, policy, trials, limit) -> [(cost, coverage) per question]
    for name, spec in specs.items():
        for policy in {record["policy"] for record in records}:
            for count in counts:
                for limit in limits:
                    rows = []
                    for question in questions:
                        mine = [
                            r
                            for r in records
                            if (r["model"].name, r["policy"], r["question"]) == (name, policy, question)
                        ]
                        cut = limit or 10**9
                        cost = sum(
                            model.cost(spec, r["prompt_tokens"], min(cut, r["generated_tokens"]), count, policy).eflops
                            for r in mine
                        ) / len(mine)
                        solved = sum(r["correct"] and r["generated_tokens"] <= cut for r in mine)
                        rows.append((cost, pass_at_k(len(mine), solved, count)))
                    answers[name, policy, count, limit] = rows
    frontier, single = [], []
    for budget in budgets:
        by_model = {}
        for name in specs:
            best = [
                max([0.0] + [rows[i][1] for key, rows in answers.items() if key[0] == name and rows[i][0] <= budget])
                for i in range(len(questions))
            ]
            by_model[name] = sum(best) / len(best)
        frontier.append(max(by_model.values()))
        means = [
            (sum(c for c, _ in rows) / len(rows), sum(v for _, v in rows) / len(rows)) for rows in answers.values()
        ]
        single.append(max([coverage for cost, coverage in means if cost <= budget], default=None))
    return frontier, single


@pytest.mark.parametrize("seed", range(5))
def test_plan_equals_brute_force(seed):
    records = random_records(seed)
    budgets = np.logspace(8, 16, 25)
    limits, counts = (None, 800), (1, 2, 4)
    model = KineticsCostModel(intensity=200)
    frontier, single = brute_force(records, budgets, model, limits, counts)
    result = plan_inference(records, budgets, cost_model=model, max_tokens=limits)
    assert [point.coverage for point in result.frontier] == pytest.approx(frontier, abs=1e-12)
    for budget, coverage in zip(budgets, single, strict=True):
        if coverage is None:
            with pytest.raises(ValueError, match="budget must be >="):
                result.best_config(budget)
        else:
            chosen = result.best_config(budget)
            assert chosen.coverage == pytest.approx(coverage, abs=1e-12)
            assert chosen.eflops <= budget


def test_curves_and_frontier_never_fall_with_the_budget():
    result = plan_inference(random_records(7), np.logspace(8, 16, 30))
    for curve in (*result.curves.values(), [point.coverage for point in result.frontier]):
        assert list(curve) == sorted(curve)


def test_memory_traffic_changes_the_chosen_model():
    records = []
    for question in range(3):
        records += samples(question, QWEN_06, [1] * 4 + [0] * 12, generated=32768)
        records += samples(question, QWEN_14, [1] * 10 + [0] * 6, generated=32768)
    chosen = {}
    for name, model in (("FLOPs", FLOPS_ONLY), ("eFLOPs", KineticsCostModel())):
        budget = model.cost(QWEN_14, 0, 32768).eflops
        chosen[name] = plan_inference(records, [budget], cost_model=model).best_config(budget)
    assert (chosen["FLOPs"].model, chosen["FLOPs"].trials) == ("Qwen3-0.6B", 8)
    assert (chosen["eFLOPs"].model, chosen["eFLOPs"].trials) == ("Qwen3-14B", 1)


def test_equal_coverage_goes_to_the_cheaper():
    records = samples("q", QWEN_14, [1, 1]) + samples("q", QWEN_06, [1, 1])
    result = plan_inference(records, [1e18])
    assert result.frontier[0].model == "Qwen3-0.6B"
    assert (result.best_config(1e18).model, result.best_config(1e18).trials) == ("Qwen3-0.6B", 1)


def test_nothing_affordable_is_coverage_zero_of_no_model():
    point = plan_inference(samples("q", TINY, [1, 1]), [1.0]).frontier[0]
    assert (point.coverage, point.model) == (0.0, None)


def test_cut_samples_are_wrong_and_cost_the_cut_length():
    records = samples("q", TINY, [1], generated=100) + samples("q", TINY, [1], generated=900)
    result = plan_inference(records, [1e18], trials=[1], max_tokens=(None, 500))
    whole, cut = result.configurations
    assert (whole.coverage, cut.coverage) == (1.0, 0.5)
    model = KineticsCostModel()
    assert cut.eflops == pytest.approx((model.cost(TINY, 0, 100).eflops + model.cost(TINY, 0, 500).eflops) / 2)


@dataclass
class Row:
    question: str
    model: str
    policy: str
    correct: bool
    generated_tokens: int


class Frame:
    """As much of a DataFrame as is used."""

    def __init__(self, rows):
        self.rows = rows

    def to_dict(self, orient):
        assert orient == "records"
        return self.rows


def test_dataclasses_mappings_and_frames_give_the_same_plan():
    rows = [Row(q, "a", p, i % 2 == 0, 100 + i) for q in "xy" for p in ("dense", "top") for i in range(4)]
    mappings = [asdict(row) for row in rows]
    known = {"models": {"a": TINY}, "policies": {"dense": Dense(), "top": TopK(32)}}
    plans = [
        plan_inference(each, [1e7, 1e9], **known).to_dict() for each in (rows, mappings, Frame(mappings), iter(rows))
    ]
    assert plans[0] == plans[1] == plans[2] == plans[3]


def test_plan_is_plain_json_and_can_be_drawn():
    result = plan_inference(random_records(3), np.logspace(9, 15, 10))
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False)) == result.to_dict()
    panels = result.panels()
    assert panels
    assert all(isinstance(panel, Panel) for panel in panels)
    assert set(panels[0].curves) == {"tiny", "Qwen3-0.6B", "best of all"}


GOOD = samples("q", TINY, [1, 0])


@pytest.mark.parametrize(
    ("records", "arguments", "message"),
    [
        ([], {}, "records must hold at least one row, got none"),
        ([{**GOOD[0], "correct": 2}], {}, r"correct of row 0 must be a whole number in \[0, 1\], got 2"),
        ([{**GOOD[0], "correct": math.nan}], {}, "correct of row 0 must be"),
        ([{**GOOD[0], "generated_tokens": 0}], {}, "generated_tokens of row 0 must be a whole number >= 1, got 0"),
        ([{**GOOD[0], "prompt_tokens": -1}], {}, "prompt_tokens of row 0 must be a whole number >= 0, got -1"),
        ([{"question": 1, "model": TINY}], {}, "records must have 'policy', row 0 has none"),
        ([{**GOOD[0], "model": "a"}], {}, r"model of row 0 must be an object or a given key \(none\), got 'a'"),
        ([{**GOOD[0], "policy": "a"}], {}, r"policy of row 0 must be an object or a given key \('dense'\), got 'a'"),
        ([*GOOD, *samples("q", replace(QWEN_06, name="tiny"), [1])], {}, "row 2 repeats 'tiny'"),
        ([*GOOD, *samples("p", QWEN_06, [1])], {}, "'p' has none of 'tiny'"),
        (GOOD, {"trials": [1, 3]}, r"trials must be a whole number in \[1, 2\], got 3"),
        (GOOD, {"max_tokens": [0]}, "max_tokens must be a whole number >= 1 or None, got 0"),
        (GOOD, {"trials": []}, "trials and max_tokens must hold at least one value each"),
        (GOOD, {"budgets": []}, "budgets must hold at least one, got none"),
        (GOOD, {"budgets": [2.0, 1.0]}, "budgets must be > 0, finite and increasing, got 1 after 2"),
        (GOOD, {"budgets": [math.nan]}, "budgets must be > 0"),
    ],
    ids=range(16),
)
def test_bad_records_and_budgets_are_refused(records, arguments, message):
    with pytest.raises(ValueError, match=message):
        plan_inference(records, **{"budgets": [1e9], **arguments})


# The selection rule.


def reference_mask(logits, lengths, policy, kv_heads):
    """The rule as written, a loop over sequences and groups."""
    mask = torch.zeros(logits.shape, dtype=torch.bool)
    group = logits.shape[1] // kv_heads
    for sequence, length in enumerate(lengths.tolist()):
        size = getattr(policy, "block_size", 1)
        if isinstance(policy, Dense) or length <= policy.sink + policy.local + policy.topk * size:
            mask[sequence, :, :length] = True
            continue
        blocks = (length - policy.local - policy.sink) // size
        end = policy.sink + blocks * size
        for head in range(kv_heads):
            heads = slice(head * group, (head + 1) * group)
            scores = logits[sequence, heads, policy.sink : end].mean(0).view(blocks, size).mean(1)
            for block in scores.topk(policy.topk).indices.tolist():
                start = policy.sink + block * size
                mask[sequence, heads, start : start + size] = True
            mask[sequence, heads, : policy.sink] = True
            mask[sequence, heads, end:length] = True
    return mask


def draw_logits(seed, sequences=5, heads=6, positions=90):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(sequences, heads, positions, generator=generator)
    return logits, torch.randint(0, positions + 1, (sequences,), generator=generator)


SELECTIONS = [
    Dense(),
    TopK(8),
    TopK(20, local=7, sink=0),
    TopK(6, local=6),
    TopK(200),
    BlockTopK(0, 8, 2),
    BlockTopK(5, 4, 3, sink=1),
    BlockTopK(3, 16, 1, sink=0),
    BlockTopK(0, 100, 1),
]


@pytest.mark.parametrize("policy", SELECTIONS, ids=repr)
@pytest.mark.parametrize("seed", range(4))
def test_mask_equals_the_loop_over_sequences(policy, seed):
    logits, lengths = draw_logits(seed)
    assert torch.equal(sparse_decode_mask(logits, lengths, policy, 3), reference_mask(logits, lengths, policy, 3))


@given(
    length=st.integers(0, 60),
    budget=st.integers(1, 30),
    local=st.integers(0, 30),
    sink=st.integers(0, 8),
    group=st.integers(1, 3),
)
def test_top_k_keeps_exactly_sink_local_and_k_positions_even_of_equal_logits(length, budget, local, sink, group):
    policy = TopK(budget, local=min(local, budget), sink=sink)
    mask = sparse_decode_mask(torch.zeros(1, 2 * group, 60), torch.tensor([length]), policy, 2)
    assert (mask.sum(-1) == min(length, sink + budget)).all()
    kept = mask[0, 0]
    assert kept[: min(sink, length)].all()
    assert kept[max(0, length - policy.local) : length].all()
    assert not kept[length:].any()


@given(length=st.integers(0, 60), local=st.integers(0, 9), size=st.integers(1, 9), topk=st.integers(1, 4))
def test_blocks_keep_exactly_sink_topk_blocks_and_a_local_part_with_the_remainder(length, local, size, topk):
    policy = BlockTopK(local, size, topk)
    mask = sparse_decode_mask(torch.zeros(1, 2, 60), torch.tensor([length]), policy, 1)
    remainder = (length - local - 4) % size
    expected = length if length <= 4 + policy.budget else 4 + local + remainder + topk * size
    assert mask.sum(-1).tolist() == [[expected, expected]]


@pytest.mark.parametrize("policy", [TopK(8), BlockTopK(2, 4, 2)], ids=["top-k", "blocks"])
def test_heads_of_a_group_agree_and_groups_choose_for_themselves(policy):
    logits, _ = draw_logits(0, sequences=1, heads=8)
    mask = sparse_decode_mask(logits, torch.tensor([90]), policy, 2).view(2, 4, 90)
    assert torch.equal(mask, mask[:, :1].expand(-1, 4, -1))
    assert not torch.equal(mask[0, 0], mask[1, 0])


@pytest.mark.parametrize("policy", [TopK(12, local=4), BlockTopK(4, 4, 2)], ids=["top-k", "blocks"])
def test_short_sequences_are_dense(policy):
    logits, _ = draw_logits(1, sequences=1)
    for length in range(policy.sink + policy.budget + 1):
        mask = sparse_decode_mask(logits, torch.tensor([length]), policy, 3)
        assert torch.equal(mask, sparse_decode_mask(logits, torch.tensor([length]), Dense(), 3))


def test_groups_average_logits_and_not_probabilities():
    logits = torch.tensor([[[10.0, 9.0, 0.0], [-10.0, -8.0, 20.0]]])
    assert logits.softmax(-1).mean(1)[0, :2].argmax() == 0
    mask = sparse_decode_mask(logits, torch.tensor([3]), TopK(2, local=1, sink=0), 1)
    assert mask.tolist() == [[[False, True, True], [False, True, True]]]


def test_garbage_beyond_a_length_and_masked_logits_change_nothing():
    logits, lengths = draw_logits(2)
    beyond = torch.arange(90) >= lengths[:, None, None]
    for policy in SELECTIONS:
        clean = sparse_decode_mask(logits, lengths, policy, 3)
        for filling in (math.nan, math.inf, -math.inf):
            assert torch.equal(sparse_decode_mask(logits.masked_fill(beyond, filling), lengths, policy, 3), clean)
    masked = torch.full((1, 2, 40), -math.inf)
    assert sparse_decode_mask(masked, torch.tensor([40]), TopK(5), 1).sum(-1).tolist() == [[9, 9]]


def test_half_precision_logits_are_averaged_in_full():
    logits = torch.tensor([[[60000.0, 1.0, 0.0], [60000.0, 1.0, 0.0]]], dtype=torch.float16)
    mask = sparse_decode_mask(logits, torch.tensor([3]), TopK(1, sink=0), 1)
    assert mask[0, 0].tolist() == [True, False, False]


def test_arguments_are_left_alone():
    logits, lengths = draw_logits(3)
    before = logits.clone(), lengths.clone()
    sparse_decode_mask(logits, lengths, BlockTopK(5, 4, 3), 3)
    assert torch.equal(logits, before[0])
    assert torch.equal(lengths, before[1])


@pytest.mark.parametrize(
    ("shape", "lengths", "kv_heads", "message"),
    [
        ((6, 9), torch.tensor([9]), 3, "logits must have the shape"),
        ((2, 6, 9), torch.tensor([9]), 3, "lengths must be 2 whole numbers"),
        ((1, 6, 9), torch.tensor([9.0]), 3, "lengths must be 1 whole numbers"),
        ((1, 6, 9), torch.tensor([9]), 4, "query_heads must be a multiple of kv_heads = 4, got 6"),
        ((1, 6, 9), torch.tensor([9]), 0, "num_kv_heads must be a whole number >= 1, got 0"),
    ],
    ids=range(5),
)
def test_shapes_that_do_not_fit_are_refused(shape, lengths, kv_heads, message):
    with pytest.raises(ValueError, match=message):
        sparse_decode_mask(torch.zeros(shape), lengths, TopK(2), kv_heads)
