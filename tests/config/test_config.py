import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.config import Config, ConfigError, load, parse
from headway.config.schema import SECTIONS


def refused(*overrides, text=""):
    with pytest.raises(ConfigError) as caught:
        parse(text, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_resolved_form_loads_to_the_same_configuration():
    config = load(overrides=["optimizer.name=frugal", "optimizer.density=0.5", "train.steps=7", "model.from=here"])
    assert parse(config.to_toml()) == config


def test_a_file_and_an_override_mean_the_same(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text('[optimizer]\nname = "sgd"\nlr = 0.5\n')
    assert load(file) == load(overrides=["optimizer.name=sgd", "optimizer.lr=0.5"])


def test_overrides_win_over_the_file_and_later_ones_over_earlier():
    config = parse("[train]\nsteps = 5", ["train.steps=6", "train.steps=7"])
    assert config.train.steps == 7


def test_a_method_that_is_named_starts_from_its_own_defaults():
    assert load(overrides=["optimizer.name=sgd"]).optimizer.options == {}
    assert load(overrides=["optimizer.lr=0.1"]).optimizer.options["betas"] == [0.9, 0.95]


def test_the_default_warm_up_fits_any_number_of_steps():
    assert [load(overrides=[f"train.steps={n}"]).schedule.options["warmup_steps"] for n in (1, 50, 320)] == [0, 5, 20]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimiser.lr=1", "unknown section 'optimiser' (did you mean 'optimizer'?)"),
        ("train.step=1", "unknown key 'train.step' (did you mean 'steps'?)"),
        ("optimizer.lrr=1", "unknown key 'optimizer.lrr' for adamw (did you mean 'lr'?)"),
        ("optimizer.name=fugal", "optimizer.name: unknown optimizer method 'fugal' (did you mean 'frugal'?)"),
        ("schedule.name=frugal", "schedule.name: 'frugal' has the role optimizer, not schedule"),
        ("schedule.name=autolrs", "schedule.name: 'autolrs' has the role controller, not schedule"),
        ("batch.name=adadagrad", "batch.max_batch must be given for adadagrad"),
        ("optimizer.lr=-0.1", "optimizer.lr must be > 0, got -0.1"),
        ("optimizer.lr=nan", "optimizer.lr must be > 0, got nan"),
        ("optimizer.lr=fast", "optimizer.lr must be > 0, got 'fast'"),
        ("optimizer.betas=[0.9]", "optimizer.betas must be 2 numbers in [0, 1), got [0.9]"),
        ("optimizer.amsgrad=7", "optimizer.amsgrad must be bool, got 7"),
        ("optimizer.params=[]", "unknown key 'optimizer.params' for adamw"),
        ("train.steps=0", "train.steps must be >= 1, got 0"),
        ("train.steps=1.5", "train.steps must be a whole number, got 1.5"),
        ("train.compile=1", "train.compile must be true or false, got 1"),
        ("train.precision=fp8", "train.precision must be 'auto', 'bf16' or 'fp32', got 'fp8'"),
        ("data.validation_fraction=1", "data.validation_fraction must be < 1, got 1"),
        ("batch.micro_batch=3", "batch.micro_batch must divide a worker's share of the batch (8), got 3"),
        ("launch.workers=3", "batch.size must be a multiple of launch.workers (3), got 8"),
        ("model.heads=5", "model.hidden_size must be an even multiple of model.heads (5), got 192"),
        ("schedule.warmup_steps=320", "warmup_steps must be < total_steps = 320, got 320"),
        ("data=3", "data must be a section, got 3"),
        ("steps", "an override is written section.key=value, got 'steps'"),
        ("a.b.c=1", "an override is written section.key=value, got 'a.b.c=1'"),
    ],
)
def test_wrong_input_is_one_line_that_names_key_value_and_what_is_accepted(override, expected):
    assert expected in refused(override)


def test_a_methods_own_constraints_are_checked_before_anything_starts():
    assert "optimizer.density must be in [0, 1], got 1.5" in refused("optimizer.name=frugal", "optimizer.density=1.5")


def test_broken_toml_and_missing_files_are_one_line(tmp_path):
    assert "not valid TOML" in refused(text="[train\nsteps = 1")
    with pytest.raises(ConfigError, match="cannot read configuration"):
        load(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a UTF-8 text file"):
        load(tmp_path / "binary.toml")


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.datetimes()
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
keys = st.sampled_from(
    [f"{section}.{key}" for section, cls in SECTIONS.items() for key in [*cls.keys(), "lr", "betas", "warmup_steps"]]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(keys | st.text(max_size=12), values.map(repr) | st.text(max_size=12)), max_size=4))
def test_no_override_produces_anything_but_a_configuration_or_one_line(pairs):
    try:
        assert isinstance(load(overrides=[f"{key}={value}" for key, value in pairs]), Config)
    except ConfigError as error:
        assert "\n" not in str(error)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60))
def test_no_file_produces_anything_but_a_configuration_or_one_line(text):
    try:
        assert isinstance(parse(text), Config)
    except ConfigError as error:
        assert "\n" not in str(error)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(list(SECTIONS)), values, max_size=3))
def test_no_structure_of_values_produces_anything_but_a_configuration_or_one_line(raw):
    import tomli_w

    try:
        text = tomli_w.dumps(raw)
    except (TypeError, UnicodeEncodeError):
        return  # not expressible in TOML
    try:
        config = parse(text)
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert parse(config.to_toml()) == config


@pytest.mark.parametrize(
    ("slug", "why"),
    [
        ("gradient-normalized-smoothness", "evaluates the loss itself"),
        ("consensus-based-optimization", "evaluates the loss itself"),
        ("normalized-logistic-gd", "margins of a linear classifier"),
        ("target-surrogate", "gradient with respect to the model's outputs"),
    ],
)
def test_an_optimizer_that_the_loop_cannot_drive_is_refused_with_the_reason(slug, why):
    with pytest.raises(ConfigError, match=why):
        load(overrides=[f"optimizer.name={slug}"])


def test_a_wrapper_takes_the_options_of_what_it_wraps_and_refuses_others():
    load(overrides=["optimizer.name=coordinate-clipping", "optimizer.inner=frugal", "optimizer.density=0.5"])
    with pytest.raises(ConfigError, match=r"unknown key 'optimizer.density'"):
        load(overrides=["optimizer.name=coordinate-clipping", "optimizer.inner=adamw", "optimizer.density=0.5"])
    with pytest.raises(ConfigError, match=r"optimizer.density must be in \[0, 1\], got 2"):
        load(overrides=["optimizer.name=coordinate-clipping", "optimizer.inner=frugal", "optimizer.density=2"])
    with pytest.raises(ConfigError, match=r"optimizer.inner: .*did you mean 'frugal'"):
        load(overrides=["optimizer.name=coordinate-clipping", "optimizer.inner=frugall"])
    with pytest.raises(ConfigError, match=r"optimizer.inner must be an optimizer that steps from gradients"):
        load(overrides=["optimizer.name=coordinate-clipping", "optimizer.inner=adahessian"])


def test_sparse_momentum_is_for_the_linear_layers_of_the_model():
    load(overrides=["optimizer.name=spam", "optimizer.density=0.25"])
    with pytest.raises(ConfigError, match=r"optimizer.density must be in \(0, 1\], got 0"):
        load(overrides=["optimizer.name=spam", "optimizer.density=0"])
