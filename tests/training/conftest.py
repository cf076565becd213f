import dataclasses

import jax
import pytest

import jaxear.train as train_module
from jaxear.training.sharding import JitParallel
from tests.training.tiny import tiny, without_eigenears


@pytest.fixture(scope="package", autouse=True)
def _quick_compilation():
    """Most of the time of these tests is XLA's, and what they say does not depend on its speed."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="package", autouse=True)
def _runs_alike_are_compiled_once():
    """Many runs differ in nothing but what happens to them; to trace each anew takes longest."""
    programs = {}
    make, compile_train = train_module.make_train_step, JitParallel.compile_train

    def make_train_step(config, skeleton, optimizer, schedule, steps_per_epoch, **options):
        step = make(config, skeleton, optimizer, schedule, steps_per_epoch, **options)
        step.settings = repr((dataclasses.replace(config, out=None), steps_per_epoch))
        return step

    def compiled_once(self, step, *arguments):
        key = self, getattr(step, "settings", step), str(jax.tree.map(jax.typeof, arguments))
        if key not in programs:
            programs[key] = compile_train(self, step, *arguments)
        return programs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "make_train_step", make_train_step)
        patch.setattr(JitParallel, "compile_train", compiled_once)
        yield


@pytest.fixture(scope="package")
def finished(tmp_path_factory, photographs):
    """The directory of a finished run of three epochs, three steps each."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    train_module.train(tiny(photographs, out), progress=False)
    return out


@pytest.fixture
def no_eigenears():
    """Leaves out what takes longest after training, where a test is about training alone."""
    with without_eigenears():
        yield
