"""XLA options of the train step by chip generation, passed with each compilation and never by environment."""

import jax

from capvl import chips
from capvl.parallel.mesh import slice_count

# Matmuls that gather their weights stay whole: cut into rings of collective-permutes they move several times the bytes.
_TPU = {
    "xla_tpu_enable_latency_hiding_scheduler": "true",
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
}
_ACROSS_SLICES = {
    "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    "xla_tpu_data_parallel_opt_different_sized_ops": "true",
}

OPTIONS = {
    "v4": _TPU | {"xla_enable_async_all_gather": "true", "xla_enable_async_collective_permute": "true"},
    "v5e": _TPU,
    "v5p": _TPU | {"xla_tpu_scoped_vmem_limit_kib": "65472"},
    "v6e": _TPU | {"xla_tpu_scoped_vmem_limit_kib": "98304"},
}


def options(mesh: jax.sharding.Mesh) -> dict[str, str]:
    """The compiler options for a mesh's chips; {} for chips without any."""
    devices = list(mesh.devices.flat)
    chip = chips.of_kind(devices[0].device_kind)
    found = dict(OPTIONS.get(chip.name, {})) if chip else {}
    if found and slice_count(devices) > 1:
        found |= _ACROSS_SLICES
    return found


def options_of_one_call(mesh: jax.sharding.Mesh) -> dict[str, bool | int]:
    """The compiler options for what runs once; {} for chips without any.

    On CPUs drawing a model's first parameters took half a minute to compile with all optimisations, and a second
    without.
    """
    if next(iter(mesh.devices.flat)).platform != "cpu":
        return {}
    return {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
