"""GLIP's head, [fusion, BERT layer, DyHead block] several times and what reads it, with the official numbers."""

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import under
from flax import nnx
from glip_parts import HEADS, filled, maps, renamed
from golden_glip import close, load

from capvl.convert import glip_names
from capvl.models.alignment import AlignmentHead
from capvl.models.sizes import Size
from capvl.models.tower import DetectionTower

pytestmark = pytest.mark.golden


def parameters(golden):
    """Those of the tower, and those of the alignment head."""
    theirs = renamed(under(golden, "param"), "head.")
    kept = {name: x for name, x in theirs.items() if not name.removeprefix("head.").startswith(glip_names.NOT_OF_OURS)}
    tower = {name: x for name, x in kept.items() if "dyhead_tower" in name}
    return tower, {name: x for name, x in kept.items() if name not in tower}


def towers(golden, fusion: str):
    """The tower with any possible number of groups, which no array tells; the README's of small files come first."""
    theirs, head = parameters(golden)
    width, text_width = head["head.dot_product_projection_text.weight"].shape
    blocks = sum(name.endswith("DyConv.0.conv.weight") for name in theirs)
    text, kind = Size(text_width, 1, 1, HEADS), {}
    if fusion != "none":
        text = Size(text_width, 1, len(theirs["head.dyhead_tower.1.intermediate.dense.bias"]), HEADS)
        kind = dict(fusion_width=len(theirs["head.dyhead_tower.0.b_attn.attn.v_proj.bias"]), fusion_heads=HEADS)
    table = glip_names.tower("part", "head.dyhead_tower", blocks, fusion)
    for groups in sorted((n for n in range(1, width + 1) if width % n == 0), key=lambda n: n not in (2, 4)):
        how = dict(fusion=fusion, groups=groups, **kind)
        tower = nnx.eval_shape(lambda how=how: DetectionTower(width, text, blocks, rngs=nnx.Rngs(0), **how))
        yield filled(tower, theirs, table, HEADS)


@pytest.mark.parametrize(("case", "fusion"), [("fused", "both"), ("nofuse", "none")])
def test_tower(case, fusion):
    golden = load(f"vldyhead_{case}")
    levels, states, mask = maps(golden, "in/x"), jnp.asarray(golden["in/hidden"]), jnp.asarray(golden["in/mask"]) > 0
    expected = maps(golden, "out/tower")
    for tower in towers(golden, fusion):
        found, text = nnx.jit(lambda tower: tower(levels, states, mask))(tower)
        if np.allclose(found[0], expected[0], atol=1e-2):
            break
    for level, (a, b) in enumerate(zip(found, expected, strict=True)):
        close(a, b, name=f"level {level}")
    close(text, golden["out/tower_lang"])


@pytest.mark.parametrize("case", ["fused", "nofuse"])
def test_alignment(case):
    """Of their tower's outputs."""
    golden = load(f"vldyhead_{case}")
    _, theirs = parameters(golden)
    levels = maps(golden, "out/tower")
    width, text_width = theirs["head.dot_product_projection_text.weight"].shape
    head = nnx.eval_shape(lambda: AlignmentHead(width, text_width, len(levels), rngs=nnx.Rngs(0)))
    head = filled(head, theirs, glip_names.alignment("part", "head", len(levels)), 1)
    states = jnp.asarray(golden["out/tower_lang" if case == "fused" else "in/embedded"])
    found = head(levels, states)

    def rows(name):
        return np.concatenate([x.reshape(x.shape[0], -1, x.shape[-1]) for x in maps(golden, name)], axis=1)

    dots = [golden[f"out/dot_logits{level}"] for level in range(len(levels))]
    close(found.logits_BNL, np.concatenate(dots, axis=1))
    close(found.deltas_BN4, rows("out/bbox"))
    close(found.centerness_BN, rows("out/centerness")[..., 0])
