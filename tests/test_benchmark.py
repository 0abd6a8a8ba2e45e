"""Test the benchmark: its clock and budget, FLOP, memory, collectives, errors, and the app."""

import json
import re
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from jax import lax

from diffusion_jax import samplers, training
from diffusion_jax.diffusion.guidance import Model
from diffusion_jax.networks import Network
from diffusion_jax.networks.layers import BatchNorm, Conv
from diffusion_jax.networks.precisions import PRECISIONS
from diffusion_jax.parallel import AXIS, data_parallel
from diffusion_jax.runs import save_model
from diffusion_jax.training import Length
from diffusion_jax.typing import InputError
from experiments import measure, timing
from experiments.measure import Bare, Setting
from tests import apps
from tests.models import SMALL, TINY, untrained

SPECS = ("--network=tiny", "--schedule=course:steps=20")


def setting_of(model: Model, count: int, batch: int = 8, dtype: str = "float32") -> Setting:
    return Setting(model, batch, dtype, tuple(jax.devices()[:count]))


# ------------------------------------------------------------------------------------- the clock


def test_candidates_take_turns() -> None:
    order: list[str] = []
    seconds = timing.interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b"] * 3
    assert {name: runs.shape for name, runs in seconds.items()} == {"a": (3,), "b": (3,)}


def test_a_budget_ends_the_rounds_but_not_before_the_least() -> None:
    runs = timing.interleave({"a": lambda: time.sleep(0.02)}, 100, 0.2)["a"]
    assert timing.LEAST <= len(runs) <= 10
    assert len(timing.interleave({"a": lambda: time.sleep(0.02)}, 100, 0.001)["a"]) == timing.LEAST


def test_what_runs_on_is_waited_for() -> None:
    class Slow:
        def block_until_ready(self) -> None:
            time.sleep(0.05)

    assert timing.seconds_of(lambda: [Slow(), Slow()]) >= 0.1


def test_groups_share_a_budget() -> None:
    """Give each group an equal part, and what a group leaves to those after it."""
    begin, runs = time.monotonic(), {"a": lambda: time.sleep(0.01)}
    groups = [timing.Group({"case": "short"}, {"b": lambda: None}, {"b": 1}, 0, 1.0)]
    groups += [timing.Group({"case": str(number)}, runs, {"a": 1}, 0, 1.0) for number in range(2)]
    counts = [len(*found.values()) for _, found in timing.run_groups(groups, 30, begin, 0.3)]
    assert counts[0] == 30
    assert 3 < counts[1] <= 15
    assert [len(*f.values()) for _, f in timing.run_groups(groups, 5, begin, None)] == [5] * 3
    assert [len(*f.values()) for _, f in timing.run_groups(groups, 5, begin, 0.0)] == [3] * 3


def test_a_summary_is_of_percentiles() -> None:
    assert timing.summary(np.arange(101.0)) == (50, 10, 90)


# --------------------------------------------------------------- what programs ask of a machine


def test_flop_of_a_matrix_product() -> None:
    shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((30, 40), (40, 50)))
    assert timing.flop(jnp.matmul, *shapes) == 2 * 30 * 40 * 50


def test_flop_of_a_pass_does_not_depend_on_the_devices() -> None:
    """Expect also about the FLOP of the convolutions."""
    model = untrained(SMALL)
    one, two = (Bare(setting_of(model, count)).flop for count in (1, 2))
    assert two == pytest.approx(one, rel=0.01)
    kernels = model.variables["params"]
    on_full = [kernels["init_conv"], kernels["down1"], kernels["up2"]]
    products = 64 * sum(leaf.size for part in on_full for leaf in jax.tree.leaves(part))
    assert 1 < one / (2 * 8 * products) < 3


def test_a_pass_is_the_network(model) -> None:
    bare = Bare(setting_of(model, 2))
    (out,) = bare.run(1)
    x, context = bare.args[1], bare.args[3]
    x, context = (part.reshape(8, *part.shape[2:]) for part in jax.device_get((x, context)))
    expected = model.network.apply(model.variables, jnp.asarray(x), 0.5, jnp.asarray(context))
    assert np.allclose(np.asarray(out).reshape(x.shape), expected, atol=1e-5)


def test_a_pass_computes_in_the_dtype_of_its_setting(model) -> None:
    """Compute as sampling does. Without TF32 products, a CPU computes in float32."""
    passes = {}
    for dtype in PRECISIONS:
        bare = Bare(setting_of(model, 1, dtype=dtype))
        passes[dtype] = np.asarray(bare.run(1)[0], np.float32)
        assert ("bf16" in bare.compiled.as_text()) == (dtype == "bfloat16")
    assert np.array_equal(passes["float32"], passes["tf32"])
    worst = np.abs(passes["bfloat16"] - passes["float32"]).max() / np.abs(passes["float32"]).max()
    assert 1e-5 < worst < 0.05


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_peaks_are_of_this_machine(dtype: str) -> None:
    """Expect less than the limit of any machine, and more than that of one older than JAX."""
    peaks = timing.peaks(jax.devices()[:1], dtype)
    assert all(1e8 < peak < 1e16 for peak in peaks)


def test_a_batch_beyond_the_memory_is_refused(model) -> None:
    with pytest.raises(InputError, match=r"batches=400000000 needs about .* take up to \d+ images"):
        Bare(setting_of(model, 1, batch=400_000_000))


# ----------------------------------------------------------------------------------- collectives


def test_collectives_are_counted() -> None:
    def reduce(x: jax.Array) -> jax.Array:
        return lax.all_gather(jnp.sin(lax.pmean(x, AXIS)), AXIS)

    run = data_parallel(reduce, (0,), 0, devices=jax.devices()[:2])
    text = run.lower(np.ones((2, 3), np.float32)).compile().as_text()
    assert timing.count_collectives(text) == {"all-reduce": 1, "all-gather": 1}


@pytest.mark.parametrize("count", [2, 8])
def test_sampling_has_no_collectives(model, count: int) -> None:
    setting = setting_of(model, count, batch=2 * count)
    jax.clear_caches()
    with timing.programs(setting.devices[0]) as found:
        setting.draw(samplers.build("ddim", model.schedule, 2))
    program = max(found, key=lambda program: program.memory)
    weights = 4 * sum(leaf.size for leaf in jax.tree.leaves(model.variables))
    assert program.memory > weights, "the program that holds the network"
    assert not program.collectives


class Normed(Network):
    """Two convolutions, with BatchNorm after each."""

    @nn.compact
    def __call__(self, x, t, context=None, train=False):
        for _ in range(2):
            x = BatchNorm(self.axis_name, self.kernels)(Conv(3)(x), train)
        return x


def test_training_reduces_gradients_and_loss_at_once() -> None:
    """Expect each BatchNorm to gather its statistics at once, and to sum gradients backwards."""
    task = TINY.task(Length(8, 4, 1))._replace(network=Normed(TINY.image_shape, 3))
    axes = (None, 0, 0, 0, None, None), (None, None)
    step = data_parallel(training.train_step(task), *axes, devices=jax.devices()[:2])
    pixels = np.zeros((2, 2, 8, 8, 3), np.uint8)
    labels, positions = np.zeros((2, 2, 3), np.float32), np.zeros((2, 2), np.int32)
    state = training.init(task)
    given = pixels, labels, positions, jax.random.key(0), np.float32(1e-3)
    lowered = step.lower(state, *given)
    text = lowered.compile({"xla_backend_optimization_level": 0}).as_text()
    assert timing.count_collectives(text) == {"all-reduce": 1 + 2, "all-gather": 2}


# ------------------------------------------------------------------------ samplers and programs


def test_the_registry_at_up_to_1000_steps_compiles_at_most_twice() -> None:
    model = untrained(schedule="course:steps=1000")
    setting = setting_of(model, 1, batch=1)
    jax.clear_caches()
    with timing.counting() as compilations:
        for name in samplers.SAMPLERS:
            for n in (1, 77, 1000):
                setting.draw(samplers.build(name, model.schedule, n), rows=0)
    assert 1 <= compilations.count <= 2


def test_programs_are_compiled_cold_and_read_from_the_cache(model) -> None:
    before = jax.config.jax_compilation_cache_dir
    program = measure.compile_program(setting_of(model, 2))
    assert program["cold"]["seconds"] > 2 * program["cached"] > 0
    assert program["cold"]["seconds"] > program["cold"]["xla_seconds"]
    assert program["collectives"] == {}
    assert jax.config.jax_compilation_cache_dir == before


def test_errors_of_solvers(model) -> None:
    """Measure against Heun at every step: more steps are nearer, and noise has no error."""
    cases = (("heun", 40), ("ddim", 2), ("ddim", 20), ("ddpm", 40))
    tableaus = {f"{name}:{n}": samplers.build(name, model.schedule, n) for name, n in cases}
    errors = measure.solver_errors(setting_of(model, 2), tableaus)
    assert errors["heun:40"] == 0
    assert errors["ddpm:40"] is None
    assert 0 < errors["ddim:20"] < errors["ddim:2"]


# ----------------------------------------------------------------------------------------- the app


def test_the_app_writes_its_results(model, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(timing, "peaks", lambda *_: timing.Peaks(1e9, 2e9))
    out, run = tmp_path / "new", tmp_path / "run"
    save_model(run, TINY, model.variables)
    cases = (f"--run={run}", "--samplers=ddpm:40,heun:5:grid=leading", "--batches=2")
    flags = ("--dtypes=bfloat16", "--repeats=4", "--budget=0.1s", f"--out={out}")
    apps.call("benchmark", *cases, *flags, "--devices=2")
    printed = capsys.readouterr().out
    assert re.search(r"included; about \d+ s of runs, more than the budget of 0 s\n", printed)
    record = json.loads((out / "results.json").read_text())
    ours = [row for row in record["rows"] if row["candidate"] == "diffusion_jax"]
    assert [(row["case"], row["devices"], row["passes or steps"]) for row in ours] == [
        *(("ddpm:40", 2, 40), ("heun:5:grid=leading", 2, 9))
    ]
    for row in ours:
        seconds = row["seconds"]["median"]
        assert row["images/s"] == pytest.approx(2 / seconds)
        flop = 1e9 * record["programs"][0]["GFLOP a pass or step"] * row["passes or steps"]
        assert (row["dtype"], row["runs"]) == ("bfloat16", 3)
        assert row["of matmul"] == pytest.approx(flop / seconds / 1e9, rel=0.05)
        assert row["of matmul"] == 2 * row["of convolution"]
    assert [row["error"] is None for row in ours] == [True, False]
    assert record["configuration"]["network"] == TINY.network
    assert (out / "results.md").read_text().strip() in printed
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_benchmark_leaves_what_it_measured(tmp_path: Path, monkeypatch) -> None:
    def interrupted(groups, *args):
        yield groups[0], {"bare passes": np.ones(3)}
        raise KeyboardInterrupt

    monkeypatch.setattr(timing, "peaks", lambda *_: timing.Peaks(1e9, 2e9))
    monkeypatch.setattr(timing, "run_groups", interrupted)
    flags = ("--samplers=ddim:5", "--batches=2", "--devices=2", f"--out={tmp_path}")
    with pytest.raises(KeyboardInterrupt):
        apps.call("benchmark", *SPECS, *flags)
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert (row["case"], row["runs"], row["seconds"]["median"]) == ("network", 3, 1)
    assert (
        "| network | 2 | float32 | 2 | bare passes | 10 | 3 | 1 (1 to 1) |"
        in (tmp_path / "results.md").read_text()
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--samplers=dppm:5"], "sampler='dppm' is unknown: did you mean"),
        (["--samplers=ddim:21"], r"steps=21: it must be in 1\.\.20"),
        (
            ["--dtypes=float16"],
            "dtypes='float16' is unknown: .*choose from float32, tf32, bfloat16",
        ),
        (["--against=torch", "--dtypes=float32,tf32"], "choose one of float32 and tf32"),
        (["--budget=soon"], "budget=soon: write it as 150s, 5min or 1h"),
        (["--against=tensorflow"], "against=tensorflow: choose from torch"),
        (["--batches=0"], "batches and devices: 0: they must be at least 1"),
        (["--devices=x"], "devices=x: they must be whole numbers"),
        (["--batches="], "batches and dtypes: give at least one of each"),
        (["--repeats=0"], "repeats=0: 0 is not a positive integer"),
        (["--batches=3", "--devices=2"], "batch_size=3 is not divisible"),
        (["--run=none"], "run='none': there is no such folder"),
        (["--out=Makefile"], "out='Makefile' is a file: name a folder"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(tmp_path, given: list[str], message) -> None:
    command = ("benchmark", *SPECS, "--samplers=ddim:5", f"--out={tmp_path / 'none'}", *given)
    with pytest.raises((InputError, flags.Error), match=message):
        apps.call(*command)
    assert not (tmp_path / "none").exists()
