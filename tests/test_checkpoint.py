"""Checkpoints: exact, and anything that is not whole or of another model is noticed."""

import gc
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from capvl.checkpoint import Checkpointer, checksums, names_of
from capvl.errors import UserError
from capvl.parallel.mesh import MeshOptions, make_mesh
from capvl.recipes import CheckpointOptions

# orbax leaves the failed reads of other files of a broken checkpoint unawaited.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
OPTIONS = CheckpointOptions(every=1, keep=3)
ONE = make_mesh(MeshOptions(), jax.devices()[:1])


@pytest.fixture(scope="module", autouse=True)
def earlier_objects():
    """What was there before is looked through once, not after each test."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def collect_garbage(earlier_objects):
    """Whatever a failed read leaves behind is reported within its own test."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def states():
    """What `state_of` gave."""
    return {}


@pytest.fixture
def abstract_of(tiny_recipe):
    """A function that gives the abstract state of the tiny recipe, changed."""
    return lambda **changes: tiny_recipe(**changes).train_step().abstract_state(ONE)


@pytest.fixture
def state_of(tiny_recipe, states):
    """A function that gives (abstract state, state on a mesh) of the tiny recipe."""

    def make(mesh=ONE):
        if mesh not in states:
            step = tiny_recipe().train_step()
            states[mesh] = step.abstract_state(mesh), step.make_state(mesh)
        return states[mesh]

    return make


def at(state, step):
    return state._replace(step=jax.device_put(jnp.int32(step), state.step.sharding))


def save(workdir, state, steps=(1, 2)):
    checkpointer = Checkpointer(str(workdir), OPTIONS)
    for step in steps:
        checkpointer.save(at(state, step), 100 * step, {"recipe": "tiny"})
    checkpointer.close()


def largest_file(folder: pathlib.Path) -> pathlib.Path:
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def data_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Files that hold arrays or the description: orbax keeps some twice, and reads only one of them."""
    return [f for f in folder.rglob("*") if f.is_file() and ("d" in f.parts[-2:-1] or f.parent.name == "meta")]


@pytest.mark.long
def test_round_trip_onto_another_mesh(tmp_path, state_of):
    _, state = state_of(make_mesh(MeshOptions(2, 2, 2)))
    save(tmp_path, state)
    abstract, _ = state_of(make_mesh(MeshOptions(1, 4, 2)))
    restored = Checkpointer(str(tmp_path), OPTIONS).restore(abstract)
    assert (restored.step, restored.position) == (2, 200)
    found, expected = names_of(restored.state), names_of(at(state, 2))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    wanted = abstract.params["encoder/blocks/mlp/up/kernel"].sharding
    assert restored.state.params["encoder/blocks/mlp/up/kernel"].sharding == wanted


def test_nothing_to_restore(tmp_path, state_of):
    abstract, _ = state_of()
    assert Checkpointer(str(tmp_path), OPTIONS).restore(abstract) is None
    with pytest.raises(UserError, match="no checkpoint"):
        Checkpointer(str(tmp_path)).read_params({})


def flip(file: pathlib.Path):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(file: pathlib.Path):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("harm", [flip, truncate])
@pytest.mark.parametrize("item", ["state", "meta"])
def test_newest_whole_checkpoint_is_used(tmp_path, state_of, harm, item):
    abstract, state = state_of()
    save(tmp_path, state)
    for file in data_files(tmp_path / "checkpoints" / "2" / item):
        harm(file)
    said = []
    checkpointer = Checkpointer(str(tmp_path), OPTIONS)
    restored = checkpointer.restore(abstract, say=said.append)
    assert restored.step == 1
    assert len(said) == 1
    assert "step 2 is broken" in said[0]
    assert (tmp_path / "broken" / "2").exists(), "the broken checkpoint is set aside, not deleted"
    checkpointer.save(at(state, 2), 200, {})
    checkpointer.close()
    assert Checkpointer(str(tmp_path), OPTIONS).restore(abstract).step == 2


def test_a_change_that_the_file_format_does_not_notice_is_noticed(tmp_path, state_of, monkeypatch):
    abstract, state = state_of()
    save(tmp_path, state, steps=(1,))
    name = "params.encoder.blocks.mlp.up.kernel"

    def before_the_change(leaves):
        # The sum of what the recipe had; what is written differs from it in one bit.
        return checksums(leaves) | {name: checksums(leaves)[name] ^ 1}

    monkeypatch.setattr("capvl.checkpoint.checksums", before_the_change)
    save(tmp_path, state, steps=(2,))
    monkeypatch.undo()
    said = []
    assert Checkpointer(str(tmp_path), OPTIONS).restore(abstract, say=said.append).step == 1
    assert f"{name} does not have the saved checksum" in said[0]


def test_none_is_whole(tmp_path, state_of):
    abstract, state = state_of()
    save(tmp_path, state)
    for step in (1, 2):
        for file in data_files(tmp_path / "checkpoints" / str(step) / "state"):
            truncate(file)
    with pytest.raises(UserError, match="None of the 2 checkpoints"):
        Checkpointer(str(tmp_path), OPTIONS).restore(abstract, say=lambda _: None)


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"model__encoder": "w16d2h2m48/16"},
            r"mlp.up.kernel is float32\[2, 16, 32\] in the checkpoint",
        ),
        ({"model__decoder_layers": 3}, r"decoder.blocks.*in the checkpoint, float32\[3,"),
        ({"model__pool": "map"}, r"encoder.map.* is only in the model"),
        ({"optimizer__momentum_dtype": "float32"}, r"opt_state.*bfloat16.*float32"),
    ],
)
def test_another_model_is_refused_leaf_by_leaf(tmp_path, state_of, abstract_of, changes, words):
    _, state = state_of()
    save(tmp_path, state, steps=(1,))
    abstract = abstract_of(**changes)
    with pytest.raises(UserError, match=words) as error:
        Checkpointer(str(tmp_path), OPTIONS).restore(abstract)
    assert "of another model" in str(error.value)


def test_kept_checkpoints(tmp_path, state_of):
    _, state = state_of()
    checkpointer = Checkpointer(str(tmp_path), CheckpointOptions(every=1, keep=2, keep_every=3))
    for step in range(1, 8):
        checkpointer.save(at(state, step), step, {})
    checkpointer.close()
    assert Checkpointer(str(tmp_path)).steps() == [3, 6, 7]


def test_disk_full_while_saving(tmp_path, state_of, monkeypatch):
    _, state = state_of()
    checkpointer = Checkpointer(str(tmp_path), OPTIONS)
    checkpointer.save(at(state, 1), 100, {})
    checkpointer.wait()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    checkpointer.save(at(state, 2), 200, {})
    monkeypatch.setattr(checkpointer._manager, "check_for_errors", full)
    with pytest.raises(UserError, match="step 2 could not be saved.*disk is full.*step 1 is whole"):
        checkpointer.wait()
    monkeypatch.undo()
    monkeypatch.setattr(checkpointer._manager, "save", full)
    with pytest.raises(UserError, match="step 3 could not be saved.*disk is full"):
        checkpointer.save(at(state, 3), 300, {})
    assert 1 in Checkpointer(str(tmp_path)).steps()


@pytest.fixture
def unhurried(monkeypatch):
    monkeypatch.setattr("capvl.storage.time.sleep", lambda _: None)


def fail_once(monkeypatch, target, name, error):
    """The next call of a method raises; later ones do as before."""
    method, errors = getattr(target, name), [error]

    def failing(*args, **kwargs):
        if errors:
            raise errors.pop()
        return method(*args, **kwargs)

    monkeypatch.setattr(target, name, failing)


PASSING, STAYING = OSError(5, "Input/output error"), OSError(13, "Permission denied")


def test_error_of_a_background_save_surfaces_before_the_next_save(tmp_path, state_of, monkeypatch):
    _, state = state_of()
    checkpointer = Checkpointer(str(tmp_path), OPTIONS)
    checkpointer.save(at(state, 1), 100, {})
    monkeypatch.setattr(ocp.CheckpointManager, "check_for_errors", lambda self: (_ for _ in ()).throw(STAYING))
    begun = []
    monkeypatch.setattr(ocp.CheckpointManager, "save", lambda *args, **kw: begun.append(args))
    with pytest.raises(UserError, match="step 1 could not be saved.*Permission denied"):
        checkpointer.save(at(state, 2), 200, {})
    assert not begun


@pytest.mark.parametrize("where", ["save", "check_for_errors"])
def test_error_of_a_save_that_passes_loses_nothing(tmp_path, state_of, monkeypatch, unhurried, where):
    abstract, state = state_of()
    checkpointer = Checkpointer(str(tmp_path), OPTIONS)
    checkpointer.save(at(state, 1), 100, {})
    checkpointer.wait()
    checkpointer.save(at(state, 2), 200, {})
    checkpointer._manager.wait_until_finished()
    fail_once(monkeypatch, ocp.CheckpointManager, where, PASSING)
    said = []
    checkpointer.save(at(state, 3), 300, {}, say=said.append)
    checkpointer.close()
    assert len(said) == 1
    assert "Trying again in 0.5 s" in said[0]
    restored = Checkpointer(str(tmp_path), OPTIONS).restore(abstract)
    assert (restored.step, restored.position) == (3, 300)


def test_a_read_that_fails_for_a_moment_does_not_break_a_checkpoint(tmp_path, state_of, monkeypatch, unhurried):
    abstract, state = state_of()
    save(tmp_path, state)
    fail_once(monkeypatch, ocp.StandardCheckpointHandler, "restore", PASSING)
    said = []
    assert Checkpointer(str(tmp_path), OPTIONS).restore(abstract, say=said.append).step == 2
    assert not said
    monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", lambda *_, **kw: (_ for _ in ()).throw(PASSING))
    with pytest.raises(UserError, match="Reading the checkpoint of step 2 .* failed 8 times"):
        Checkpointer(str(tmp_path), OPTIONS).restore(abstract, say=said.append)
    assert not said
    assert Checkpointer(str(tmp_path)).steps() == [1, 2]


def test_what_another_process_cannot_read_is_broken_for_all(tmp_path, state_of, monkeypatch):
    abstract, state = state_of()
    save(tmp_path, state)
    worst = iter([0, 1])  # The description is read by all; the arrays are not.
    monkeypatch.setattr("capvl.parallel.distributed.largest", lambda mine: max(mine, next(worst, 0)))
    said = []
    assert Checkpointer(str(tmp_path), OPTIONS).restore(abstract, say=said.append).step == 1
    assert "step 2 is broken (its arrays can't be read: on another process)" in said[0]
    monkeypatch.setattr("capvl.parallel.distributed.largest", lambda mine: 2)
    with pytest.raises(UserError, match="Reading the checkpoint of step 1 .* failed on another process"):
        Checkpointer(str(tmp_path), OPTIONS).restore(abstract)
    assert Checkpointer(str(tmp_path)).steps() == [1]


def test_opening_is_tried_again_and_said(tmp_path, state_of, monkeypatch, unhurried):
    _, state = state_of()
    save(tmp_path, state)
    fail_once(monkeypatch, ocp.CheckpointManager, "__init__", PASSING)
    assert Checkpointer(str(tmp_path)).steps() == [1, 2]
    fail_once(monkeypatch, ocp.CheckpointManager, "__init__", STAYING)
    with pytest.raises(UserError, match="Checkpoints in '.*' can't be opened: Permission denied"):
        Checkpointer(str(tmp_path))


def test_checksum_is_the_same_under_any_sharding_and_sees_every_bit():
    x = np.random.default_rng(0).normal(size=(8, 4, 6)).astype(np.float32)
    mesh = make_mesh(MeshOptions(2, 2, 2))
    layouts = [jax.P(), jax.P("replica", "tensor"), jax.P(("replica", "fsdp"), None, "tensor")]
    found = {checksums({"x": jax.device_put(x, jax.NamedSharding(mesh, p))})["x"] for p in layouts}
    assert len(found) == 1
    for bit in (0, 13, 31):
        y = x.view(np.uint32).copy()
        y[3, 2, 1] ^= np.uint32(1 << bit)
        assert checksums({"x": jnp.asarray(y.view(np.float32))})["x"] not in found
    swapped = x.copy()
    swapped[0], swapped[1] = x[1], x[0]
    assert checksums({"x": jnp.asarray(swapped)})["x"] not in found
    assert checksums({"x": jnp.asarray(x, jnp.bfloat16), "n": jnp.int32(3)}).keys() == {"x", "n"}


def test_description_holds_position_and_recipe(tmp_path, state_of):
    _, state = state_of()
    save(tmp_path, state, steps=(1,))
    meta = json.loads(largest_file(tmp_path / "checkpoints" / "1" / "meta").read_text())
    assert meta["position"] == 100
    assert meta["recipe"] == {"recipe": "tiny"}
