"""jaxear.pca against float64 NumPy and scikit-learn, and under scikit-learn's own tests."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from sklearn import decomposition
from sklearn.datasets import load_iris
from sklearn.decomposition._pca import _assess_dimension, _infer_dimension
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.estimator_checks import parametrize_with_checks

from jaxear.errors import UserError
from jaxear.pca import PCA, PCAError, estimator, krylov
from jaxear.pca.moments import Moments, gather_moments, merge
from jaxear.pca.spectra import minka_dimension

ROOT = Path(__file__).parents[1]

SKLEARN_TESTS_THAT_FAIL = {
    r"test_pca_sparse\[": "sparse input is not supported",
    r"test_pca_sparse_fit_transform\[": "sparse input is not supported",
    r"test_sparse_pca_auto_arpack_singular_values_consistency\[": "sparse input is not supported",
    r"test_sparse_pca_solver_error\[": "sparse input is refused by every solver, not by some",
}


def falling_rows(n, d, rng, mean=0.0, dtype=np.float64):
    """Rows [n, d] of distinct, falling variances, their mean in units of standard deviations."""
    scales = 0.8 ** np.arange(d) + 1e-3
    rotation = np.linalg.qr(rng.standard_normal((d, d)))[0]
    rows = (rng.standard_normal((n, d)) * scales) @ rotation
    return (rows + mean * rows.std(axis=0) * rng.choice([-1.0, 1.0], d)).astype(dtype)


def reference(X, k):
    """Explained variance [k], components [k, d] by a float64 SVD, signs as scikit-learn's."""
    centred = X.astype(np.float64) - X.mean(axis=0, dtype=np.float64)
    _, sigma, vt = np.linalg.svd(centred, full_matrices=False)
    signs = np.sign(vt[np.arange(len(vt)), np.abs(vt).argmax(axis=1)])
    return (sigma**2 / (len(X) - 1))[:k], (vt * signs[:, None])[:k]


def run_python(code, *arguments, **environment):
    """Output of a fresh Python process, warnings being errors, with the repository importable."""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@parametrize_with_checks(
    [
        PCA(),
        PCA(svd_solver="stream"),
        PCA(svd_solver="gram", whiten=True),
        PCA(n_components=1, svd_solver="randomized"),
    ]
)
def test_scikit_learn_estimator_checks(estimator, check):
    check(estimator)


@pytest.mark.slow
def test_scikit_learns_own_tests_pass_but_for_those_listed(tmp_path):
    """Those that fail are those that match SKLEARN_TESTS_THAT_FAIL: none of these passes."""
    (tmp_path / "ours.py").write_text(
        "import sklearn.decomposition\n"
        "import jaxear.pca\n"
        "sklearn.decomposition.PCA = jaxear.pca.PCA\n"
    )
    report = tmp_path / "report.xml"
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "ours",
            "-p",
            "no:cacheprovider",
            "--tb=no",
            f"--junitxml={report}",
            "--pyargs",
            "sklearn.decomposition.tests.test_pca",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
    )
    assert run.returncode in (0, 1), run.stdout + run.stderr
    outcomes = {}
    for case in re.findall(r"<testcase .*?(?:/>|</testcase>)", report.read_text(), re.DOTALL):
        found = re.search(r' name="([^"]*)"', case)
        failed = "<failure" in case or "<error" in case
        outcomes[found[1]] = "failed" if failed else "skipped" if "<skipped" in case else "passed"
    listed = {n for n in outcomes if any(re.match(p, n) for p in SKLEARN_TESTS_THAT_FAIL)}
    assert {name for name, outcome in outcomes.items() if outcome == "failed"} == listed
    assert sum(outcome == "passed" for outcome in outcomes.values()) >= 150
    for pattern in SKLEARN_TESTS_THAT_FAIL:
        assert any(re.match(pattern, name) for name in outcomes), pattern


@pytest.mark.parametrize("solver", ["full", "gram", "covariance", "randomized", "arpack", "stream"])
@pytest.mark.parametrize("shape", [(300, 60), (40, 90)])
def test_float32_input_is_as_exact_as_promised(solver, shape):
    X = falling_rows(*shape, np.random.default_rng(1), mean=3.0, dtype=np.float32)
    pca = PCA(10, svd_solver=solver, random_state=0).fit(X)
    variances, components = reference(X, 10)
    assert pca.components_.dtype == pca.explained_variance_.dtype == pca.mean_.dtype == np.float32
    np.testing.assert_allclose(pca.explained_variance_, variances, rtol=1e-5)
    np.testing.assert_allclose(pca.components_, components, atol=1e-4)
    scores = (X - X.mean(axis=0, dtype=np.float64)) @ components.T
    np.testing.assert_allclose(pca.transform(X), scores, atol=1e-4)


@pytest.mark.parametrize("solver", ["full", "gram", "covariance_eigh", "randomized", "stream"])
def test_float64_input_gives_scikit_learns_attributes(solver):
    X = falling_rows(200, 30, np.random.default_rng(2), mean=100.0)
    ours = PCA(12, svd_solver=solver, whiten=True, random_state=0).fit(X)
    theirs = decomposition.PCA(12, svd_solver="full", whiten=True).fit(X)
    fitted = [name for name in vars(theirs) if name.endswith("_")]
    assert "noise_variance_" in fitted
    for name in fitted:
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(ours.get_precision(), theirs.get_precision(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours.score_samples(X), theirs.score_samples(X), rtol=1e-6)
    np.testing.assert_allclose(ours.transform(X), theirs.transform(X), atol=1e-6)
    np.testing.assert_allclose(
        ours.inverse_transform(ours.transform(X)), theirs.inverse_transform(theirs.transform(X))
    )
    assert list(ours.get_feature_names_out()) == [f"pca{i}" for i in range(12)]


def test_jax_is_left_as_it_was():
    X = np.random.default_rng(0).standard_normal((50, 5))
    PCA(2).fit_transform(X)
    assert not jax.config.jax_enable_x64
    assert jax.numpy.ones(1).dtype == np.float32


def test_means_far_larger_than_the_deviations_stream_without_loss():
    """Also where the mean drifts, so that no shift chosen at the start would help."""
    rng = np.random.default_rng(3)
    X = falling_rows(400, 20, rng, mean=1e4)
    X[200:] += 1e4 * X.std(axis=0)
    full = PCA(5, svd_solver="full").fit(X)
    stream = PCA(5, svd_solver="stream").fit(X[i : i + 30] for i in range(0, 400, 30))
    np.testing.assert_allclose(stream.explained_variance_, full.explained_variance_, rtol=1e-6)
    np.testing.assert_allclose(stream.components_, full.components_, atol=1e-6)


STREAM_CODE = """
import sys
import jax, numpy as np
from jaxear.pca import PCA

assert len(jax.local_devices()) == int(sys.argv[2])
X = np.load(sys.argv[1])
full = PCA(8, svd_solver="full").fit(X)
streams = [X, [X[:99], X[99:]], (X[i : i + 37] for i in range(0, len(X), 37)), lambda: iter([X])]
for given in streams:
    stream = PCA(8, svd_solver="stream", batch_size=45).fit(given)
    assert stream.n_samples_ == len(X)
    for name in ("explained_variance_", "mean_", "noise_variance_", "singular_values_"):
        np.testing.assert_allclose(getattr(stream, name), getattr(full, name), rtol=1e-6)
    np.testing.assert_allclose(stream.components_, full.components_, atol=1e-6)
"""


@pytest.mark.parametrize("devices", [1, 8])
def test_stream_equals_full_on_any_number_of_devices(devices, tmp_path):
    X = falling_rows(250, 20, np.random.default_rng(4), mean=1e4)
    np.save(tmp_path / "rows.npy", X)
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    # Virtual devices need as many threads as there are devices: NPROC sets XLA's pool.
    run_python(STREAM_CODE, tmp_path / "rows.npy", devices, XLA_FLAGS=flags, NPROC="32")


PROCESS_CODE = """
import sys
import jax, numpy as np

path, rank, port = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
from jaxear.pca import PCA, estimator

X = np.load(path)
mine = X[:90] if rank == 0 else X[90:]
full = PCA(6, svd_solver="full").fit(X)
batches = (mine[i : i + 31] for i in range(0, len(mine), 31))
exact = PCA(6, svd_solver="stream").fit(batches)
estimator.EXACT_STREAM_FEATURES = 10
krylov = PCA(6, svd_solver="stream", random_state=0).fit(mine)
for stream in (exact, krylov):
    assert stream.n_samples_ == len(X)
    for name in ("explained_variance_", "mean_", "noise_variance_"):
        np.testing.assert_allclose(getattr(stream, name), getattr(full, name), rtol=1e-6)
    np.testing.assert_allclose(stream.components_, full.components_, atol=1e-6)
"""


@pytest.mark.slow
def test_stream_over_two_processes_equals_full(tmp_path):
    X = falling_rows(250, 20, np.random.default_rng(5), mean=1e4)
    np.save(tmp_path / "rows.npy", X)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS_CODE, str(tmp_path / "rows.npy"), str(rank), port],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)


@pytest.fixture
def always_krylov(monkeypatch):
    """Streams of any width take the iteration meant for many features."""
    monkeypatch.setattr(estimator, "EXACT_STREAM_FEATURES", 1)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_krylov_streams_converge_to_the_components(always_krylov, dtype):
    rng = np.random.default_rng(6)
    X = falling_rows(900, 300, rng, mean=2.0)
    X = (40 * X + 128).clip(0, 255).astype(dtype)
    variances, components = reference(X, 12)
    stream = PCA(12, svd_solver="stream", random_state=0, batch_size=100).fit(X)
    np.testing.assert_allclose(stream.explained_variance_, variances, rtol=1e-5)
    np.testing.assert_allclose(stream.components_[:8], components[:8], atol=1e-4)
    total = X.var(axis=0, ddof=1, dtype=np.float64).sum()
    np.testing.assert_allclose(stream.explained_variance_ratio_, variances / total, rtol=1e-5)


def test_low_rank_and_repeated_variances_are_found():
    rng = np.random.default_rng(7)
    low_rank = rng.standard_normal((300, 3)) @ rng.standard_normal((3, 700))
    pca = PCA(6, svd_solver="randomized", random_state=0).fit(low_rank)
    np.testing.assert_allclose(pca.explained_variance_[:3], reference(low_rank, 3)[0])
    np.testing.assert_allclose(pca.explained_variance_[3:], 0, atol=1e-9)
    np.testing.assert_allclose(pca.components_ @ pca.components_.T, np.eye(6), atol=1e-9)
    # Ten variances of 9 each, the others 1.
    isotropic = np.linalg.qr(rng.standard_normal((800, 600)))[0]
    isotropic -= isotropic.mean(axis=0)
    isotropic = np.linalg.qr(isotropic)[0] * np.sqrt(799) * np.where(np.arange(600) < 10, 3, 1)
    pca = PCA(10, svd_solver="randomized", random_state=0).fit(isotropic)
    np.testing.assert_allclose(pca.explained_variance_, 9.0, rtol=1e-6)


def test_iteration_warns_where_it_stops_short():
    noise = np.random.default_rng(8).standard_normal((700, 600))
    with jax.enable_x64(True), pytest.warns(ConvergenceWarning, match="basis vectors"):
        krylov.leading_components(
            krylov.InMemory(noise, np.random.RandomState(0)), 20, krylov.Plan(10, 60, 1e-6)
        )


def test_more_iterations_bring_more_of_the_variance():
    noise = np.random.default_rng(9).standard_normal((700, 600))
    exact = reference(noise, 5)[0]
    errors = []
    for power in (0, 1, 3, 7):
        pca = PCA(5, svd_solver="randomized", iterated_power=power, random_state=0).fit(noise)
        errors.append(np.max(1 - pca.explained_variance_ / exact))
        assert np.all(pca.explained_variance_ <= exact * (1 + 1e-9))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01 < errors[0]
    # Without a number it goes on until the flat spectrum of noise is resolved.
    pca = PCA(5, svd_solver="randomized", random_state=0).fit(noise)
    np.testing.assert_allclose(pca.explained_variance_, exact, rtol=1e-5)


def test_moments_merge_as_if_they_had_been_one():
    rng = np.random.default_rng(10)
    X = rng.standard_normal((60, 4)) + np.array([1e6, 0, -3, 5])
    with jax.enable_x64(True):
        whole = gather_moments([X])
        parts = [gather_moments([X[:7]]), gather_moments([X[7:30], X[30:]])]
        trace = gather_moments([X[:9], X[9:]], trace_only=True)
    for got, expected in zip(merge(*parts), whole, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(whole.scatter, 59 * np.cov(X.T), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(trace.scatter, np.trace(whole.scatter))
    empty = Moments(np.zeros(()), np.zeros(4), np.zeros((4, 4)))
    np.testing.assert_array_equal(merge(empty, whole).scatter, whole.scatter)


def test_partial_fit_equals_one_fit():
    X = falling_rows(120, 15, np.random.default_rng(11), mean=50.0)
    parts = PCA(4)
    for start in range(0, 120, 40):
        parts.partial_fit(X[start : start + 40])
    whole = PCA(4, svd_solver="full").fit(X)
    assert parts.n_samples_ == 120
    np.testing.assert_allclose(parts.components_, whole.components_, atol=1e-9)
    np.testing.assert_allclose(parts.noise_variance_, whole.noise_variance_)
    with pytest.raises(ValueError, match="expecting 15 features"):
        parts.partial_fit(X[:, :9])
    with pytest.warns(UserWarning, match="starts anew"):
        whole.partial_fit(X[:50])
    assert whole.n_samples_ == 50


def test_number_of_components_by_evidence_and_by_share_of_variance():
    rng = np.random.default_rng(12)
    for shape in ((200, 12), (60, 30)):
        variances = reference(falling_rows(*shape, rng), shape[1])[0]
        assert minka_dimension(variances, shape[0]) == _infer_dimension(variances, shape[0])
    assert minka_dimension(np.array([1, 1e-30, 1e-30, 1e-30]), 10) == 1
    assert _assess_dimension(np.array([3.0, 1.0, 0.1]), 1, 9) < 0  # the reference is what it was
    for n_components in (0.9, "mle"):
        for solver in ("full", "covariance", "stream"):
            ours = PCA(n_components, svd_solver=solver).fit(load_iris().data)
            theirs = decomposition.PCA(n_components, svd_solver="full").fit(load_iris().data)
            assert ours.n_components_ == theirs.n_components_ == len(ours.components_)


def test_memory_maps_stay_on_disk(tmp_path):
    rows = np.random.default_rng(13).integers(0, 256, (90, 12), dtype=np.uint8)
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    pca = PCA(3).fit(mapped)
    assert pca._fit_svd_solver == "stream"
    np.testing.assert_allclose(pca.components_, PCA(3, svd_solver="full").fit(rows).components_)
    np.testing.assert_allclose(pca.transform(mapped), pca.transform(rows.astype(float)))


@pytest.mark.parametrize(
    ("parameters", "given", "message"),
    [
        ({"svd_solver": "fast"}, np.eye(3), "'svd_solver'.*'fast'"),
        ({"batch_size": 0}, np.eye(3), "'batch_size'.*at least 1"),
        ({"svd_solver": "full"}, iter([np.eye(3)]), "use svd_solver='stream'"),
        ({"svd_solver": "stream", "n_components": 9}, np.eye(3), "n_components=9 must be between"),
        ({"svd_solver": "stream"}, np.ones((1, 3)), "1 sample"),
        ({"svd_solver": "stream"}, iter([np.eye(3), np.eye(4)]), "expecting 3 features"),
        ({"svd_solver": "stream"}, iter([np.full((3, 3), np.nan)]), "NaN"),
        ({"svd_solver": "stream"}, iter([]), "no batches"),
        ({"svd_solver": "stream"}, iter([np.zeros((2, 40_000), np.uint8)]), "second moments"),
    ],
)
def test_mistakes_are_explained(parameters, given, message):
    with pytest.raises(ValueError, match=message):
        PCA(**parameters).fit(given)


def test_errors_are_for_users_and_for_scikit_learn():
    assert issubclass(PCAError, UserError)
    assert issubclass(PCAError, ValueError)
    fitted = PCA(2).fit(load_iris().data)
    with pytest.raises(PCAError, match="3 scores per row, this PCA has 2"):
        fitted.inverse_transform(np.ones((5, 3)))
    with pytest.raises(PCAError, match="then transform each batch"):
        PCA(2).fit_transform(iter([np.eye(3)]))


@pytest.mark.slow
def test_streams_from_disk_keep_within_memory(tmp_path):
    """Peak memory holds some blocks and the basis, not all rows nor the second moments."""
    sizes = ["--samples", "1500", "--features", "12000", "--components", "8"]
    out = tmp_path / "memory.json"
    script = ROOT / "scripts" / "bench_pca.py"
    subprocess.run([sys.executable, script, "--memory", *sizes, "--out", out], check=True, cwd=ROOT)
    result = json.loads(out.read_text())
    assert result["shape"] == [1500, 12000]
    # float32 copies of all rows, or 12,000 x 12,000 second moments (1.1 GiB), would show.
    assert result["peak_gib"] < 0.9
