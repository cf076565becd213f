"""Twenty steps by every strategy on eight virtual devices and on one; prints the losses as JSON.

Run by `test_sharding`, in a process of its own: JAX counts its devices when it starts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType

from jaxear.config import TrainConfig
from jaxear.model import create_vae, random_stream
from jaxear.training.batch import Resident, TrainBatch
from jaxear.training.optimizer import create_optimizer, create_schedule, rate_scales
from jaxear.training.packing import pack_factors
from jaxear.training.sharding import AXIS, JitParallel, Parallel, create_parallel
from jaxear.training.state import create_state, split_model
from jaxear.training.step import make_eval_step, make_train_step
from tests.training.tiny import TINY_SAM, tiny

STEPS = 20


def config_of(**changes) -> TrainConfig:
    settings = {"batch_size": 8, "latent_dim": 64, "head_width": 512, "ema_decay": 0.9, **changes}
    settings["backbone_options"] = {**TINY_SAM, "depth": 1, "global_attn_indexes": []}
    settings["decoder_channels"] = (8,)
    return tiny(Path("none"), Path("none"), **settings)


def losses(parallel: Parallel, config: TrainConfig) -> dict[str, list]:
    """Losses of all steps, metrics of an evaluation, and how the largest array is cut."""
    model = create_vae(config, config.image_size, rngs=random_stream(0))
    skeleton, leaves = split_model(model)
    scales = pack_factors(rate_scales(model, config), leaves.trainable)
    schedule = create_schedule(config, STEPS)
    optimizer = create_optimizer(config, schedule, scales)
    state = create_state(leaves, optimizer, average=config.ema_decay > 0)
    step = make_train_step(
        config, skeleton, optimizer, schedule, STEPS, axis_name=parallel.axis_name
    )
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (STEPS, config.batch_size, 32, 32, 3), dtype=np.uint8)
    places = np.arange(config.batch_size, dtype=np.int32)
    batches = [TrainBatch(places, places, places // 2, batch) for batch in images]
    compiled = parallel.lower_train(step, state, Resident(), batches[0]).compile()
    state, resident = parallel.put_state(state), parallel.put_resident(Resident())
    found = []
    for batch in batches:
        state, metrics = compiled(state, resident, parallel.put_batch(batch))
        found.append(parallel.scalars(metrics)["loss"])
    evaluate = parallel.compile_eval(make_eval_step(skeleton))
    scores, _ = parallel.collect(evaluate(state, parallel.put_batch(images[0])))
    largest = max(state.trainable.values(), key=lambda leaf: leaf.size)
    return {
        "losses": found,
        "psnr": scores["psnr"].tolist(),
        "piece": list(largest.addressable_shards[0].data.shape),
        "whole": list(parallel.savable(state).trainable["decoder.stem.kernel"].shape),
    }


def main() -> None:
    one = jax.make_mesh((1,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    config = config_of(**json.loads(sys.argv[1]))
    report = {"one": losses(JitParallel(one), config)}
    for strategy in ("jit", "fsdp", "pmap"):
        parallel = create_parallel(strategy, config.batch_size, config.accumulate)
        report[strategy] = losses(parallel, config)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
