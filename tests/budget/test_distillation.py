import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils.data import DataLoader

from headway.budget.distillation import MixedDataset, distillation_loss, sample_teachers

REAL, SYNTHETIC = range(100), range(1000, 1030)


@settings(deadline=None, max_examples=30)
@given(weight=st.floats(0.01, 0.99), seed=st.integers(0, 10**6))
def test_share_of_synthetic_rows_is_within_four_standard_errors(weight, seed):
    mixed = MixedDataset(REAL, SYNTHETIC, weight, length=4000, seed=seed)
    share = sum(mixed[i] >= 1000 for i in range(4000)) / 4000
    assert abs(share - weight) <= 4 * math.sqrt(weight * (1 - weight) / 4000)


def test_every_batch_of_a_loader_has_about_the_share_and_none_runs_dry():
    mixed = MixedDataset(REAL, SYNTHETIC, 0.75, length=6400)
    batches = list(DataLoader(mixed, batch_size=640, shuffle=True, generator=torch.Generator().manual_seed(0)))
    assert len(batches) == 10
    for rows in batches:
        assert abs(float((rows >= 1000).double().mean()) - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 640)


def test_no_row_comes_again_before_all_rows_of_its_source_have_come():
    mixed = MixedDataset(REAL, SYNTHETIC, 0.5, length=900)
    rows = [mixed[i] for i in range(900)]
    for source in (REAL, SYNTHETIC):
        mine = [row for row in rows if row in source]
        for start in range(0, len(mine) - len(source), len(source)):
            assert sorted(mine[start : start + len(source)]) == list(source)


def test_default_length_is_about_one_pass_over_the_real_rows():
    assert len(MixedDataset(REAL, SYNTHETIC, 0.75)) == 400
    assert len(MixedDataset(REAL, [], 0.0)) == 100
    assert len(MixedDataset([], SYNTHETIC, 1.0)) == 30
    assert sorted(MixedDataset(REAL, [], 0.0)) == list(REAL)
    assert sorted(MixedDataset([], SYNTHETIC, 1.0)) == list(SYNTHETIC)


def test_mixture_is_a_function_of_seed_and_epoch():
    def rows(seed, epoch):
        mixed = MixedDataset(REAL, SYNTHETIC, 0.5, seed=seed)
        mixed.set_epoch(epoch)
        return list(mixed)

    assert rows(0, 1) == rows(0, 1)
    assert len({tuple(rows(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_empty_sources_bad_shares_and_bad_indices_are_refused():
    with pytest.raises(ValueError, match=r"real must hold at least one row at synthetic_weight = 0\.9"):
        MixedDataset([], SYNTHETIC)
    with pytest.raises(ValueError, match="synthetic must hold at least one row"):
        MixedDataset(REAL, [])
    with pytest.raises(ValueError, match=r"synthetic_weight must be in \[0, 1\], got 1.5"):
        MixedDataset(REAL, SYNTHETIC, 1.5)
    with pytest.raises(IndexError, match="index must be in"):
        MixedDataset(REAL, SYNTHETIC, 0.5)[200]


def logits(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_hand_computed_loss():
    student, teacher = torch.log(torch.tensor([[0.5, 0.5]])), torch.log(torch.tensor([[0.25, 0.75]]))
    divergence = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    loss = distillation_loss(student, teacher, torch.tensor([1]), weight=0.75)
    assert float(loss) == pytest.approx(0.75 * divergence + 0.25 * math.log(2))


def test_weight_zero_is_the_cross_entropy_and_weight_one_at_the_teacher_is_zero():
    student, teacher, targets = logits(0, 3, 4, 5), logits(1, 3, 4, 5), torch.randint(5, (3, 4))
    plain = functional.cross_entropy(student.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(distillation_loss(student, teacher, targets, weight=0.0), plain)
    assert float(distillation_loss(teacher + 3, teacher, targets, weight=1.0, temperature=2.0)) == pytest.approx(
        0, abs=1e-6
    )


def test_gradient_pulls_the_student_to_the_teacher_at_any_temperature_and_spares_the_teacher():
    teacher, targets = logits(1, 6, 5).requires_grad_(), torch.zeros(6, dtype=torch.long)
    for temperature in (1.0, 4.0):
        student = logits(0, 6, 5).requires_grad_()
        distillation_loss(student, teacher, targets, 1.0, temperature).backward()
        expected = temperature * ((student / temperature).softmax(-1) - (teacher / temperature).softmax(-1)) / 6
        torch.testing.assert_close(student.grad, expected.detach())
    assert teacher.grad is None


def test_ignored_tokens_do_not_count_and_none_at_all_gives_zero():
    student, teacher = logits(0, 2, 3, 5), logits(1, 2, 3, 5)
    targets = torch.tensor([[1, -100, 2], [-100, -100, 4]])
    kept = targets != -100
    torch.testing.assert_close(
        distillation_loss(student, teacher, targets), distillation_loss(student[kept], teacher[kept], targets[kept])
    )
    assert float(distillation_loss(student, teacher, torch.full((2, 3), -100))) == 0


def test_16_bit_logits_are_computed_in_float32():
    student, teacher, targets = logits(0, 6, 5).bfloat16(), logits(1, 6, 5).bfloat16(), torch.zeros(6, dtype=torch.long)
    loss = distillation_loss(student, teacher, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, distillation_loss(student.float(), teacher.float(), targets))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="teacher_logits must have the shape of student_logits"):
        distillation_loss(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"weight must be in \[0, 1\], got 2"):
        distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), weight=2)


def teacher(seed, eos=10):
    import transformers

    sizes = {"vocab_size": 11, "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 16}
    torch.manual_seed(seed)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=eos))


def always(token):
    """A teacher that writes one token only, wherever it is."""
    model = teacher(0)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[token] = 20.0
    return model


def test_teachers_share_the_documents_and_each_writes_its_own():
    texts = sample_teachers([always(3), always(4), always(5)], documents=7, length=5, batch_size=2)
    assert [text.tolist() for text in texts] == [[0, 3, 3, 3, 3]] * 3 + [[0, 4, 4, 4, 4]] * 2 + [[0, 5, 5, 5, 5]] * 2


def test_a_document_ends_with_its_end_token_even_if_that_starts_it_too():
    assert [text.tolist() for text in sample_teachers([always(10)], 2, 6)] == [[0, 10]] * 2
    assert [text.tolist() for text in sample_teachers([always(10)], 1, 6, bos_token_id=10)] == [[10, 10]]


def test_first_tokens_follow_the_teachers_distribution():
    model = teacher(3).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        expected = model(input_ids=torch.zeros(1, 1, dtype=torch.long)).logits[0, -1].softmax(-1)
    texts = sample_teachers([model], 4000, 2, batch_size=1000)
    counts = torch.bincount(torch.stack(texts)[:, 1], minlength=11)
    errors = 4 * torch.sqrt(expected * (1 - expected) / 4000) + 1e-3
    assert bool(((counts / 4000 - expected).abs() <= errors).all())


def test_samples_depend_on_the_seed_only_and_leave_generator_and_mode_alone():
    model = teacher(1).train()
    before = torch.get_rng_state()
    first = sample_teachers([model], 4, 8)
    assert bool((torch.get_rng_state() == before).all())
    assert model.training
    torch.rand(3)
    again, other = sample_teachers([model], 4, 8), sample_teachers([model], 4, 8, seed=1)
    assert [text.tolist() for text in first] == [text.tolist() for text in again] != [text.tolist() for text in other]


def test_a_missing_start_token_and_bad_numbers_are_refused():
    model = teacher(0)
    model.config.bos_token_id = None
    with pytest.raises(ValueError, match="bos_token_id must be given"):
        sample_teachers([model], 1, 4)
    with pytest.raises(ValueError, match="models must hold at least one model"):
        sample_teachers([], 1, 4)
    with pytest.raises(ValueError, match="length must be a whole number >= 2, got 1"):
        sample_teachers([model], 1, 1)
