"""Where a program's time goes, by the lines of the source that it came from."""

import inspect

import jax
import jax.numpy as jnp

from capvl.bench import costs


def heavy(x):
    return x @ x


def light(x):
    return jnp.sin(x)


def line_of(function) -> int:
    return inspect.getsourcelines(function)[1] + 1


def test_the_costliest_line_is_the_matmul():
    x = jnp.ones((600, 600))
    compiled = jax.jit(lambda x: light(heavy(heavy(x)))).lower(x).compile()
    found = costs.measure(lambda: compiled(x).block_until_ready(), compiled.as_text(), times=3)
    assert abs(sum(cost.share for cost in found) - 1) < 1e-6
    assert found == sorted(found, key=lambda cost: -cost.seconds)
    assert f"test_costs.py:{line_of(heavy)} dot_general" in found[0].where
    assert any(f"test_costs.py:{line_of(light)} sin" in cost.where for cost in found)
    assert all(cost.seconds > 0 for cost in found)


def test_a_loop_is_not_counted_beside_what_is_in_it():
    x = jnp.ones((300, 300))

    def loop(x):
        return jax.lax.fori_loop(0, 4, lambda _, y: heavy(y) / 300, x)

    compiled = jax.jit(loop).lower(x).compile()
    found = costs.measure(lambda: compiled(x).block_until_ready(), compiled.as_text(), times=3)
    assert any(f"test_costs.py:{line_of(heavy)} dot_general" in cost.where for cost in found)
    assert "while" not in " ".join(cost.where for cost in found)
