"""Topologies, rooflines, plans on paper, and plans by the TPU compiler where libtpu is installed."""

import dataclasses
import importlib.util
import json

import jax
import pytest

from capvl import chips, plan
from capvl.errors import UserError
from capvl.parallel import compiler
from capvl.parallel.mesh import MeshOptions, make_mesh, slice_count
from capvl.planning import ahead, estimate, search, topology
from capvl.planning.libtpu import prepare_environment, wait_for_lock
from capvl.planning.roofline import collective_seconds, roofline
from capvl.planning.work import Cost, Program

needs_libtpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
CONFIG = "configs/cappa_demo.py"


@pytest.fixture
def libtpu(monkeypatch):
    """Lets several processes of the suite compile side by side."""
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    prepare_environment()


@pytest.mark.parametrize(
    ("text", "slices", "sentence"),
    [
        ("v5:4x4", 1, "Unknown chip 'v5' in topology 'v5:4x4'; known: v4, v5e, v5p, v6e."),
        ("v5e:3x5", 1, "Topology 'v5e:3x5' is unknown; v5e comes as 2x2, 2x4, 4x4"),
        ("v5p:4x4", 1, "v5p comes as 2x2x1"),
        ("v5e", 1, "Topology 'v5e' is unknown"),
        ("v5e:4x4", 0, "--slices=0 should be at least 1."),
    ],
)
def test_unknown_topologies_are_refused(text, slices, sentence):
    with pytest.raises(UserError) as error:
        topology.parse(text, slices)
    assert sentence in str(error.value)


def test_sizes_of_topologies():
    place = topology.parse("v5e:4x8", slices=2)
    assert (place.size, place.hosts, place.name) == (64, 8, "2 x v5e:4x8")


def test_roofline_of_known_work():
    chip = dataclasses.replace(
        chips.CHIPS[1], flops=100.0, hbm_bandwidth=10.0, link_bandwidth=2.0, links=2, dcn_bandwidth=1.0
    )
    cost = Cost(flops=300.0, hbm_bytes=50.0)
    cost.collectives["all-reduce", 8.0, 4, False] = 2
    cost.collectives["all-gather", 4.0, 2, True] = 1
    times = roofline(cost, chip)
    # An all-reduce passes 2 (n - 1) / n of its bytes over both directions of a ring, a gather half as many.
    assert (times.compute, times.hbm) == (3.0, 5.0)
    assert times.ici == pytest.approx(2 * (2 * 3 / 4 * 8 / 4))
    assert times.dcn == pytest.approx(1 / 2 * 4)
    assert (times.least, times.binds) == (6.0, "ici")
    assert times.most == pytest.approx(3 + 5 + 6 + 2)
    assert collective_seconds("all-reduce", 8.0, 1, False, chip) == 0


def test_paper_knows_the_arguments_exactly(tiny_recipe):
    recipe = tiny_recipe(batch_size=16)
    recipe = dataclasses.replace(recipe, mesh=dataclasses.replace(recipe.mesh, replica=2, fsdp=2))
    found = estimate.paper_plan(recipe, topology.parse("v5e:2x2"))
    mesh = make_mesh(recipe.mesh, jax.devices()[:4])
    step = recipe.train_step()
    state = jax.jit(step.init_from_seed, out_shardings=step.state_shardings(mesh))()
    on_first = sum(s.data.nbytes for x in jax.tree.leaves(state) for s in x.addressable_shards if s.device.id == 0)
    assert found.arguments == on_first
    assert found.source == "paper" and found.fits


def test_paper_sees_what_remat_saves(tiny_recipe):
    place = topology.parse("v5e:2x2")
    saved = [
        estimate.paper_plan(search.changed(tiny_recipe(), remat=remat), place).temporaries
        for remat in ("none", "named", "full")
    ]
    assert saved[0] > saved[1] > saved[2]


def test_smaller_recipes_come_in_order_of_their_cost(tiny_recipe):
    recipe = tiny_recipe(batch_size=32)
    recipe = dataclasses.replace(recipe, mesh=dataclasses.replace(recipe.mesh, replica=-1, fsdp=1))
    flags = [flags for flags, _ in search.smaller(recipe, topology.parse("v5e:2x2"))]
    sharded = "--config.mesh.replica=-1 --config.mesh.fsdp=4"
    assert flags == [
        sharded,
        f"{sharded} --config.model.remat=named",
        f"{sharded} --config.model.remat=full",
        f"{sharded} --config.model.remat=full --config.micro_batches=2",
        f"{sharded} --config.model.remat=full --config.micro_batches=4",
        f"{sharded} --config.model.remat=full --config.micro_batches=8",
    ]


def test_weights_are_divided_as_far_as_their_width_allows(tiny_recipe):
    recipe = tiny_recipe(batch_size=64, model__encoder="w48d2h2m96/16")  # On 32 chips, where 48 divides by 16.
    place = topology.parse("v5e:4x8")
    first, candidate = next(iter(search.smaller(recipe, place)))
    assert first == "--config.mesh.replica=-1 --config.mesh.fsdp=16"
    whole, divided = (estimate.paper_plan(r, place) for r in (recipe, candidate))
    assert divided.arguments < whole.arguments / 8
    assert "mesh.fsdp=32 are whole on every device" in whole.advice and divided.advice == ""


def test_the_first_recipe_that_fits_is_taken(tiny_recipe):
    recipe, place = tiny_recipe(batch_size=32), topology.parse("v5e:2x2")
    asked = []

    def planner(candidate, place):
        asked.append(candidate.model.remat)
        if candidate.model.remat != "full":
            raise ahead.DoesNotFitError(2e12, 1e10)
        return estimate.paper_plan(candidate, place)

    flags, found = search.make_fit(recipe, place, planner, say=lambda text: None)
    assert flags == "--config.model.remat=full"
    assert asked == ["named", "full"] and found.remat == "full"


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: … Ran out of memory in memory space hbm. Used 18.40G of 15.75G hbm.",
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (18.40G) exceeds available HBM (15.75G). HLO module: jit___call.",
    ],
)
def test_compiler_messages_of_too_little_memory(message):
    place = topology.parse("v5e:2x2")
    error = ahead._does_not_fit(message, place)
    assert (error.needed, error.available) == (18.40 * 2**30, 15.75 * 2**30)
    assert ahead._does_not_fit("INTERNAL: something else", place) is None


def test_analytic_command(capsys, tmp_path, data_dir):
    out = tmp_path / "plan.json"
    plan.main([f"--config={CONFIG}", "--topology=v5e:2x2", "--topology=v5p:2x2x1", "--analytic", f"--json={out}"])
    shown = capsys.readouterr().out
    assert "on paper" in shown and "MFU" in shown
    found = json.loads(out.read_text())
    assert [p["topology"] for p in found] == ["v5e:2x2", "v5p:2x2x1"]
    assert found[0]["flops"] == found[0]["analytic_flops"] and found[0]["hbm"]["fits"]


def test_an_output_layer_of_its_own_is_counted(tiny_recipe, data_dir):
    """Its kernel and Adam's means of it, the first in bfloat16; FLOPs as with the table. Dropout can be planned."""
    place, found = topology.parse("v5e:2x2"), []
    for tied in (True, False):
        model = dict(encoder="w16d1h2m16/8", res=16, text="w8d1h2m8", vocab=64, start=2, length=8, text_positions=8)
        recipe = tiny_recipe(objective={"name": "git"}, model=model | {"tied": tied, "dropout": 0.1},
                             optimizer={"name": "adamw", "lr": 1e-3}, mesh={"replica": 4, "fsdp": 1})  # fmt: skip
        found.append(estimate.paper_plan(recipe, place))
    assert found[1].arguments - found[0].arguments == (4 + 2 + 4) * 8 * 64
    assert found[1].cost.flops == found[0].cost.flops > 0


def test_missing_libtpu_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    ahead.devices.cache_clear()
    with pytest.raises(UserError, match="needs libtpu: pip install"):
        ahead.devices(topology.parse("v5e:2x2"))


def test_a_held_lock_is_named_and_waited_for(monkeypatch):
    monkeypatch.delenv("ALLOW_MULTIPLE_LIBTPU_LOAD", raising=False)
    monkeypatch.setattr("capvl.planning.libtpu.lock_holder", lambda: "process 7 (python train.py)")
    said = []
    with pytest.raises(UserError, match=r"libtpu is locked by process 7 \(python train.py\)"):
        wait_for_lock(0.0, said.append)


@needs_libtpu
@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_compiler_accepts_the_options_of_each_chip(name, libtpu):
    devices = list(ahead.devices(topology.parse(name)))
    mesh = jax.sharding.Mesh(devices, "x")
    options = compiler.options(mesh)
    assert options
    x = jax.ShapeDtypeStruct((8, 8), "float32", sharding=jax.NamedSharding(mesh, jax.P()))
    jax.jit(lambda x: x + 1, compiler_options=options).lower(x).compile()
    with pytest.raises(jax.errors.JaxRuntimeError):
        jax.jit(lambda x: x + 1, compiler_options=options | {"xla_tpu_no_such_option": "1"}).lower(x).compile()


@needs_libtpu
def test_only_replicas_cross_slices(libtpu):
    devices = list(ahead.devices(topology.parse("v5e:2x2", slices=2)))
    assert slice_count(devices) == 2
    grid = make_mesh(MeshOptions(replica=4, fsdp=2), devices).devices
    assert grid.shape == (4, 2, 1)
    assert [{d.slice_index for d in row.flat} for row in grid] == [{0}, {0}, {1}, {1}]
    with pytest.raises(UserError, match="replica=1 should be a multiple of the 2 slices"):
        make_mesh(MeshOptions(replica=1, fsdp=-1), devices)


@needs_libtpu
@pytest.mark.parametrize("unroll", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_compiled_step_does_the_analytic_flops(tiny_recipe, libtpu, unroll):
    recipe = tiny_recipe(batch_size=32, model__unroll=unroll, model__dtype="bfloat16", model__encoder="w128d3h2m512/16")
    found = estimate.compiled_plan(recipe, topology.parse("v5e:2x2"))
    assert found.cost.flops == pytest.approx(found.analytic_flops, rel=0.03)
    assert found.fits and found.arguments and found.temporaries
    assert found.cost.collectives


@needs_libtpu
def test_long_sequences_take_the_kernel_and_its_matmuls_are_counted(tiny_recipe, libtpu):
    model = dict(model__dtype="bfloat16", model__encoder="w128d2h2m256/16", model__res=384)
    recipe = tiny_recipe(batch_size=8, **model)
    place = topology.parse("v5e:2x2")
    text = ahead.compile_step(recipe, place).text
    assert "splash_mha_fwd" in text
    tokens, padded, width, layers = (384 // 16) ** 2, 640, 128, 2
    attention = 2 * recipe.batch_size / place.size * tokens**2 * width * layers  # One matmul of all layers and heads.
    # The kernel does 7 matmuls where the formula has 6, on whole tiles; the image's own gradient is not needed.
    stem = 2 * recipe.batch_size / place.size * tokens * (16 * 16 * 3) * width
    analytic = recipe.objective.flops(recipe.model) * recipe.batch_size / place.size
    expected = analytic - stem + attention * (7 * (padded / tokens) ** 2 - 6)
    assert Program(text).cost.flops == pytest.approx(expected, rel=0.01)


@needs_libtpu
def test_gradients_cross_slices_once(tiny_recipe, libtpu):
    """Between slices the compiler sends through the hosts; what is sent is the gradients, of this chip's part."""
    model = dict(model__dtype="bfloat16", model__encoder="w256d2h2m1024/16")
    recipe = tiny_recipe(batch_size=32, mesh={"replica": 2, "fsdp": -1}, **model)
    place = topology.parse("v5e:2x2", slices=2)
    compiled, paper = (planner(recipe, place) for planner in (estimate.compiled_plan, estimate.paper_plan))
    sent, expected = (
        sum(moved * times for (kind, moved, group, crosses), times in plan.cost.collectives.items() if crosses)
        for plan in (compiled, paper)
    )
    assert sent == pytest.approx(expected, rel=0.1)
    assert {key[2] for key in compiled.cost.collectives if key[3]} == {2}
    assert compiled.times.dcn > 0
